"""Square attack: random search with squares, without any gradient (Andriushchenko et al. 2020).

After arXiv 1912.00049, and 2103.01208 for l1: a change of one square is kept when it lowers the
margin of the label; the squares shrink as the search goes on. Nothing is asked twice: where the
proposal leaves an image as it is, its margin is known and the model is not asked (the query
counts).

Deliberately not here: non-square windows; an image that is not square is searched with squares
up to its shorter side.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from defenses.attacks.oracle import Oracle, until_fooled
from defenses.attacks.settings import Setting, settled
from defenses.attacks.shortest import margin
from defenses.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = ["search", "settle", "square_share"]

_TINY = 1e-12
_ORDER: Mapping[Norm, int] = {"l2": 2, "l1": 1}
_STEEPNESS: Mapping[int, int] = {2: 2, 1: 4}  # of a bump, by the order of the norm


def settle(threat: ThreatModel, given: Mapping[str, Setting]) -> tuple[dict[str, Setting], float]:
    """Square's settings, the standard's unless given, and its reach.

    `largest_share` (p_init) is the share of the pixels in the first squares.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.

    Example:
        >>> settle(ThreatModel(norm="linf", eps=0.1), {"queries": 1000})
        ({'queries': 1000, 'largest_share': 0.8, 'restarts': 1}, 0.1)
    """
    defaults: dict[str, Setting] = {"queries": 5000, "largest_share": 0.8, "restarts": 1}
    return settled("square", given, defaults), threat.eps


def search(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Searches for images that are misclassified, or taken for their targets, by logits alone.

    To be called within an `attack_scope`.

    Returns:
        The first image that fooled the model, else the one of lowest margin in the last restart,
        in at least float32, [n, ...]. Where the model is wrong already, the clean image.

    Raises:
        AttackError: The model's logits cannot be used.

    Example:
        >>> from defenses.attacks.attack import attack
        >>> square = attack("square", ThreatModel(norm="linf", eps=0.125))
        >>> square(nn.Flatten(), torch.tensor([[[[1.0, 0.9]]]]), torch.tensor([0])).argmax(-1)
        tensor([[[1]]])
    """
    classes, targeted = (labels, False) if targets is None else (targets, True)
    oracle = Oracle(model, images, torch.maximum(labels, classes))
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    chase = _Search(oracle, attack, targeted=targeted)

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        return chase.run(clean[rows], classes[rows])

    standing = ~chase.won(oracle.logits(clean), classes)
    return until_fooled(clean, standing, [run] * int(attack.settings["restarts"]))


