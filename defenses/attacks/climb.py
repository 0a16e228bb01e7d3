"""Where a search up a loss stands: one row for each image that is still searched.

What Auto-PGD remembers in every norm; how it moves and when it turns back is in `apgd` (linf and
l2) and in `apgd_l1`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from defenses.attacks.oracle import Oracle

__all__ = ["Climb", "PerRow"]

PerRow = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits [n, classes], labels and targets [n] to a loss a row, or to whether it is won."""


@dataclass
class Climb:
    """A search at its start, not looked at yet.

    Args:
        clean: Images in the bounds, [n, channels, height, width].
        labels: The true classes, int64, [n].
        targets: Classes to seek, int64, [n].
        point: Where to begin, [n, channels, height, width].
    """

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

    def leave(self, won: Tensor, found: Tensor, over: Tensor) -> None:
        """Writes the points that are won into `found`, marks them in `over`, and drops them."""
        if not won.any():
            return
        found[self.rows[won]], over[self.rows[won]] = self.point[won], True
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[~won])

    def look(self, oracle: Oracle, loss: PerRow) -> Tensor:
        """Takes loss and gradient at the point, remembers the best; returns the logits."""
        logits, self.loss, self.gradient = oracle.gradient(
            self.point, lambda logits: loss(logits, self.labels, self.targets)
        )
        # A weight of 0 or 1 selects exactly: no index that waits for the device, no slow mask.
        better = (self.loss > self.best_loss).to(self.best.dtype).view(-1, 1, 1, 1)
        self.best = self.best.lerp(self.point, better)
        self.best_gradient = self.best_gradient.lerp(self.gradient, better)
        self.best_loss = torch.maximum(self.best_loss, self.loss)
        return logits

    def go_back(self, which: Tensor) -> None:
        """To the best point, where `which` says so."""
        back = which.view(-1, 1, 1, 1)
        self.point = torch.where(back, self.best, self.point)
        self.gradient = torch.where(back, self.best_gradient, self.gradient)
