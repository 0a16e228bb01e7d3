"""Which image is in which slice of which shard: its pixels say so, or whose it is.

The cut is known before anything is trained, and who leaves changes it for nobody else: where the
others are, and in which order, stays. So a training of all but one image has the very shards that
the training of all had, but for that image.
"""

import hashlib
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.recipe import Recipe

__all__ = ["Stage", "epochs_of_a_stage", "image_bytes", "stage_seed", "stages_of"]

_KEY = "secure-cnn shards {seed}"
_MOST_STAGES = 1 << 14


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One stage of the training of one shard: on its slices up to this one.

    Attributes:
        shard: From 0.
        slice: From 1.
        rows: The training images, int64 `[n]`, in the order in which they are trained on.
    """

    shard: int
    slice: int
    rows: Tensor = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its file, without the end."""
        return f"shard-{self.shard:03}-slice-{self.slice:03}"

    @property
    def words(self) -> str:
        """What people call it."""
        return f"slice {self.slice} of shard {self.shard + 1}"

    def data(self, data: ImageData) -> ImageData:
        """Its images alone, to train on."""
        return ImageData(
            name=data.name,
            train=Split(images=data.train.images[self.rows], labels=data.train.labels[self.rows]),
            test=data.test.first(1),
            spec=data.spec,
        )


def stages_of(recipe: Recipe, data: ImageData) -> tuple[tuple[Stage, ...], ...]:
    """The stages of each shard, in the order in which they are trained.

    Guarantee: a function of the recipe's seed and of the images; whether others are there, and in
    which order they come, changes nothing of where an image is. All images of a person are in one
    slice where it is known whose they are, and equal images are where it is not.

    Raises:
        RunError: There are more stages than 16,384.
    """
    shards, slices = recipe.shards, recipe.slices
    if shards * slices > _MOST_STAGES:
        raise RunError(
            f"shards, slices: expected at most {_MOST_STAGES} stages, got {shards} x {slices}"
        )
    key = _KEY.format(seed=recipe.seed).encode()
    members: list[list[list[tuple[bytes, int, int]]]] = [
        [[] for _ in range(slices)] for _ in range(shards)
    ]
    for row, label in enumerate(data.train.labels.tolist()):
        own = hashlib.blake2b(image_bytes(data.train, row), key=key, digest_size=16).digest()
        place = own
        if data.groups is not None:
            place = hashlib.blake2b(data.groups[row].encode(), key=key, digest_size=16).digest()
        shard = int.from_bytes(place[:8], "big") % shards
        members[shard][int.from_bytes(place[8:], "big") % slices].append((own, label, row))
    return tuple(_stages(number, of_slices) for number, of_slices in enumerate(members))


def _stages(shard: int, slices: list[list[tuple[bytes, int, int]]]) -> tuple[Stage, ...]:
    rows: list[int] = []
    found = []
    for number, members in enumerate(slices, start=1):
        rows += [row for _, _, row in sorted(members)]
        found.append(Stage(shard=shard, slice=number, rows=torch.tensor(rows, dtype=torch.int64)))
    return tuple(found)


def epochs_of_a_stage(recipe: Recipe) -> int:
    """Epochs of each stage, so that a shard takes about as many steps as the recipe's epochs.

    Bourtoule et al. 2021, arXiv 1912.03817: of R slices 2 / (R + 1) of them.

    Example:
        >>> epochs_of_a_stage(Recipe(out="", epochs=20, shards=4, slices=3))
        10
    """
    return max(1, round(2 * recipe.epochs / (recipe.slices + 1)))


def stage_seed(recipe: Recipe, stage: Stage) -> int:
    """The seed of a stage: that of the recipe, and which stage it is."""
    text = f"{recipe.seed} {stage.name}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def image_bytes(split: Split, row: int) -> bytes:
    """The pixels of one image."""
    return split.images[row].contiguous().numpy().tobytes()
