"""The files of a training in shards: the model that each stage left, and the inventory of images.

A stage's file says what the stage was: a digest of the very images in it, of the model it began
with, and of the settings. So nobody has to remember what is still good after people have left: a
file is, whose stage would be trained the same today.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch import nn

from secure_cnn.archive import InvalidKey
from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    model_digest,
    read_model,
    read_state,
    write_model,
    write_state,
)
from secure_cnn.errors import RunError
from secure_cnn.models import Architecture
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Recipe, RunFolder
from secure_cnn.record import ModelRecord
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.shards import Stage, epochs_of_a_stage, stage_seed

__all__ = ["StageFiles", "StageKind", "inventory_beside", "stage_recipe"]

_ELSEWHERE = (
    *("out", "data", "groups", "weights", "device", "baseline", "robust_samples"),
    *("checkpoint_minutes", "image_size", "image_fit", "background"),
)
"""Settings that do not say how a stage is trained, or of which a digest does."""


def stage_recipe(recipe: Recipe, stage: Stage) -> Recipe:
    """How one stage is trained: as a recipe of its own, from where the one before ended."""
    return replace(
        recipe,
        shards=1,
        slices=1,
        epochs=epochs_of_a_stage(recipe),
        seed=stage_seed(recipe, stage),
        baseline=False,
    )


@final
@dataclass(frozen=True, kw_only=True)
class StageKind:
    """What a stage would be if it were trained today; plain values that its file bears.

    `images` is the keyed digest of its images, `start` that of the model it begins with (empty for
    one that is drawn), `settings` that of its recipe, `weights` that of a file it starts from, and
    `network` that of the file that makes a network of one's own.
    """

    shard: int
    slice: int
    images: str
    start: str
    settings: str
    weights: str
    network: str

    @classmethod
    def of(
        cls, recipe: Recipe, stage: Stage, inventory: Inventory, *, start: str, begun: ModelRecord
    ) -> "StageKind":
        """That of this stage."""
        own = {
            n: v for n, v in stage_recipe(recipe, stage).to_dict().items() if n not in _ELSEWHERE
        }
        text = json.dumps(own, sort_keys=True).encode()
        return cls(
            shard=stage.shard,
            slice=stage.slice,
            images=inventory.fingerprint(stage),
            start=start,
            settings=hashlib.sha256(text).hexdigest(),
            weights=begun.weights,
            network=begun.source,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@final
@dataclass(frozen=True, kw_only=True)
class StageFiles:
    """The folder of a run's stages; sealed as the run is.

    Attributes:
        run: The run.
        sealing: How they are written.
        unlocking: How sealed ones are opened, and whose signatures count.
        network: What makes a network of one's own.
    """

    run: RunFolder
    sealing: Sealing | None
    unlocking: Unlocking | None
    network: OwnNetwork | None

    def path(self, stage: Stage) -> Path:
        """Of a stage's model."""
        return self._place(stage.name)

    @property
    def inventory_path(self) -> Path:
        """Of the inventory."""
        return self._place("inventory")

    def write(
        self, stage: Stage, kind: StageKind, model: nn.Module, architecture: Architecture
    ) -> None:
        """Writes what a stage left."""
        claims: dict[str, Any] = {"stage": kind.to_dict(), "model_digest": model_digest(model)}
        self._make()
        write_model(
            self.path(stage),
            model,
            architecture,
            claims=claims,
            sealing=self.sealing,
            overwrite=True,
        )

    def read(self, stage: Stage, kind: StageKind) -> nn.Module | None:
        """What this very stage left, if its file is there; None where it is another stage's.

        Raises:
            ArchiveError: The file cannot be opened, or is not signed by whom it must be.
            RunError: It was changed since.
        """
        path = self.path(stage)
        if not path.is_file():
            return None
        if self.run.sealed and self.unlocking is None:
            raise InvalidKey(
                f"{path}: is sealed; give the identity or the passphrase that opens it"
            )
        loaded = read_model(
            path, unlocking=self.unlocking if self.run.sealed else None, network=self.network
        )
        if loaded.claims.get("stage") != kind.to_dict():
            return None
        if loaded.claims.get("model_digest") != model_digest(loaded.model):
            raise RunError(
                f"{path}: holds another model than it says, so the file was changed; put the run's "
                "own back, or remove it: the stage is then trained anew"
            )
        return loaded.model

    def write_inventory(self, inventory: Inventory) -> None:
        """Writes who is in the data."""
        self._make()
        write_state(self.inventory_path, inventory.to_state(), sealing=self.sealing)

    def read_inventory(self) -> Inventory:
        """Who is in the data.

        Raises:
            ArchiveError: The file is not there, or cannot be opened.
            RunError: It is none.
        """
        state = read_state(
            self.inventory_path, unlocking=self.unlocking if self.run.sealed else None
        )
        return Inventory.from_state(state)

    def key(self) -> bytes | None:
        """The key of its inventory; None where it has none yet."""
        return self.read_inventory().key if self.inventory_path.exists() else None

    def _place(self, stem: str) -> Path:
        return self.run.shards / f"{stem}.{'sealed' if self.run.sealed else 'safetensors'}"

    def _make(self) -> None:
        try:
            self.run.shards.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.run.shards}: expected a folder that can be made: {error.strerror}"
            ) from error


def inventory_beside(model: Path, unlocking: Unlocking | None) -> Inventory | None:
    """Who is in the data of the run that a model's file is of; None where its folder has no such.

    Args:
        model: The file, in the run's folder as `train` or `forget` left it.
        unlocking: Opens it where the model is sealed.

    Raises:
        ArchiveError: It cannot be opened.
        RunError: It is none.
    """
    run = RunFolder(root=model.parent.parent, sealed=model.suffix == ".sealed")
    files = StageFiles(run=run, sealing=None, unlocking=unlocking, network=None)
    there = run.model == model and files.inventory_path.is_file()
    return files.read_inventory() if there else None
