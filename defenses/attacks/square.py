"""Square attack: random search with squares, without any gradient (Andriushchenko et al. 2020).

After arXiv 1912.00049, and 2103.01208 for l1: a change of one square, in l2 and l1 of a bump, is
kept when it lowers the margin of the label; the squares, up to an image's shorter side, shrink.
On recordings and volumes they are segments and cubes of the same share of the positions.

Nearly every proposal is refused. So where few images stand, the model is asked about several
proposals for each at once, and the first that is kept makes void those after it: they are drawn
anew, and count once. Nothing is asked where the proposal changes nothing (the query counts).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.oracle import Oracle, margin, until_fooled, widened
from defenses.shape import in_lines
from defenses.threat import Norm, ThreatModel

__all__ = ["Square", "square_share"]

_FARTHEST = 32  # queries ahead; about one in fifty is kept
_TINY = 1e-12
_ORDER: Mapping[Norm, int] = {"l2": 2, "l1": 1}
_STEEPNESS: Mapping[int, int] = {2: 2, 1: 4}  # of a bump, by the order of the norm


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Square(Attack):
    """Square: by the logits alone, so that no masked gradient leads it astray.

    The first image that fooled the model, else the one of lowest margin in the last restart; where
    the model is wrong already, the clean image.

    Attributes:
        queries: For each image and start.
        largest_share: The share of the positions in the first squares (p_init); segments on data
            of one axis, cubes on data of three.
        restarts: Random starts.

    Example:
        >>> Square(ThreatModel(norm="linf", eps=0.1), queries=100).settings
        {'queries': 100, 'largest_share': 0.8, 'restarts': 1}
    """

    name = "square"
    norms = ("linf", "l2", "l1")
    targeted = True

    queries: int = 5000
    largest_share: float = 0.8
    restarts: int = 1

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        classes, targeted = (labels, False) if targets is None else (targets, True)
        oracle = Oracle(model, images, torch.maximum(labels, classes), draws=self.draws)
        clean = widened(images)
        search = _SquareSearch(oracle, self, targeted=targeted)

        def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
            return search.run(clean[rows], aim)

        standing = ~search.won(oracle.logits(clean), classes)
        aims = classes[:, None].expand(-1, self.restarts)
        return until_fooled(clean, standing, aims, run, at_once=oracle.at_once)


def square_share(query: int, largest: float) -> float:
    """The share of the pixels in the square of a query: the paper's schedule, not rescaled."""
    halvings = sum(query > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return float(largest / 2**halvings)


_Proposed = tuple[Tensor, Tensor, Tensor]
"""How many queries ahead, [m], for which row, [m], and the changed image, [m, ...], in order."""


class _SquareSearch:
    def __init__(self, oracle: Oracle, attack: Square, *, targeted: bool) -> None:
        self._oracle, self._threat, self._targeted = oracle, attack.threat, targeted
        self._queries, self._largest_share = attack.queries, attack.largest_share

    def won(self, logits: Tensor, aim: Tensor) -> Tensor:
        return (logits.argmax(1) == aim) == self._targeted

    def run(self, clean: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """From one random start: the images it gives, and which of them won."""
        sides = [self._side(query, clean) for query in range(self._queries)]
        kind = _Squares if self._threat.norm == "linf" else _Bumps
        proposals = kind(clean, self._threat, torch.tensor(sides, device=clean.device))
        best = proposals.start()
        loss, over = self._ask(best, aim)
        found, rows = best.clone(), (~over).nonzero().flatten()
        best, loss, asked = best[rows], loss[rows], torch.zeros_like(rows)
        while len(rows) > 0:
            # Rounded up: up to twice as many images, which without a graph take no more memory.
            ahead = min(-(-self._oracle.at_once // len(rows)), proposals.farthest)
            query = asked + torch.arange(ahead, device=rows.device)[:, None]
            step, row, trial = proposals.propose(best, rows, query)
            margins, wins = self._ask(trial, aim[rows[row]])
            better = (wins | (margins < loss[row])).nonzero().flatten()
            first = torch.full_like(rows, len(trial))
            first.scatter_reduce_(0, row[better], better, "amin")
            kept = (first < len(trial)).nonzero().flatten()
            first = first[kept]
            best[kept], loss[kept], over[rows[kept]] = trial[first], margins[first], wins[first]
            asked += ahead
            asked[kept] += step[first] + 1 - ahead
            leaving = over[rows] | (asked >= self._queries)
            if leaving.any():
                found[rows[leaving]] = best[leaving]
                rows, best, loss, asked = (each[~leaving] for each in (rows, best, loss, asked))
        return found, over

    def _ask(self, images: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """The margins that are left, and what has won, [n] each; n may be 0."""
        if len(images) == 0:
            return images.new_zeros(0), torch.zeros_like(aim, dtype=torch.bool)
        logits = self._oracle.logits(images)
        return margin(logits, aim, targeted=self._targeted), self.won(logits, aim)

    def _side(self, query: int, images: Tensor) -> int:
        """Of the square of a query, in pixels; odd in l2 and l1, so that it has a centre."""
        sizes = images.shape[2:]
        positions = square_share(query, self._largest_share) * math.prod(sizes)
        side = max(round(math.pow(positions, 1 / len(sizes))), 1)
        if self._threat.norm != "linf":
            side = max(side, 3) | 1
        return int(min(side, *sizes))


@final
class _Squares:
    """In linf: squares that are all plus or all minus eps a channel."""

    farthest = _FARTHEST  # how many queries ahead it can be asked for

    def __init__(self, clean: Tensor, threat: ThreatModel, sides: Tensor) -> None:
        self._clean, self._threat, self._sides = clean.contiguous(), threat, sides

    def start(self) -> Tensor:
        """Stripes as wide as a position of the last axis."""
        along = in_lines(self._clean)
        stripes = torch.rand_like(along[:, :, :1])
        return self._pushed(along, stripes).view_as(self._clean)

    def propose(self, best: Tensor, rows: Tensor, query: Tensor) -> _Proposed:
        """For each query, [ahead, k], a square anywhere in the best images of the rows, [k, ...].

        None where it changes nothing, or beyond the last query.
        """
        channels, sizes = best.shape[1], best.shape[2:]
        drawn = self._drawn(rows, query, len(sizes) + channels)
        side = self._sides[query.clamp_max(len(self._sides) - 1)]
        places = _places(drawn[..., : len(sizes)], side, sizes)[:, :, None]
        own = torch.arange(len(rows), device=rows.device)[:, None, None]
        channel = torch.arange(channels, device=rows.device)[:, None]
        clean = self._clean.flatten(2)[rows[:, None, None], channel, places]
        pushed = self._pushed(clean, drawn[..., len(sizes) :, None])
        differs = pushed != best.flatten(2)[own, channel, places]
        changes = differs.flatten(2).any(2) & (query < len(self._sides))
        step, row = changes.nonzero().unbind(1)
        trial = best[row].flatten(2)
        trial.scatter_(2, places.expand_as(pushed)[step, row], pushed[step, row])
        return step, row, trial.view(-1, channels, *sizes)

    def _drawn(self, rows: Tensor, query: Tensor, numbers: int) -> Tensor:
        """For each row and query, from [0, 1)."""
        return torch.rand(*query.shape, numbers, device=query.device)

    def _pushed(self, pixels: Tensor, share: Tensor) -> Tensor:
        """Up where the share is under a half, else down."""
        signs = (share < 0.5).to(pixels.dtype) * 2 - 1
        return (pixels + self._threat.eps * signs).clamp(*self._threat.bounds)


def _places(shares: Tensor, side: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which positions, counted through all axes, windows cover that begin at shares [..., axes]."""
    places = _covered(shares[..., 0], side, sizes[0])
    for axis, size in enumerate(sizes[1:], 1):
        lines = places[..., None] * size
        places = (lines + _covered(shares[..., axis], side, size)[..., None, :]).flatten(-2)
    return places


def _covered(share: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` places a window covers that begins at a share of the room it has.

    As many as the largest side: a smaller window covers its last place again.
    """
    room = size - side
    first = torch.minimum((share * (room + 1)).long(), room)
    further = torch.arange(int(side.max()), device=side.device)
    return first[..., None] + torch.minimum(further, side[..., None] - 1)


@final
class _Bumps:
    """In l2 and l1: bumps, into which goes what two squares of the change had spent.

    After arXiv 1912.00049, algorithm 3. A bump is tried at the same place of every image, so one
    query at a time.
    """

    farthest = 1

    def __init__(self, clean: Tensor, threat: ThreatModel, sides: Tensor) -> None:
        self._clean, self._threat, self._sides = clean, threat, sides
        self._order = _ORDER[threat.norm]

    def start(self) -> Tensor:
        """Five bumps along each axis, with random signs, [n, ...]."""
        clean = self._clean
        sizes = clean.shape[2:]
        tiles = min(5, *sizes)
        side = min(sizes) // tiles
        change = torch.zeros_like(clean)
        margins = [(size - tiles * side) // 2 for size in sizes]
        begins = (range(first, first + tiles * side, side) for first in margins)
        for corner in itertools.product(*begins):
            bump = _bump(side, clean, self._order) * _signs(clean)
            change[_window_at(corner, side)] = bump
        return _on_the_surface(change, clean, self._threat)

    def propose(self, best: Tensor, rows: Tensor, query: Tensor) -> _Proposed:
        """What the changes of the rows spend on two squares, and have left, as a bump."""
        side, order, clean = int(self._sides[query[0, 0]]), self._order, self._clean[rows]
        change = best - clean
        first, second = _window(best, side), _window(best, side)
        spare = self._threat.eps**order - _size(change, 1, order) ** order
        budget = torch.zeros_like(change)
        budget[first], budget[second] = change[first], change[second]
        spent, channels = _size(budget, 2, order) ** order, best.shape[1]
        length = (spent + spare.clamp_min(0) / channels) ** (1 / order)
        bump = _bump(side, best, order) * _signs(best)
        bump = bump + change[first] / (_size(change[first], 2, order) + _TINY)
        change[second] = 0
        bump = bump / (_size(bump, 2, order) + _TINY)
        change[first] = bump * length * (channels if order == 1 else 1)
        row = torch.arange(len(rows), device=rows.device)
        return torch.zeros_like(row), row, _on_the_surface(change, clean, self._threat)


def _signs(like: Tensor) -> Tensor:
    """Of each image and channel, [n, channels, 1, ...]."""
    one = like.flatten(2)[:, :, 0].view(*like.shape[:2], *[1] * (like.ndim - 2))
    return torch.randint_like(one, 2) * 2 - 1


def _window(images: Tensor, side: int) -> tuple[slice, ...]:
    """A square at a random place, the same for all images."""
    corner = [int(torch.randint(size - side + 1, ())) for size in images.shape[2:]]
    return _window_at(corner, side)


def _window_at(corner: Sequence[int], side: int) -> tuple[slice, ...]:
    return slice(None), slice(None), *(slice(first, first + side) for first in corner)


def _on_the_surface(change: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    """The images within the bounds; in l2 the change gets its full length first."""
    if threat.norm == "l1":
        return threat.project(clean, clean + change)
    longest = threat.eps / (_size(change, 1, 2) + _TINY)
    return (clean + change * longest).clamp(*threat.bounds)


def _size(change: Tensor, first: int, order: int) -> Tensor:
    """The length over the dimensions from the first, which are kept."""
    dims = tuple(range(first, change.ndim))
    length: Tensor = torch.linalg.vector_norm(change, ord=order, dim=dims, keepdim=True)
    return length


def _bump(side: int, like: Tensor, order: int) -> Tensor:
    """A positive and a negative hill beside each other on a random axis, of length 1."""
    axes, half = like.ndim - 2, side // 2
    rest = [side] * (axes - 1)
    bump = torch.cat([_hill([half, *rest], order), -_hill([side - half, *rest], order)])
    bump = bump.transpose(0, int(torch.rand(()) * axes))
    return _scaled(bump, order).to(like)


def _hill(sizes: Sequence[int], order: int) -> Tensor:
    """Falls off in square rings around its centre (equation 2 of the paper), of length 1."""
    rings = max(sizes) // 2 + 1
    steps = 1 / torch.arange(rings, 0, -1, dtype=torch.float64) ** _STEEPNESS[order]
    by_ring = steps.cumsum(0).flip(0)
    far = [(torch.arange(size) - size // 2).abs() for size in sizes]
    ring = torch.stack(torch.meshgrid(*far, indexing="ij")).amax(0)
    return _scaled(by_ring[ring], order)


def _scaled(pattern: Tensor, order: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(pattern, ord=order)
    return pattern / length.clamp_min(_TINY)
