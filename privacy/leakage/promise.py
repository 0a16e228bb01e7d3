"""What privacy that was promised allows an attack to find."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from privacy.accounting import GaussianSteps, epsilon_of, epsilons_of
from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.validate import shown

__all__ = ["Promise", "allowed_tpr"]

_DELTAS = (1e-3, 0.01, 0.05, 0.2, 0.4)
"""Of pairs that bound rates of some hundredths and tenths, where a usual delta says little."""


@final
@dataclass(frozen=True, kw_only=True)
class Promise:
    """That a training is (epsilon, delta)-private for each of these pairs at once.

    Each pair bounds what any test can find, and different pairs bind at different rates: with
    several the bound comes close to the training's whole trade-off curve, and it holds whatever the
    curve is. A pair is of adding or removing one example, as `privacy.DPPlan` counts.

    Attributes:
        pairs: Epsilons, at least 0, each with its delta in [0, 1); the first is the one to tell.

    Raises:
        LeakageError: There is no pair, or one is out of range.

    Example:
        >>> promise = Promise(pairs=((1.0, 1e-5), (0.5, 0.05)))
        >>> round(promise.allowed_tpr(0.01), 3)
        0.074
    """

    pairs: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        pairs = arguments.instance("promise", self.pairs, tuple)
        if not pairs:
            raise LeakageError("promise: expected at least one pair of epsilon and delta, got none")
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise LeakageError(
                    f"promise: expected pairs of an epsilon and a delta, got {shown(pair)}"
                )
            wanted = "an epsilon >= 0 with a delta in [0, 1)"
            arguments.number("promise", pair[0], wanted, lambda x: x >= 0)
            arguments.number("promise", pair[1], wanted, lambda x: 0 <= x < 1)

    @classmethod
    def of(
        cls, events: Sequence[GaussianSteps], delta: float, *, others: Sequence[float] = _DELTAS
    ) -> "Promise":
        """What steps that were taken promise, `[plan.event()]` or those of a ledger.

        The steps are composed once for all deltas, which takes up to a second.

        Args:
            events: The steps.
            delta: The one by which epsilon is told.
            others: Those of further pairs, which bound larger rates.

        Raises:
            PlanError: A delta is not in (0, 1), or events are none.
            LeakageError: `others` are no deltas.
            AccountingError: No accountant could bound these events.

        Example:
            >>> steps = GaussianSteps(noise_multiplier=2.0, sampling_rate=1.0, steps=4)
            >>> print(Promise.of([steps], 1e-5))
            epsilon 4.38 at delta 1e-05 (with 5 more pairs)
        """
        arguments.sequence("others", others, "deltas")
        deltas = [delta, *(each for each in others if each != delta)]
        epsilons = epsilons_of(events, deltas)
        if delta > min(deltas):
            # What is told is what the plan tells, to the last bit.
            epsilons = (epsilon_of(events, delta), *epsilons[1:])
        return cls(pairs=tuple(zip(epsilons, deltas, strict=True)))

    def allowed_tpr(self, fpr: float) -> float:
        """The largest true positive rate that membership can be told with, at this rate of others.

        A target has as many members whoever is among them: who is one is there in another's place.
        That is one removal and one addition, and each is bounded. The bound is concave, so that it
        holds for rates over many examples as it does for those of one.

        Raises:
            LeakageError: `fpr` is not in [0, 1].
        """
        _check_rate(fpr)
        return self._of_one_change(self._of_one_change(fpr))

    def _of_one_change(self, fpr: float) -> float:
        return min(_allowed(fpr, each, delta) for each, delta in self.pairs)

    def __str__(self) -> str:
        """The first pair, and how many there are besides."""
        epsilon, delta = self.pairs[0]
        more = f" (with {len(self.pairs) - 1} more pairs)" if len(self.pairs) > 1 else ""
        return f"epsilon {epsilon:.3g} at delta {delta:.3g}{more}"


def allowed_tpr(fpr: float, *, epsilon: float, delta: float) -> float:
    """The largest true positive rate of any test of two trainings that (epsilon, delta) bounds.

    Source: Kairouz, Oh, Viswanath 2015, arXiv 1311.0776, theorem 2.1.

    Raises:
        LeakageError: A value is out of range.

    Example:
        >>> round(allowed_tpr(0.1, epsilon=1.0, delta=0.0), 3)
        0.272
    """
    _check_rate(fpr)
    arguments.number("epsilon", epsilon, "a number >= 0", lambda x: x >= 0)
    arguments.number("delta", delta, "a number in [0, 1)", lambda x: 0 <= x < 1)
    return _allowed(fpr, epsilon, delta)


def _check_rate(fpr: float) -> None:
    arguments.number("fpr", fpr, "a rate in [0, 1]", lambda x: 0 <= x <= 1)


def _allowed(fpr: float, epsilon: float, delta: float) -> float:
    above = math.exp(min(700.0, epsilon)) * fpr + delta
    below = 1 - math.exp(-epsilon) * (1 - delta - fpr)
    return min(1.0, above, below)