def square_share(query: int, largest: float) -> float:
    """The share of the pixels in the square of a query: the paper's schedule, not rescaled.

    Example:
        >>> [square_share(query, 0.8) for query in (0, 11, 4001)]
        [0.8, 0.4, 0.00625]
    """
    halvings = sum(query > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return float(largest / 2**halvings)


class _Search:
    """One search, the same for every run."""

    def __init__(self, oracle: Oracle, attack: "Attack", *, targeted: bool) -> None:
        threat, settings = attack.threat, attack.settings
        self._oracle, self._threat, self._targeted = oracle, threat, targeted
        self._queries = int(settings["queries"])
        self._largest_share = float(settings["largest_share"])
        linf = threat.norm == "linf"  # l1 differs from l2 in how a length is taken
        self._start, self._propose = (_stripes, _one_square) if linf else (_tiles, _two_squares)

    def won(self, logits: Tensor, aim: Tensor) -> Tensor:
        """Which rows of logits end the search."""
        return (logits.argmax(1) == aim) == self._targeted

    def run(self, clean: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """From one random start: the images it gives, and which of them won."""
        best = self._start(clean, self._threat)
        found = best.clone()
        over = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        rows = torch.arange(len(clean), device=clean.device)
        loss = torch.full_like(aim, math.inf, dtype=clean.dtype)
        touched, trial = rows, best
        for query in range(self._queries + 1):
            wins = self._judge(touched, trial, best, loss, aim)
            if wins.any():
                found[rows], over[rows[wins]] = best, True
                rows, best, clean, aim, loss = (
                    each[~wins] for each in (rows, best, clean, aim, loss)
                )
                if len(rows) == 0:
                    break
            touched, trial = self._propose(best, clean, self._threat, self._side(query, best))
        found[rows] = best
        return found, over

    def _judge(
        self, touched: Tensor, trial: Tensor, best: Tensor, loss: Tensor, aim: Tensor
    ) -> Tensor:
        """Takes over, in place, what is better; says which rows have won, of all."""
        wins = torch.zeros(len(best), dtype=torch.bool, device=best.device)
        if len(touched) == 0:
            return wins
        logits, aim = self._oracle.logits(trial), aim[touched]
        resistance, won = margin(logits, aim, targeted=self._targeted), self.won(logits, aim)
        better = (resistance < loss[touched]) | won
        if better.any():
            rows = touched[better]
            loss[rows], best[rows] = resistance[better], trial[better]
        wins[touched] = won
        return wins

    def _side(self, query: int, images: Tensor) -> int:
        """Of the square of a query, in pixels; odd in l2 and l1, so that it has a centre."""
        height, width = images.shape[2:]
        pixels = square_share(query, self._largest_share) * height * width
        side = max(round(math.sqrt(pixels)), 1)
        if self._threat.norm != "linf":
            side = max(side, 3) | 1
        return min(side, height, width)


def _signs(count: int, like: Tensor) -> Tensor:
    """Of each image and channel, [count, channels, 1, 1]."""
    return torch.randint_like(like[:1, :, :1, :1].expand(count, -1, -1, -1), 2) * 2 - 1


def _window(images: Tensor, side: int) -> tuple[slice, ...]:
    """A square at a random place, the same for all images."""
    top, left = (int(torch.randint(size - side + 1, ())) for size in images.shape[2:])
    every = slice(None)
    return every, every, slice(top, top + side), slice(left, left + side)


def _stripes(clean: Tensor, threat: ThreatModel) -> Tensor:
    """The start in linf: vertical stripes of plus or minus eps."""
    signs = torch.randint_like(clean[:, :, :1, :], 2) * 2 - 1
    return (clean + threat.eps * signs).clamp(*threat.bounds)


def _one_square(
    best: Tensor, clean: Tensor, threat: ThreatModel, side: int
) -> tuple[Tensor, Tensor]:
    """In linf: a square all plus or all minus eps a channel, where that changes anything."""
    window = _window(best, side)
    inside = (clean[window] + threat.eps * _signs(len(best), best)).clamp(*threat.bounds)
    touched = (inside != best[window]).flatten(1).any(1).nonzero().flatten()
    trial = best[touched]
    trial[window] = inside[touched]
    return touched, trial


def _tiles(clean: Tensor, threat: ThreatModel) -> Tensor:
    """The start in l2 and l1: five by five bumps with random signs."""
    height, width = clean.shape[2:]
    tiles = min(5, height, width)
    side = min(height, width) // tiles
    change = torch.zeros_like(clean)
    top, left = (height - tiles * side) // 2, (width - tiles * side) // 2
    for row in range(top, top + tiles * side, side):
        for column in range(left, left + tiles * side, side):
            bump = _bump(side, clean, _ORDER[threat.norm]) * _signs(len(clean), clean)
            change[:, :, row : row + side, column : column + side] = bump
    return _on_the_surface(change, clean, threat)


def _two_squares(
    best: Tensor, clean: Tensor, threat: ThreatModel, side: int
) -> tuple[Tensor, Tensor]:
    """In l2 and l1: what the change spends on two squares, and has left, goes into a bump."""
    order = _ORDER[threat.norm]
    change = best - clean
    first, second = _window(best, side), _window(best, side)
    left = (threat.eps**order - _size(change, (1, 2, 3), order) ** order).clamp_min(0)
    budget = torch.zeros_like(change)
    budget[first], budget[second] = change[first], change[second]
    spent = _size(budget, (2, 3), order) ** order
    channels = best.shape[1]
    length = (spent + left / channels) ** (1 / order) * (channels if order == 1 else 1)
    bump = _bump(side, best, order) * _signs(len(best), best)
    bump = bump + change[first] / (_size(change[first], (2, 3), order) + _TINY)
    change[second] = 0
    change[first] = bump / (_size(bump, (2, 3), order) + _TINY) * length
    return torch.arange(len(best), device=best.device), _on_the_surface(change, clean, threat)


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
