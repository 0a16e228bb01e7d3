"""First filters that nobody's data has shaped: the cosines of a 3x3 patch, with both signs.

The eigenvectors of small patches of ordinary images are close to these, so that a network need not
learn them, nor whiten its images by training images, as airbench's does (Jordan, 2024,
arXiv:2404.00498). Being formulas they cost no privacy and take no part in the backward pass.
"""

from itertools import product
from math import cos, hypot, pi
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Cosines"]

_SIDE = 3
_KEPT = 8  # of the nine cosines; the finest one is left out


@final
class Cosines(nn.Module):
    """Images `[n, c, height, width]` to 16 maps a channel, `[n, 16 c, height, width]`.

    Guarantee: each channel is filtered by the eight cosines of lowest frequency, and by their
    negatives, with zeros around the image. Fine ones are made larger as they are rarer in images.
    There is no parameter, and a state dict holds nothing of it.

    Args:
        channels: Of the images.

    Example:
        >>> maps = Cosines(1)(torch.rand(2, 1, 28, 28))
        >>> maps.shape, torch.equal(maps[:, :8], -maps[:, 8:])
        (torch.Size([2, 16, 28, 28]), True)
    """

    filters: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        filters = torch.empty(2 * _KEPT * channels, 1, _SIDE, _SIDE)
        self.register_buffer("filters", filters, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Write the filters by their formulas, in place; after `to_empty` they hold anything."""
        ordered = sorted(product(range(_SIDE), repeat=2), key=lambda each: hypot(*each))
        kept = torch.tensor([_filter(down, right) for down, right in ordered[:_KEPT]])
        both = torch.cat([kept, -kept]).unsqueeze(1)
        self.filters.copy_(both.repeat(self.channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The maps of `images`, which have the channels that this was made for."""
        return F.conv2d(images, self.filters, padding=_SIDE // 2, groups=self.channels)

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"{self.channels}, {len(self.filters)}, side={_SIDE}"


def _filter(down: int, right: int) -> list[list[float]]:
    """The product of two cosines of these frequencies, of norm (1 + 2 |frequency|) / 2."""
    rows, columns = _wave(down), _wave(right)
    size = 0.5 + hypot(down, right)
    return [[size * row * column for column in columns] for row in rows]


def _wave(frequency: int) -> list[float]:
    """A cosine of norm 1 at the middles of the pixels."""
    values = [cos(pi * frequency * (pixel + 0.5) / _SIDE) for pixel in range(_SIDE)]
    return [value / hypot(*values) for value in values]
