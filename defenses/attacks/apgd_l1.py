"""Auto-PGD in l1: sparse steps, from larger balls into the one that counts (Croce & Hein 2021).

After arXiv 2103.01208: a step moves the pixels of the largest gradients by the same amount, about
two thirds as many as the best image has changed; the projection is onto the ball within the bounds.
Three tenths of the steps each are spent in balls of three and two times the radius. Only in the
last ball an image can be won, and leaves at once.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from defenses.attacks.climb import Climb, PerRow
from defenses.attacks.oracle import Oracle
from defenses.threat import ThreatModel

__all__ = ["ascend_sparsely"]

_FEWER = 1.5  # than the best image has changed are moved by a step
_SPARSER = 0.95  # of the pixels changed before: then the step is a full one again
_SHORTER = 1.5  # else
_SHORTEST = 0.1  # of the radius
_TINY = 1e-10


def ascend_sparsely(
    oracle: Oracle,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    loss: PerRow,
    won: PerRow,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One search from one random start, drawn from torch's global generator.

    Args:
        clean: Images in the bounds, [n, channels, height, width].
        labels: The true classes, int64, [n].
        targets: Classes to seek, int64, [n].
        threat: In l1.
        steps: In all three balls together, at least 1.

    Returns:
        The first image in the ball that is won, else the one of highest loss there, [n, ...]; and
        which are won, [n].
    """
    point = clean + threat.width * torch.randn_like(clean)
    wide = 3 * steps // 10
    for factor in (3, 2):
        ball = replace(threat, eps=factor * threat.eps)
        climb = _SparseClimb(clean, labels, targets, ball.project(clean, point))
        point, _ = _ascend_in(ball, oracle, climb, loss, _never, wide)
    climb = _SparseClimb(clean, labels, targets, threat.project(clean, point))
    return _ascend_in(threat, oracle, climb, loss, won, steps - 2 * wide)


def _never(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Nothing is won in a larger ball."""
    return torch.zeros_like(labels, dtype=torch.bool)


def _ascend_in(
    ball: ThreatModel, oracle: Oracle, climb: "_SparseClimb", loss: PerRow, won: PerRow, steps: int
) -> tuple[Tensor, Tensor]:
    """All steps in one ball: the images that they give, and which are won."""
    found = climb.point.clone()
    over = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    period = max(int(0.04 * steps), 1)
    for step in range(steps + 1):
        if step > 0:
            climb.move(ball)
        climb.leave(won(climb.look(oracle, loss), climb.labels, climb.targets), found, over)
        if len(climb.rows) == 0:
            break
        if step > 0 and step % period == 0:
            climb.check()
    found[climb.rows] = climb.best
    return found, over


@dataclass
class _SparseClimb(Climb):
    """A search within one ball."""

    step: Tensor = field(init=False)  # in radii
    changed: Tensor = field(init=False)  # pixels of the best image, at the last checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step = torch.ones_like(self.loss)
        self.changed = self._count()

    def move(self, ball: ThreatModel) -> None:
        """The pixels of the largest gradients by the same amount, back into ball and bounds."""
        sizes = self.gradient.flatten(1).abs()
        pixels = sizes.shape[1]
        moved = (self.changed / _FEWER).ceil().clamp(1, pixels).long()
        smallest = sizes.sort(dim=1, descending=True).values.gather(1, moved[:, None] - 1)
        signs = self.gradient.flatten(1).sign() * (sizes >= smallest)
        lengths = self.step * ball.eps / (signs.abs().sum(1) + _TINY)
        change = (signs * lengths[:, None]).view_as(self.point)
        self.point = ball.project(self.clean, self.point + change)

    def check(self) -> None:
        """Where the best image has become sparser: a full step from there; else a shorter one."""
        count = self._count()
        sparser = count < _SPARSER * self.changed
        shorter = (self.step / _SHORTER).clamp_min(_SHORTEST)
        self.step = torch.where(sparser, 1.0, shorter)
        self.changed = count
        self.go_back(sparser)

    def _count(self) -> Tensor:
        """How many pixels the best image has changed, [n]."""
        return (self.best != self.clean).flatten(1).sum(1).to(self.loss.dtype)
