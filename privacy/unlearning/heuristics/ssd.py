"""SSD, selective synaptic dampening: weights that matter for who leaves are made smaller."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from privacy.errors import UnlearningError
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.fisher import fisher_diagonal
from privacy.unlearning.heuristics.heuristic import Heuristic
from privacy.unlearning.heuristics.learner import Learner

__all__ = ["SSD"]


@final
@dataclass(frozen=True, kw_only=True)
class SSD(Heuristic):
    """Multiplies a weight by min(1, (dampening * I_D / I_f)^exponent) where I_f > selection * I_D.

    I_f is the weight's Fisher information on who leaves, I_D that on all, who leaves among them;
    each is the mean of *every example's own* squared gradient, as the paper defines it, so that no
    batch size matters. (The published code, github.com/if-loops/selective-synaptic-dampening,
    squares the mean gradient of a batch; with batches of one it is the same.) There is no training.

    No guarantee. The share of who leaves must be below 1 / selection: I_D is at least that share of
    I_f, so that no weight is ever chosen of a larger one, and that is refused.

    Source: Foster et al. 2023, arXiv 2308.07707; defaults as there, which searches selections from
    5 to 50.

    Attributes:
        selection: Alpha, > 0: how many times as much a weight must matter for who leaves.
        dampening: Lambda, > 0.
        exponent: > 0.
        batch_size: Examples at once, at least 1: memory, and nothing else.

    Raises:
        UnlearningError: A setting is out of its range.

    Example:
        >>> SSD().selection, SSD().dampening
        (10.0, 1.0)
    """

    selection: float = 10.0
    dampening: float = 1.0
    exponent: float = 1.0
    batch_size: int = 64

    def _check(self) -> None:
        for name in ("selection", "dampening", "exponent"):
            rows.positive(name, getattr(self, name))
        rows.whole("batch_size", self.batch_size, least=1)

    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        share = len(forget) / (len(forget) + len(retain))
        if share * self.selection >= 1:
            raise UnlearningError(
                f"forget: expected less than 1 / selection, {1 / self.selection:.4g}, of all "
                f"examples, got {share:.4g}: no weight matters so much more for them than for all; "
                f"choose a selection below {1 / share:.4g}, or forget fewer at once"
            )
        of_forget = fisher_diagonal(learner, forget, batch_size=self.batch_size)
        of_retain = fisher_diagonal(learner, retain, batch_size=self.batch_size)
        values = []
        for weight, own, other in zip(
            learner.parameters.values(), of_forget, of_retain, strict=True
        ):
            factor = self._factor(own, share * own + (1 - share) * other)
            values.append((weight.detach().double() * factor).to(weight.dtype))
        learner.write(values)

    def _factor(self, of_forget: Tensor, of_all: Tensor) -> Tensor:
        """What each weight is multiplied by, 1 where it is not chosen."""
        ratio = self.dampening * of_all / torch.where(of_forget > 0, of_forget, 1.0)
        damped = torch.clamp(ratio**self.exponent, max=1.0)
        return torch.where(of_forget > self.selection * of_all, damped, torch.ones_like(damped))
