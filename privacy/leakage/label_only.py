"""Signals of models that say a class and nothing else: how firmly they hold on to it.

Each asks about several views of an image. Of the answer only the largest logit's place is looked
at, so that rounding, temperature or silence about probabilities protect nobody from them. Their
values are few: there are many ties, which count against an attack.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.signals import Answer, checked_logits
from privacy.statistics import Numbers

__all__ = ["AugmentationVotes", "NoiseVotes"]


@final
@dataclass(frozen=True, kw_only=True)
class AugmentationVotes:
    """Share of an image's views that are given its own class (Choquette-Choo et al. 2021).

    The views are the image and those of it that are moved by `shift` pixels in all, along one axis
    or both: 4 `shift` + 1 (arXiv 2007.14321, section 4.1); what comes in is 0. Strongest where the
    training changed its images in the same way.

    Attributes:
        shift: At least 1, and less than the side of an image.
        flip: Whether the mirror image of each view is a view too.

    Raises:
        LeakageError: `shift` is out of range; or, when called, images are not `[n, channels,
            height, width]`.

    Example:
        >>> AugmentationVotes(shift=2).queries, AugmentationVotes(flip=True).queries
        (9, 10)
    """

    shift: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        arguments.whole("shift", self.shift, least=1)

    @property
    def queries(self) -> int:
        """How often a model is asked about one example."""
        return (4 * self.shift + 1) * (2 if self.flip else 1)

    def __call__(self, answer: Answer, images: Tensor, labels: Tensor, /) -> Numbers:
        """Share of right answers, float64 `[n]` in [0, 1]."""
        return _share_right(answer, self._views(images), labels)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        if images.ndim != 4 or self.shift >= min(images.shape[-2:]):
            raise LeakageError(
                f"images: expected [n, channels, height, width] with sides above {self.shift}, got "
                f"{list(images.shape)}"
            )
        by, (height, width) = self.shift, images.shape[-2:]
        wide = F.pad(images, (by, by, by, by))
        for down, right in [(0, 0), *_moves(by)]:
            top, left = by - down, by - right
            view = wide[..., top : top + height, left : left + width]
            yield view
            if self.flip:
                yield view.flip(-1)


@final
@dataclass(frozen=True, kw_only=True)
class NoiseVotes:
    """Share of noisy copies of an image that are given its own class (Choquette-Choo et al. 2021).

    Each copy has Gaussian noise on it and is cut to [0, 1] (arXiv 2007.14321, section 4.2). All
    examples and all models get the same `draws` noises, so that what is said of an example depends
    neither on the others in its batch nor on the batch's size.

    Attributes:
        sigma: Deviation of the noise, > 0.
        draws: Noisy copies of each image, at least 1; 100 and more are usual.
        seed: What draws the noise.

    Raises:
        LeakageError: A number is out of range; or, when called, images are not floats in [0, 1].

    Example:
        >>> NoiseVotes(sigma=0.1, draws=50).queries
        50
    """

    sigma: float
    draws: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.number("sigma", self.sigma, "a finite number > 0", lambda x: 0 < x < math.inf)
        arguments.whole("draws", self.draws, least=1)
        arguments.whole("seed", self.seed, least=0)

    @property
    def queries(self) -> int:
        """How often a model is asked about one example."""
        return self.draws

    def __call__(self, answer: Answer, images: Tensor, labels: Tensor, /) -> Numbers:
        """Share of right answers, float64 `[n]` in [0, 1]."""
        return _share_right(answer, self._copies(images), labels)

    def _copies(self, images: Tensor) -> Iterator[Tensor]:
        inside = images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
        if not inside:
            raise LeakageError(
                "images: expected floats in [0, 1], got others; noise is added to those, and what "
                "else normalises them belongs into the model"
            )
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.draws):
            noise = torch.randn(images.shape[1:], generator=generator)
            yield (images + self.sigma * noise.to(images)).clamp(0, 1)


def _moves(by: int) -> Iterator[tuple[int, int]]:
    """Every way to move by so many pixels in all: 4 `by` pairs, down and to the right."""
    for down in range(-by, by + 1):
        aside = by - abs(down)
        yield down, aside
        if aside:
            yield down, -aside


def _share_right(answer: Answer, views: Iterable[Tensor], labels: Tensor) -> Numbers:
    """How many of the views are given the label's class, over how many there are."""
    right = torch.stack([(_class(answer(view), labels) == labels).cpu() for view in views])
    found: Numbers = right.double().mean(0).numpy()
    return found


def _class(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model says, if it has a row of finite logits for each image, and the labels' classes.

    Raises:
        LeakageError: It has not.
    """
    logits = checked_logits(logits, labels)
    if not bool(logits.isfinite().all()):
        raise LeakageError(
            f"logits: expected a finite row for each of {len(labels)} images, got others"
        )
    return logits.argmax(1)
