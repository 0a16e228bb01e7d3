"""The run that people leave: its record, its model and its images, as they were in its training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from secure_cnn.archive import InvalidKey, NotSealed
from secure_cnn.checkpoint import LoadedModel, Unlocking, model_digest, read_model
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Recipe, RunFolder
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.inventory import Inventory, Recognised
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["Source", "begun_with", "leaving", "source_of", "staying"]

_OTHERS = (
    "its data are others than they were in the training, and it has no inventory that says which "
    "of them are missing; say with --data where all are, bring deleted ones back until who asked "
    "has left, or train anew on what remains"
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A complete run with all that is needed to take people out of its model.

    Attributes:
        record: Of the run.
        recipe: Its settings, with the model that they came to.
        there: Its images, those to train on in the order of the training, and what is missing.
        loaded: Its model, with what the file claims.
        files: Its folder.
        certain: Whether the images were found to be those of the training.
    """

    record: RunRecord
    recipe: Recipe
    there: Recognised
    loaded: LoadedModel
    files: StageFiles
    certain: bool

    @property
    def data(self) -> ImageData:
        """Those of its images that are there."""
        return self.there.data

    @property
    def inventory(self) -> Inventory:
        """The same as digests."""
        return self.there.inventory

    def recipe_for(self, images: int) -> Recipe:
        """Its settings for so many that stay: a step on all images is one on all that are left.

        Of a training in shards they stay as they are: a stage of another size of step is another.
        """
        if self.recipe.is_sharded or self.recipe.batch_size is None:
            return self.recipe
        return replace(self.recipe, batch_size=min(self.recipe.batch_size, images))

    @property
    def model_path(self) -> Path:
        """Where its model is."""
        return self.files.run.model


def source_of(
    run: Path,
    *,
    data: str | None,
    unlocking: Unlocking | None,
    network: OwnNetwork | None,
    key: bytes | None = None,
) -> Source:
    """Reads a complete run, once it is sure that model and images are those of its record.

    Args:
        run: Its folder.
        data: Where its images are now, if elsewhere than they were.
        unlocking: Opens what is sealed, and whose signatures count.
        network: What makes the network, if it is one of your own.
        key: Of the digests of a run without an inventory; None draws one.

    Raises:
        SecureCNNError: The run is not complete, or was changed, or its images were.
        ArchiveError: What is sealed cannot be opened or believed.
    """
    record = RunFolder(root=run, sealed=False).recorded()
    if record.status != "complete":
        raise RunError(f"{run}: expected a run that is complete, got one that is {record.status}")
    folder = _folder_of(run, record, unlocking)
    loaded = read_model(folder.model, unlocking=unlocking, network=network)
    if record.model_digest != model_digest(loaded.model):
        raise RunError(
            f"{folder.model}: is not the model that {folder.record} tells of; put its own back"
        )
    _check_told(folder, record, loaded, network)
    settings = {**record.settings, "out": str(run), "data": data or record.settings["data"]}
    recipe = replace(Recipe.from_dict(settings), model=record.model.name)
    files = StageFiles(run=folder, sealing=None, unlocking=unlocking, network=network)
    found = _numbered(recipe.images())
    if files.inventory_path.exists():
        there, certain = files.read_inventory().recognised(found), True
    else:
        certain = _check_images(folder, record, found, loaded)
        there = Recognised(data=found, inventory=Inventory.of(found, key=key))
    return Source(
        record=record,
        recipe=recipe,
        there=there,
        loaded=loaded,
        files=files,
        certain=certain,
    )


