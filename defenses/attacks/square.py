"""Square attack: random search with squares, without any gradient (Andriushchenko et al. 2020).

After arXiv 1912.00049, and 2103.01208 for l1: a change of one square is kept when it lowers the
margin of the label; the squares shrink as the search goes on. What is proposed, in linf with
squares and in l2 and l1 with bumps (`square_bumps`), is apart from what is kept.

Nearly every proposal is refused. So where few images stand, the model is asked about several
proposals for each at once, and the first that is kept makes void those after it: they are drawn
anew, and count once. Nothing is asked where the proposal leaves an image as it is (the query
counts).

Deliberately not here: non-square windows; an image that is not square is searched with squares
up to its shorter side.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor, nn

from defenses.attacks.oracle import Oracle, until_fooled
from defenses.attacks.settings import Setting, settled
from defenses.attacks.shortest import margin
from defenses.attacks.square_bumps import Bumps
from defenses.threat import ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = ["search", "settle", "square_share"]

_FARTHEST = 32  # queries ahead; about one in fifty is kept


def settle(threat: ThreatModel, given: Mapping[str, Setting]) -> tuple[dict[str, Setting], float]:
    """Square's settings, the standard's unless given, and its reach.

    `largest_share` (p_init) is the share of the pixels in the first squares.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
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
    """
    classes, targeted = (labels, False) if targets is None else (targets, True)
    oracle = Oracle(model, images, torch.maximum(labels, classes), draws=attack.draws)
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    chase = _Search(oracle, attack, targeted=targeted)

    def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        return chase.run(clean[rows], aim)

    standing = ~chase.won(oracle.logits(clean), classes)
    aims = classes[:, None].expand(-1, int(attack.settings["restarts"]))
    return until_fooled(clean, standing, aims, run, at_once=oracle.at_once)


def square_share(query: int, largest: float) -> float:
    """The share of the pixels in the square of a query: the paper's schedule, not rescaled."""
    halvings = sum(query > bound for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return float(largest / 2**halvings)


_Proposed = tuple[Tensor, Tensor, Tensor]
"""How far ahead, [m], for which row, [m], and the changed image, [m, ...]; the nearest first."""


class _Proposals(Protocol):
    """What is tried next; made for the images of one run."""

    farthest: int  # how many queries ahead it can be asked for

    def start(self) -> Tensor:
        """Where the search begins, [n, ...]."""

    def propose(self, best: Tensor, rows: Tensor, query: Tensor) -> _Proposed:
        """What the queries, [ahead, k], change in the best images of the rows, [k, ...]."""


class _Search:
    """One search, the same for every run."""

    def __init__(self, oracle: Oracle, attack: "Attack", *, targeted: bool) -> None:
        threat, settings = attack.threat, attack.settings
        self._oracle, self._threat, self._targeted = oracle, threat, targeted
        self._queries = int(settings["queries"])
        self._largest_share = float(settings["largest_share"])

    def won(self, logits: Tensor, aim: Tensor) -> Tensor:
        """Which rows of logits end the search."""
        return (logits.argmax(1) == aim) == self._targeted

    def run(self, clean: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """From one random start: the images it gives, and which of them won."""
        proposals = self._proposals(clean)
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

    def _proposals(self, clean: Tensor) -> _Proposals:
        """Those of the norm."""
        sides = [self._side(query, clean) for query in range(self._queries)]
        kind = _Squares if self._threat.norm == "linf" else Bumps
        return kind(clean, self._threat, torch.tensor(sides, device=clean.device))

    def _side(self, query: int, images: Tensor) -> int:
        """Of the square of a query, in pixels; odd in l2 and l1, so that it has a centre."""
        height, width = images.shape[2:]
        pixels = square_share(query, self._largest_share) * height * width
        side = max(round(math.sqrt(pixels)), 1)
        if self._threat.norm != "linf":
            side = max(side, 3) | 1
        return min(side, height, width)


@final
class _Squares:
    """In linf: squares that are all plus or all minus eps a channel."""

    farthest = _FARTHEST

    def __init__(self, clean: Tensor, threat: ThreatModel, sides: Tensor) -> None:
        self._clean, self._threat, self._sides = clean.contiguous(), threat, sides

    def start(self) -> Tensor:
        """Vertical stripes."""
        return self._pushed(self._clean, torch.rand_like(self._clean[:, :, :1, :]))

    def propose(self, best: Tensor, rows: Tensor, query: Tensor) -> _Proposed:
        """A square anywhere for each; not where it changes nothing or is beyond the last query."""
        channels, height, width = best.shape[1:]
        drawn = self._drawn(rows, query, 2 + channels)
        side = self._sides[query.clamp_max(len(self._sides) - 1)]
        lines = _covered(drawn[..., 0], side, height) * width
        columns = _covered(drawn[..., 1], side, width)
        places = (lines[..., None] + columns[..., None, :]).flatten(2)[:, :, None]
        own = torch.arange(len(rows), device=rows.device)[:, None, None]
        channel = torch.arange(channels, device=rows.device)[:, None]
        clean = self._clean.flatten(2)[rows[:, None, None], channel, places]
        pushed = self._pushed(clean, drawn[..., 2:, None])
        differs = pushed != best.flatten(2)[own, channel, places]
        changes = differs.flatten(2).any(2) & (query < len(self._sides))
        step, row = changes.nonzero().unbind(1)
        trial = best[row].flatten(2)
        trial.scatter_(2, places.expand_as(pushed)[step, row], pushed[step, row])
        return step, row, trial.view(-1, channels, height, width)

    def _drawn(self, rows: Tensor, query: Tensor, numbers: int) -> Tensor:
        """For each row and query, from [0, 1)."""
        return torch.rand(*query.shape, numbers, device=query.device)

    def _pushed(self, pixels: Tensor, share: Tensor) -> Tensor:
        """Up where the share is under a half, else down."""
        signs = (share < 0.5).to(pixels.dtype) * 2 - 1
        return (pixels + self._threat.eps * signs).clamp(*self._threat.bounds)


def _covered(share: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` places a window covers that begins at a share of the room it has.

    As many as the largest side: a smaller window covers its last place again.
    """
    room = size - side
    first = torch.minimum((share * (room + 1)).long(), room)
    further = torch.arange(int(side.max()), device=side.device)
    return first[..., None] + torch.minimum(further, side[..., None] - 1)
