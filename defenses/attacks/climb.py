"""The climb of Auto-PGD up a loss: what it remembers, how it moves, when it turns back.

In linf and l2 (Croce & Hein 2020, arXiv 2003.01690): momentum, and checkpoints at which a search
that stalls goes back to its best image and halves its step. In l1 (2021, arXiv 2103.01208): a step
moves the pixels of the largest gradients by the same amount, about two thirds as many as the best
image has changed, and is projected onto the ball within the bounds. Three tenths of the steps each
are spent in balls of three and two times the radius; only in the last can an image be won.
An image that is won leaves at once: its verdict is known.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from defenses.attacks.oracle import Oracle
from defenses.shape import beside
from defenses.threat import ThreatModel

__all__ = ["PerRow", "ascend"]

_MOMENTUM = 0.75  # alpha in the paper
_RISING = 0.75  # rho: the share of steps that must rise for the step to stay as long as it is
_TINY = 1e-12
_FEWER = 1.5  # in l1 a step moves so many times fewer pixels than the best image has changed
_SPARSER = 0.95  # of the pixels changed before: then the step is a full one again
_SHORTER = 1.5  # else
_SHORTEST = 0.1  # of the radius
_TINY_L1 = 1e-10

PerRow = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits [n, classes], labels and targets [n] to a loss a row, or to whether it is won."""


@dataclass
class _Climb(ABC):
    """Where a search stands, from its start `point`: a row for each image still searched."""

    clean: Tensor
    labels: Tensor
    targets: Tensor
    point: Tensor
    rows: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    best: Tensor = field(init=False)
    best_gradient: Tensor = field(init=False)
    best_loss: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.clean), device=self.clean.device)
        self.gradient = self.best_gradient = torch.zeros_like(self.point)
        self.loss = self.best_loss = self.clean.new_full((len(self.clean),), -math.inf)
        self.best = self.point

    @abstractmethod
    def move(self, ball: ThreatModel, number: int) -> None:
        """Takes the step of this number, from 1."""

    @abstractmethod
    def judge(self, number: int, steps: int) -> None:
        """After a look: at a checkpoint changes the length of the steps, or goes back."""

    def run(
        self, ball: ThreatModel, oracle: Oracle, loss: PerRow, won: PerRow, steps: int
    ) -> tuple[Tensor, Tensor]:
        """All steps in one ball: the images that they give, and which are won."""
        found = self.point.clone()
        over = torch.zeros(len(found), dtype=torch.bool, device=found.device)
        for number in range(steps + 1):
            if number > 0:
                self.move(ball, number)
            self.leave(won(self.look(oracle, loss), self.labels, self.targets), found, over)
            if len(self.rows) == 0:
                break
            self.judge(number, steps)
        found[self.rows] = self.best
        return found, over

    def leave(self, won: Tensor, found: Tensor, over: Tensor) -> None:
        """Writes the points that are won into `found`, marks them in `over`, and drops them."""
        if not won.any():
            return
        found[self.rows[won]], over[self.rows[won]] = self.point[won], True
        # Each field has one row an image: all drop the same rows, so that they stay aligned.
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[~won])

    def look(self, oracle: Oracle, loss: PerRow) -> Tensor:
        """Takes loss and gradient at the point, remembers the best; returns the logits."""
        logits, self.loss, self.gradient = oracle.gradient(
            self.point, lambda logits: loss(logits, self.labels, self.targets)
        )
        # A weight of 0 or 1 selects exactly: no index that waits for the device, no slow mask.
        better = beside((self.loss > self.best_loss).to(self.best.dtype), self.best)
        self.best = self.best.lerp(self.point, better)
        self.best_gradient = self.best_gradient.lerp(self.gradient, better)
        self.best_loss = torch.maximum(self.best_loss, self.loss)
        return logits

    def go_back(self, which: Tensor) -> None:
        back = beside(which, self.best)
        self.point = torch.where(back, self.best, self.point)
        self.gradient = torch.where(back, self.best_gradient, self.gradient)