def _folder_of(run: Path, record: RunRecord, unlocking: Unlocking | None) -> RunFolder:
    """The run's folder, sealed or plain as what is there and who asks agree."""
    # The record is signed by nobody: what it names is not taken in the place of a sealed file.
    sealed = RunFolder(root=run, sealed=True).model
    named = any(each.endswith(".sealed") for each in record.checkpoints)
    folder = RunFolder(root=run, sealed=named or sealed.exists())
    if folder.sealed and unlocking is None:
        raise InvalidKey(
            f"{folder.model}: is sealed; give the identity or the passphrase that opens it"
        )
    if unlocking is not None and not folder.sealed:
        raise NotSealed(
            f"{folder.model}: expected a sealed model, since what opens it was named, got a plain "
            "one; leave the identity and whom to trust out if it should be plain"
        )
    return folder


def begun_with(claims: Mapping[str, Any]) -> str:
    """SHA-256 of the weights that a training began with, as its model claims; empty for none."""
    told = claims.get("weights")
    return str(told.get("sha256", "")) if isinstance(told, Mapping) else ""


def leaving(data: ImageData, request: Request) -> Split:
    """The images of those who leave."""
    return data.train.some(torch.tensor(request.rows, dtype=torch.int64))


def staying(data: ImageData, request: Request) -> ImageData:
    """The data without those who leave, in the same order."""
    rows, tested = request.without(len(data.train)), request.without_tested(len(data.test))
    if not tested:
        raise RunError(f"{data.name}: expected test images of others, got none; bring some")
    return replace(
        data,
        train=data.train.some(torch.tensor(rows, dtype=torch.int64)),
        test=data.test.some(torch.tensor(tested, dtype=torch.int64)),
        groups=None if data.groups is None else tuple(data.groups[row] for row in rows),
        test_groups=data.test_groups and tuple(data.test_groups[row] for row in tested),
    )


def _numbered(data: ImageData) -> ImageData:
    """With the numbers of its images as ids, where they have no others: they go with the image."""
    if data.train.ids is not None and data.test.ids is not None:
        return data
    numbers = tuple(map(str, range(len(data.train) + len(data.test))))
    return replace(
        data,
        train=replace(data.train, ids=numbers[: len(data.train)]),
        test=replace(data.test, ids=numbers[len(data.train) :]),
    )


def _check_told(
    folder: RunFolder, record: RunRecord, loaded: LoadedModel, network: OwnNetwork | None
) -> None:
    """The record, which nobody signs, says of the training what the model's file says."""
    claims = loaded.claims.get("privacy")
    told: dict[str, object] = claims if isinstance(claims, dict) else {}
    own = record.privacy
    names = ("noise_multiplier", "sampling_rate", "delta", "unit")
    known = {} if own is None else {name: getattr(own, name) for name in names}
    private = record.settings.get("epsilon") is not None
    if private != bool(told) or known != {n: told.get(n, "example") for n in names if told}:
        raise RunError(
            f"{folder.record}: says of the privacy of its training what its model's file does not "
            "say; put the run's own back"
        )
    begun, members = begun_with(loaded.claims), loaded.architecture.members
    if record.model.weights != begun or (
        members > 1 and members > record.settings.get("shards", 1)
    ):
        raise RunError(
            f"{folder.record}: says of how its training began, or of its shards, what its model's "
            "file does not say; put the run's own back"
        )
    if network is not None and record.model.source not in ("", network.source):
        raise RunError(
            f"{folder.root}: the file that makes {network.name} is not the one of its training; "
            "put the code back as it was"
        )


def _check_images(
    folder: RunFolder, record: RunRecord, data: ImageData, loaded: LoadedModel
) -> bool:
    """Whether images are those of the training; others would be looked for in vain."""
    told, own = record.data.fingerprint, data.fingerprint
    if told.startswith(KEYED):
        key = loaded.private_claims.get("data_fingerprint_key")
        if not isinstance(key, str):
            # A private run that was not sealed has left its key nowhere.
            if (record.data.train, record.data.test) != (len(data.train), len(data.test)):
                raise RunError(f"{folder.root}: {_OTHERS}")
            return False
        own = keyed_fingerprint(own, key)
    if told != own:
        raise RunError(f"{folder.root}: {_OTHERS}")
    return True
