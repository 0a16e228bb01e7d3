"""Random changes that keep the label, on whole batches and for each example by itself.

Each image depends on its own example only, so a private run may use them. Not here: mixing
examples (mixup, cutmix), which has no bounded per-example contribution.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from secure_cnn.errors import DataError

__all__ = ["Augmentation"]


@final
@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A horizontal flip and a shift, drawn anew for every example.

    Called as `augmentation(images, generator)` with float images `[b, channels, height, width]`;
    gives new images of the same shape. All randomness comes from `generator`.

    Args:
        flip: Mirror an image left to right with probability 1/2.
        shift: Move an image by up to this many pixels along each axis, uniformly; what comes in at
            the border is 0. At least 0.

    Raises:
        DataError: `shift` is negative or, on a call, not smaller than the image.

    Example:
        >>> images = torch.rand(4, 1, 8, 8)
        >>> Augmentation(shift=2)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 8, 8])
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise DataError(f"shift: expected at least 0 pixels, got {self.shift}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """New images, each changed by draws of its own from `generator`."""
        if self.flip:
            images = _flipped(images, generator)
        return _shifted(images, self.shift, generator) if self.shift else images.clone()


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, by a coin of its own."""
    coins = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(coins.to(images.device)[:, None, None, None], images.flip(-1), images)


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image cut at a place of its own out of itself with a border of zeros."""
    count, _, height, width = images.shape
    if shift >= min(height, width):
        raise DataError(f"shift: expected less than the image's {height}x{width}, got {shift}")
    corner = torch.randint(
        2 * shift + 1, (2, count, 1), generator=generator, device=generator.device
    ).to(images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    example = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (shift, shift, shift, shift))
    cut = padded[example, :, rows[:, :, None], columns[:, None, :]]  # [b, height, width, channels]
    return cut.permute(0, 3, 1, 2).contiguous()