def ascend(
    oracle: Oracle,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    loss: PerRow,
    won: PerRow,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One search from one random start, drawn from torch's global generator; in l1 in three balls.

    Returns the first image that is won, else the one of highest loss, and which are won, [n].
    """
    if threat.norm != "l1":
        climb = _DenseClimb(clean, labels, targets, _random_start(clean, threat))
        return climb.run(threat, oracle, loss, won, steps)
    point = clean + threat.width * torch.randn_like(clean)
    wide = 3 * steps // 10
    for factor in (3, 2):
        ball = replace(threat, eps=factor * threat.eps)
        sparse = _SparseClimb(clean, labels, targets, ball.project(clean, point))
        point, _ = sparse.run(ball, oracle, loss, _never, wide)
    sparse = _SparseClimb(clean, labels, targets, threat.project(clean, point))
    return sparse.run(threat, oracle, loss, won, steps - 2 * wide)


def _never(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Nothing is won in a larger ball."""
    return torch.zeros_like(labels, dtype=torch.bool)


@dataclass
class _DenseClimb(_Climb):
    previous: Tensor = field(init=False)
    step: Tensor = field(init=False)  # in eps
    rises: Tensor = field(init=False)  # since the last checkpoint
    marked_loss: Tensor = field(init=False)  # the best at the last checkpoint
    halved: Tensor = field(init=False)  # at the last checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        self.previous, self.marked_loss = self.point, self.best_loss
        self.step, self.rises = torch.full_like(self.loss, 2.0), torch.zeros_like(self.loss)
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)

    def look(self, oracle: Oracle, loss: PerRow) -> Tensor:
        before = self.loss
        logits = super().look(oracle, loss)
        self.rises = self.rises + (self.loss > before)
        return logits

    def move(self, ball: ThreatModel, number: int) -> None:
        """One step up the gradient, mixed with the last step from the second on."""
        momentum = 1.0 if number == 1 else _MOMENTUM
        length = beside(self.step * ball.eps, self.point)
        linf = ball.norm == "linf"
        direction = self.gradient.sign() if linf else _of_length_one(self.gradient, 2)
        ahead = ball.project(self.clean, self.point + length * direction)
        inertia = (1 - momentum) * (self.point - self.previous)
        mixed = self.point + momentum * (ahead - self.point) + inertia
        self.previous, self.point = self.point, ball.project(self.clean, mixed)

    def judge(self, number: int, steps: int) -> None:
        if number == 0:
            self.mark()
        elif number in (periods := _periods(steps)):
            self.check(periods[number])

    def mark(self) -> None:
        self.marked_loss, self.rises = self.best_loss, torch.zeros_like(self.rises)

    def check(self, steps: int) -> None:
        """After so many steps: where the search stalls, half the step from the best point."""
        stalled = ~self.halved & (self.marked_loss >= self.best_loss)
        self.halved = (self.rises <= _RISING * steps) | stalled
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.go_back(self.halved)
        self.mark()


@functools.cache
def _periods(steps: int) -> Mapping[int, int]:
    """The checkpoints, and how many steps each comes after the one before."""
    period, number, found = max(int(0.22 * steps), 1), 0, {}
    while (number := number + period) <= steps:
        found[number] = period
        period = max(period - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return found


def _random_start(clean: Tensor, threat: ThreatModel) -> Tensor:
    """A random direction from the clean images to the surface of the ball, within the bounds."""
    if threat.norm == "linf":
        direction = _of_length_one(torch.empty_like(clean).uniform_(-1, 1), math.inf)
    else:
        direction = _of_length_one(torch.randn_like(clean), 2)
    return (clean + threat.eps * direction).clamp(*threat.bounds)


def _of_length_one(direction: Tensor, order: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(direction.flatten(1), ord=order, dim=1)
    return direction / beside(length + _TINY, direction)


@dataclass
class _SparseClimb(_Climb):
    step: Tensor = field(init=False)  # in radii
    changed: Tensor = field(init=False)  # pixels of the best image, at the last checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step = torch.ones_like(self.loss)
        self.changed = self._count()

    def move(self, ball: ThreatModel, number: int) -> None:
        """The pixels of the largest gradients by the same amount, back into ball and bounds."""
        sizes = self.gradient.flatten(1).abs()
        pixels = sizes.shape[1]
        moved = (self.changed / _FEWER).ceil().clamp(1, pixels).long()
        smallest = sizes.sort(dim=1, descending=True).values.gather(1, moved[:, None] - 1)
        signs = self.gradient.flatten(1).sign() * (sizes >= smallest)
        lengths = self.step * ball.eps / (signs.abs().sum(1) + _TINY_L1)
        change = (signs * lengths[:, None]).view_as(self.point)
        self.point = ball.project(self.clean, self.point + change)

    def judge(self, number: int, steps: int) -> None:
        if number > 0 and number % max(int(0.04 * steps), 1) == 0:
            self.check()

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
