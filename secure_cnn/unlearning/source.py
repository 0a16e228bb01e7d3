"""The run that people leave: its record, its model and its images, as they were in its training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from secure_cnn.checkpoint import LoadedModel, Unlocking, model_digest, read_model
from secure_cnn.data import ImageData, Split, load_data
from secure_cnn.errors import RunError
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Recipe, RunFolder
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["Source", "leaving", "source_of", "staying"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A complete run with all that is needed to take people out of its model.

    Attributes:
        record: Of the run.
        recipe: Its settings, with the model that they came to.
        data: Its images, those to train on in the order of the training.
        loaded: Its model, with what the file claims.
        inventory: Who is in its data.
        files: Its folder.
        others: Images that the data have now and the run did not: they came later, or left before.
    """

    record: RunRecord
    recipe: Recipe
    data: ImageData
    loaded: LoadedModel
    inventory: Inventory
    files: StageFiles
    others: int

    @property
    def model_path(self) -> Path:
        """Where its model is."""
        return self.files.run.model


def source_of(
    run: Path, *, data: str | None, unlocking: Unlocking | None, network: OwnNetwork | None
) -> Source:
    """Reads a complete run, once it is sure that model and images are those of its record.

    Args:
        run: Its folder.
        data: Where its images are now, if elsewhere than they were.
        unlocking: Opens what is sealed, and whose signatures count.
        network: What makes the network, if it is one of your own.

    Raises:
        SecureCNNError: The run is not complete, or was changed, or its images were.
        ArchiveError: What is sealed cannot be opened or believed.
    """
    record = RunFolder(root=run, sealed=False).recorded()
    if record.status != "complete":
        raise RunError(f"{run}: expected a run that is complete, got one that is {record.status}")
    folder = RunFolder(
        root=run, sealed=any(each.endswith(".sealed") for each in record.checkpoints)
    )
    if folder.sealed and unlocking is None:
        raise RunError(
            f"{folder.model}: is sealed; give the identity or the passphrase that opens it"
        )
    if not folder.sealed:
        unlocking = None
    loaded = read_model(folder.model, unlocking=unlocking, network=network)
    if record.model_digest != model_digest(loaded.model):
        raise RunError(
            f"{folder.model}: is not the model that {folder.record} tells of; put its own back"
        )
    settings = {**record.settings, "out": str(run), "data": data or record.settings["data"]}
    recipe = replace(Recipe.from_dict(settings), model=record.model.name)
    files = StageFiles(run=folder, sealing=None, unlocking=unlocking, network=network)
    found = _numbered(
        load_data(recipe.data, reading=recipe.reading, groups=recipe.groups, seed=recipe.seed)
    )
    if files.inventory_path.exists():
        inventory = files.read_inventory()
        found, others = inventory.recognised(found)
    else:
        inventory, others = Inventory.of(found), 0
        _check_images(folder, record, found, loaded)
    return Source(
        record=record,
        recipe=recipe,
        data=found,
        loaded=loaded,
        inventory=inventory,
        files=files,
        others=others,
    )


def leaving(data: ImageData, request: Request) -> Split:
    """The images of those who leave."""
    rows = torch.tensor(request.rows, dtype=torch.int64)
    return Split(images=data.train.images[rows], labels=data.train.labels[rows])


def staying(data: ImageData, request: Request) -> ImageData:
    """The data without those who leave, in the same order."""
    rows = request.without(len(data.train))
    chosen = torch.tensor(rows, dtype=torch.int64)
    return replace(
        data,
        train=Split(images=data.train.images[chosen], labels=data.train.labels[chosen]),
        groups=None if data.groups is None else tuple(data.groups[row] for row in rows),
        ids=None if data.ids is None else tuple(data.ids[row] for row in rows),
    )


def _numbered(data: ImageData) -> ImageData:
    """With the numbers of its images as ids, where they have no others: they go with the image."""
    if data.ids is not None and data.test_ids is not None:
        return data
    numbers = tuple(map(str, range(len(data.train) + len(data.test))))
    return replace(data, ids=numbers[: len(data.train)], test_ids=numbers[len(data.train) :])


def _check_images(
    folder: RunFolder, record: RunRecord, data: ImageData, loaded: LoadedModel
) -> None:
    """Images other than those of the training would be looked for in vain."""
    told, own = record.data.fingerprint, data.fingerprint
    if told.startswith(KEYED):
        key = loaded.private_claims.get("data_fingerprint_key")
        if not isinstance(key, str):
            # A private run that was not sealed has left its key nowhere.
            if (record.data.train, record.data.test) != (len(data.train), len(data.test)):
                raise RunError(f"{folder.root}: its data are others than they were")
            return
        own = keyed_fingerprint(own, key)
    if told != own:
        raise RunError(
            f"{folder.root}: its data are others than they were in the training; say with --data "
            "where those are, and take people out here before they are deleted there"
        )
