"""What a copier of a model asks it about: images of the same kind, of another, or of chance.

And a few images of which further questions are made, by what was answered so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secure_cnn.data import Split
from secure_cnn.errors import DataError, RunError
from secure_cnn.leakage import arguments
from secure_cnn.leakage.student import StudentTraining

__all__ = ["FixedPool", "GrowingPool", "Pool", "halves", "noise_images"]

_BATCH = 500
_COARSEST = 7

_Taught = Callable[[Tensor], Tensor]
"""What a victim shows of images, `[n, classes]`."""


class Pool(Protocol):
    """What a copier has to ask about.

    `images` are its own, float `[n, ...]` in [0, 1], and `labels` theirs, `[n]`, or None where it
    knows none; of `least` to `most` questions it can ask what no other pool of them would.
    """

    @property
    def name(self) -> str:
        """Its name in a record."""

    @property
    def images(self) -> Tensor:
        """The copier's own."""

    @property
    def labels(self) -> Tensor | None:
        """Of those images."""

    @property
    def least(self) -> int:
        """The fewest questions that are worth asking."""

    @property
    def most(self) -> float:
        """Questions that it has."""

    def questions(
        self, budget: int, taught: _Taught, learn: StudentTraining, *, seed: int
    ) -> Tensor:
        """The `budget` images that are asked about."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Owned:
    """Images that a copier has, which are of the right form."""

    name: str
    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        arguments.instance("images", self.images, Tensor)
        if self.images.ndim != 4 or not self.images.is_floating_point() or not len(self.images):
            raise DataError(
                f"{self.name}: expected float images [n, channels, height, width], at least one, "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels is not None:
            arguments.instance("labels", self.labels, Tensor)
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"{self.name}: expected a label for each of {len(self.images)} images, got "
                f"{list(self.labels.shape)}"
            )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FixedPool(_Owned):
    """Images that are asked about in their order, whatever is answered."""

    least: ClassVar[int] = 1

    @property
    def most(self) -> float:
        """As many as there are images."""
        return len(self.images)

    def questions(
        self, budget: int, taught: _Taught, learn: StudentTraining, *, seed: int
    ) -> Tensor:
        """The first images."""
        return self.images[:budget]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class GrowingPool(_Owned):
    """A few images, from which further questions are made in rounds (Papernot et al. 2017).

    After arXiv 1602.02697, section 4.2. In each round a student learns all that was answered so
    far, and every image that was asked about is moved by `step` in the sign of that student's slope
    for the class that was answered: questions double.

    Attributes:
        step: How far each pixel moves, in (0, 1].
    """

    step: float = 0.1
    most: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.number("step", self.step, "a step in (0, 1]", lambda step: 0 < step <= 1)

    @property
    def least(self) -> int:
        """More than its images: those alone are asked about by whoever has them."""
        return len(self.images) + 1

    def questions(
        self, budget: int, taught: _Taught, learn: StudentTraining, *, seed: int
    ) -> Tensor:
        """The images, and those that were made of them."""
        asked = self.images[:budget]
        answers = taught(asked)
        while len(asked) < budget:
            student = learn(asked, answers, seed=seed)
            more = self._moved(student, asked, answers.argmax(1))[: budget - len(asked)]
            asked, answers = torch.cat([asked, more]), torch.cat([answers, taught(more)])
        return asked

    def _moved(self, student: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        moved = []
        for part, own in zip(
            torch.split(images, _BATCH), torch.split(classes, _BATCH), strict=True
        ):
            leaf = part.clone().requires_grad_()
            said = student(leaf).gather(1, own[:, None])
            (slope,) = torch.autograd.grad(said.sum(), leaf)
            moved.append((part + self.step * slope.sign()).clamp(0, 1))
        return torch.cat(moved)


def halves(split: Split, *, seed: int) -> tuple[Split, Split]:
    """A split in two by chance: to ask about, and to judge on."""
    arguments.whole("seed", seed, least=0)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    one, other = (
        Split(images=split.images[rows], labels=split.labels[rows]) for rows in order.chunk(2)
    )
    return one, other


def noise_images(shape: tuple[int, int, int], count: int, *, seed: int) -> Tensor:
    """Random images in [0, 1], float `[count, *shape]`: each pixel alone, and smooth ones in turn.

    Smooth are random pixels of a much smaller image, made larger.

    Raises:
        RunError: A number is out of range.
    """
    arguments.whole("count", count, least=0)
    arguments.whole("seed", seed, least=0)
    if len(arguments.tuple_of("shape", shape, object)) != 3:
        raise RunError(f"shape: expected channels, height and width, got {shape}")
    for side in shape:
        arguments.whole("shape", side, least=1)
    random = torch.Generator().manual_seed(seed)
    found = torch.rand(count, *shape, generator=random)
    sides = [min(_COARSEST, side) for side in shape[1:]]
    coarse = torch.rand(len(found[1::2]), shape[0], *sides, generator=random)
    if len(coarse):
        found[1::2] = F.interpolate(coarse, size=shape[1:], mode="bilinear")
    return found
