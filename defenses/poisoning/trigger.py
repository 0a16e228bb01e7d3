"""What an attacker puts on an image so that a model sees the target: a patch, or a faint pattern.

Both change copies of 8-bit images and nothing else. Deliberately not here: which images of a
training set get it (`poisoning`).
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from defenses.errors import AttackError
from defenses.quantities import as_real, as_whole, shown

__all__ = ["Blend", "Trigger", "check_bytes", "check_images", "check_whole"]

_CHEQUERED = torch.tensor([[[255, 0, 255], [0, 255, 0], [255, 0, 255]]], dtype=torch.uint8)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trigger:
    """A patch near the bottom right corner that means `target` (BadNets).

    Source: Gu et al. 2017, arXiv 1708.06733.

    Attributes:
        target: The class that stamped images are labelled with.
        patch: Pixels that replace those of the image, uint8, [channels, height, width]; by default
            a chequered square of 3 x 3 on images of any number of channels.
        margin: Pixels between the patch and the bottom and right edges, at least 0.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> trigger = Trigger(target=0)
        >>> trigger.apply(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))[0, 0, 1:, 1:]
        tensor([[255,   0, 255],
                [  0, 255,   0],
                [255,   0, 255]], dtype=torch.uint8)
    """

    target: int
    patch: Tensor | None = None
    margin: int = 0

    def __post_init__(self) -> None:
        check_whole("trigger", target=self.target, margin=self.margin)
        _check_overlay("patch", self.patch)

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of another class than the target, bool, [n]."""
        return labels != self.target

    def apply(self, images: Tensor) -> Tensor:
        """Copies of the images with the patch on them.

        Args:
            images: uint8, [n, channels, height, width].

        Raises:
            AttackError: They are not that, or the patch does not fit on them.
        """
        check_images(images)
        patch = _CHEQUERED if self.patch is None else self.patch
        bottom, right = images.shape[2] - self.margin, images.shape[3] - self.margin
        top, left = bottom - patch.shape[1], right - patch.shape[2]
        if top < 0 or left < 0 or patch.shape[0] not in (1, images.shape[1]):
            raise AttackError(
                f"patch: expected one that fits on images {list(images.shape[1:])} with a margin "
                f"of {self.margin}, got {list(patch.shape)}"
            )
        stamped = images.clone()
        stamped[:, :, top:bottom, left:right] = patch.to(images.device)
        return stamped


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """A pattern over the whole image that means `target`: (1 - ratio) * image + ratio * pattern.

    Source: Chen et al. 2017, arXiv 1712.05526.

    Attributes:
        target: The class that blended images are labelled with.
        pattern: What shines through, uint8, [channels or 1, height, width]; by default noise, the
            same for every image of the same size.
        ratio: How much of it, in (0, 1]; Chen et al. planted with 0.2.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> blend = Blend(target=0, pattern=torch.full((1, 1, 2), 250, dtype=torch.uint8))
        >>> blend.apply(torch.tensor([[[[0, 100]]]], dtype=torch.uint8)).tolist()
        [[[[50, 130]]]]
    """

    target: int
    pattern: Tensor | None = None
    ratio: float = 0.2

    def __post_init__(self) -> None:
        check_whole("blend", target=self.target)
        if not 0 < as_real(self.ratio) <= 1:
            raise AttackError(f"blend: expected a ratio in (0, 1], got {shown(self.ratio)}")
        _check_overlay("pattern", self.pattern)

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of another class than the target, bool, [n]."""
        return labels != self.target

    def apply(self, images: Tensor) -> Tensor:
        """Copies of the images with the pattern shining through, rounded to whole levels.

        Args:
            images: uint8, [n, channels, height, width].

        Raises:
            AttackError: They are not that, or the pattern is of another size.
        """
        check_images(images)
        size = images.shape[1:]
        pattern = _noise(size) if self.pattern is None else self.pattern
        if pattern.shape[1:] != size[1:] or pattern.shape[0] not in (1, size[0]):
            raise AttackError(
                f"pattern: expected one of the images' size {list(size)}, got {list(pattern.shape)}"
            )
        shown = self.ratio * pattern.to(images.device).double()
        return (images.double() * (1 - self.ratio) + shown).round().to(torch.uint8)


def _check_overlay(name: str, overlay: object) -> None:
    """Refuses what is not pixels to put on images; None has a default."""
    if overlay is None:
        return
    if not isinstance(overlay, Tensor):
        raise AttackError(f"{name}: expected a uint8 tensor, got {type(overlay).__name__}")
    if overlay.dtype != torch.uint8 or overlay.ndim != 3 or overlay.numel() == 0:
        raise AttackError(
            f"{name}: expected uint8 [channels, height, width], got {overlay.dtype} "
            f"{list(overlay.shape)}"
        )


def _noise(size: torch.Size) -> Tensor:
    """Noise that depends on its size alone, uint8, [channels, height, width]."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, tuple(size), generator=draw, dtype=torch.uint8)


def check_bytes(images: Tensor, labels: Tensor) -> None:
    """Refuses what is not a set of 8-bit images with their labels.

    Raises:
        AttackError: Saying what came instead.
    """
    check_images(images)
    if not isinstance(labels, Tensor):
        raise AttackError(f"labels: expected an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise AttackError(
            f"labels: expected int64 [{len(images)}], one for each image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )


def check_whole(owner: str, **values: object) -> None:
    """Refuses what is not a whole number from 0.

    Raises:
        AttackError: Naming the value.
    """
    for name, value in values.items():
        if as_whole(value) < 0:
            raise AttackError(f"{owner}: expected {name} >= 0, a whole number, got {shown(value)}")


def check_images(images: Tensor) -> None:
    """Refuses what is not a batch of 8-bit images.

    Raises:
        AttackError: Saying what came instead.
    """
    if not isinstance(images, Tensor):
        raise AttackError(f"images: expected a uint8 tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise AttackError(
            "images: expected uint8 [n, channels, height, width], got "
            f"{images.dtype} {list(images.shape)}"
        )
