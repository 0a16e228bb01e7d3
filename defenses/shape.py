"""What shape images have: any data that is channels of positions on one to three axes.

Photographs are [n, channels, height, width], recordings [n, channels, length], volumes
[n, channels, depth, height, width]; all are called images here.
"""

from typing import Any

from torch import Tensor

__all__ = ["SHAPES", "beside", "in_lines", "is_batch"]

SHAPES = (
    "[n, channels, height, width], or [n, channels, length] of recordings and "
    "[n, channels, depth, height, width] of volumes"
)
"""The shapes of a batch, for a message."""


def is_batch(images: Tensor) -> bool:
    """Whether these are channels of positions on one to three axes, [n, channels, ...]."""
    return 3 <= images.ndim <= 5


def beside(values: Tensor, images: Tensor) -> Tensor:
    """One value an image, [n], as it is multiplied with the pixels, [n, 1, ...]."""
    size: tuple[Any, ...] = (-1, *[1] * (images.ndim - 1))
    return values.view(size)


def in_lines(images: Tensor) -> Tensor:
    """The same pixels on two axes, [n, channels, lines, positions of the last axis].

    A recording is one line, and a volume the slices of its depth below each other.
    """
    return images.unsqueeze(2).flatten(2, -2)
