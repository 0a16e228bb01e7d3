"""What Square tries in l2 and l1: bumps, into which goes what two squares of the change had spent.

After arXiv 1912.00049, algorithm 3, and 2103.01208 for l1.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from defenses.threat import Norm, ThreatModel

__all__ = ["Bumps"]

_TINY = 1e-12
_ORDER: Mapping[Norm, int] = {"l2": 2, "l1": 1}
_STEEPNESS: Mapping[int, int] = {2: 2, 1: 4}  # of a bump, by the order of the norm


@final
class Bumps:
    """A bump is tried at the same place of every image: one query at a time.

    Args:
        clean: Images in the bounds, [n, channels, height, width].
        threat: In `l2` or `l1`.
        sides: Of the squares of each query, in pixels, [queries].
    """

    farthest = 1

    def __init__(self, clean: Tensor, threat: ThreatModel, sides: Tensor) -> None:
        self._clean, self._threat, self._sides = clean, threat, sides
        self._order = _ORDER[threat.norm]

    def start(self) -> Tensor:
        """Five by five bumps with random signs, [n, ...]."""
        clean = self._clean
        height, width = clean.shape[2:]
        tiles = min(5, height, width)
        side = min(height, width) // tiles
        change = torch.zeros_like(clean)
        top, left = (height - tiles * side) // 2, (width - tiles * side) // 2
        for row in range(top, top + tiles * side, side):
            for column in range(left, left + tiles * side, side):
                bump = _bump(side, clean, self._order) * _signs(clean)
                change[:, :, row : row + side, column : column + side] = bump
        return _on_the_surface(change, clean, self._threat)

    def propose(self, best: Tensor, rows: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the changes of the rows spend on two squares, and have left, as a bump.

        Args:
            best: What is to be changed, [k, ...].
            rows: Which images those are, int64, [k].
            query: Its number, the same for all, [1, k].

        Returns:
            How far ahead, 0 for each, and of which row, int64, [k] each; and the images, in the
            ball and the bounds, [k, ...].
        """
        side, order, clean = int(self._sides[query[0, 0]]), self._order, self._clean[rows]
        change = best - clean
        first, second = _window(best, side), _window(best, side)
        spare = self._threat.eps**order - _size(change, (1, 2, 3), order) ** order
        budget = torch.zeros_like(change)
        budget[first], budget[second] = change[first], change[second]
        spent, channels = _size(budget, (2, 3), order) ** order, best.shape[1]
        length = (spent + spare.clamp_min(0) / channels) ** (1 / order)
        bump = _bump(side, best, order) * _signs(best)
        bump = bump + change[first] / (_size(change[first], (2, 3), order) + _TINY)
        change[second] = 0
        bump = bump / (_size(bump, (2, 3), order) + _TINY)
        change[first] = bump * length * (channels if order == 1 else 1)
        row = torch.arange(len(rows), device=rows.device)
        return torch.zeros_like(row), row, _on_the_surface(change, clean, self._threat)


def _signs(like: Tensor) -> Tensor:
    """Of each image and channel, [n, channels, 1, 1]."""
    return torch.randint_like(like[:, :, :1, :1], 2) * 2 - 1


def _window(images: Tensor, side: int) -> tuple[slice, ...]:
    """A square at a random place, the same for all images."""
    top, left = (int(torch.randint(size - side + 1, ())) for size in images.shape[2:])
    every = slice(None)
    return every, every, slice(top, top + side), slice(left, left + side)


def _on_the_surface(change: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    """The images within the bounds; in l2 the change gets its full length first."""
    if threat.norm == "l1":
        return threat.project(clean, clean + change)
    longest = threat.eps / (_size(change, (1, 2, 3), 2) + _TINY)
    return (clean + change * longest).clamp(*threat.bounds)


def _size(change: Tensor, dims: tuple[int, ...], order: int) -> Tensor:
    """The length over some dimensions, which are kept."""
    length: Tensor = torch.linalg.vector_norm(change, ord=order, dim=dims, keepdim=True)
    return length


def _bump(side: int, like: Tensor, order: int) -> Tensor:
    """A positive and a negative hill beside or above each other, of length 1, [side, side]."""
    top = side // 2
    bump = torch.cat([_hill(top, side, order), -_hill(side - top, side, order)])
    bump = bump if float(torch.rand(())) < 0.5 else bump.T
    return _scaled(bump, order).to(like)


def _hill(height: int, width: int, order: int) -> Tensor:
    """Falls off in square rings around its centre (equation 2 of the paper), of length 1."""
    rings = max(height, width) // 2 + 1
    steps = 1 / torch.arange(rings, 0, -1, dtype=torch.float64) ** _STEEPNESS[order]
    by_ring = steps.cumsum(0).flip(0)
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return _scaled(by_ring[torch.maximum(rows[:, None], columns[None, :])], order)


def _scaled(pattern: Tensor, order: int) -> Tensor:
    """To length 1; what is empty stays so."""
    length: Tensor = torch.linalg.vector_norm(pattern, ord=order)
    return pattern / length.clamp_min(_TINY)
