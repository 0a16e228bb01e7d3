"""NegGrad+: down the loss of who stays and up the loss of who leaves, in one step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.heuristic import Descent
from privacy.unlearning.heuristics.learner import Learner

__all__ = ["NegGradPlus"]


@final
@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Descent):
    """Steps on alpha * loss of who stays - (1 - alpha) * loss of who leaves.

    No guarantee. The loss of who leaves has no upper end, so that without a bound the weights run
    away; here each step's gradient is clipped, and a model that diverged all the same is an error.
    Too many steps make people stand out by being answered worse than strangers (over-unlearning).

    Source: Kurmanji et al. 2023, arXiv 2302.09880, as a baseline, and its published code
    (github.com/meghdadk/SCRUB). Defaults: alpha as there; 5 epochs of rate 0.01 and the clipping
    norm are ours.

    Attributes:
        alpha: Weight of who stays, in (0, 1).
        gradient_norm: L2 norm to which each step's gradient is clipped, > 0.
        forget_batch_size: Examples of who leaves in a step, at least 1; they are gone through as
            often as it takes.
        epochs: How often who stays is gone through, at least 1.
        learning_rate: > 0.

    Raises:
        UnlearningError: A setting is out of its range.

    Example:
        >>> NegGradPlus(alpha=1.5)
        Traceback (most recent call last):
        privacy.errors.UnlearningError: alpha: expected a number in (0, 1), got 1.5
    """

    epochs: int = 5
    learning_rate: float = 0.01
    alpha: float = 0.95
    gradient_norm: float = 1.0
    forget_batch_size: int = 256

    def _check(self) -> None:
        super()._check()
        rows.within("alpha", self.alpha, "a number in (0, 1)", lambda x: 0 < x < 1)
        rows.positive("gradient_norm", self.gradient_norm)
        rows.whole("forget_batch_size", self.forget_batch_size, least=1)

    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        self._descend(learner)
        leaving = _endless(forget, self.forget_batch_size, learner.generator)
        for _ in range(self.epochs):
            for images, labels in retain.batches(self.batch_size, learner.generator):
                kept = learner.loss(images, labels)
                left = learner.loss(*next(leaving))
                loss = self.alpha * kept - (1 - self.alpha) * left
                learner.step(loss, gradient_norm=self.gradient_norm)


def _endless(
    examples: Examples, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from examples.batches(size, generator)
