"""The oracle gap: how far a model that forgot is from models really trained without the people.

Signed: a model that still knows them (under-unlearning) and one that answers them worse than
strangers (over-unlearning) are both told from an oracle, and are told apart. "Not significantly
different" is no evidence of likeness: that a gap is within a margin is tested itself, by two
one-sided tests (TOST).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from scipy import stats

from privacy.errors import UnlearningError
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.models import Answers, Model, checked_models
from privacy.validate import shown

__all__ = ["Difference", "Direction", "OracleGap", "Verdict", "oracle_gap"]

Verdict = Literal["equivalent", "differs", "cannot tell"]
Direction = Literal["under-unlearning", "over-unlearning", "cannot tell"]
_SETS = ("forget", "retain", "test")
_ERROR = 0.05
"""Of each test, in both directions together."""


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of an unlearned model beside the same of its oracles, in percentage points.

    Oracles that differ in their seed alone are draws from one normal law, of unknown mean and
    deviation. A model that is as an oracle is one more draw, and lies within
    `t * deviation * sqrt(1 + 1 / oracles)` of their mean, by Student's t of one degree less than
    there are oracles. It is of these examples, as they are: nothing is said of others.

    Attributes:
        unlearned: The figure of the model that forgot, in [0, 1].
        oracles: Those of the oracles, at least 2.
        examples: Of how many the figure is; it is known no better than to one of them.
        margin: Percentage points that do not matter, > 0.
        error: Of each test, in both directions together, in (0, 1).

    Raises:
        UnlearningError: A value is out of its range.

    Example:
        >>> found = Difference(
        ...     unlearned=0.93, oracles=(0.90, 0.91, 0.90, 0.91), examples=1000, margin=5.0
        ... )
        >>> round(found.points, 1), found.verdict
        (2.5, 'equivalent')
    """

    unlearned: float
    oracles: tuple[float, ...]
    examples: int
    margin: float
    error: float = _ERROR

    def __post_init__(self) -> None:
        if not isinstance(self.oracles, tuple) or len(self.oracles) < 2:
            raise UnlearningError(
                f"oracles: expected figures of at least 2 models, got {shown(self.oracles)}"
            )
        for name, value in (("unlearned", self.unlearned), *(("oracles", x) for x in self.oracles)):
            rows.within(name, value, "a share in [0, 1]", lambda x: 0 <= x <= 1)
        rows.whole("examples", self.examples, least=1)
        rows.positive("margin", self.margin)
        rows.within("error", self.error, "a probability in (0, 1)", lambda x: 0 < x < 1)

    @property
    def mean(self) -> float:
        """Of the oracles' figures, in [0, 1]."""
        return math.fsum(self.oracles) / len(self.oracles)

    @property
    def points(self) -> float:
        """The unlearned model's figure minus the oracles' mean, signed, in points."""
        return 100 * (self.unlearned - self.mean)

    @property
    def deviation(self) -> float:
        """Of a new oracle's figure from the mean of these, in points.

        Never less than one example counts: oracles that agree by chance are not certain.
        """
        spread = max(float(np.std(self.oracles, ddof=1)), 1 / self.examples)
        return 100 * spread * math.sqrt(1 + 1 / len(self.oracles))

    @property
    def interval(self) -> tuple[float, float]:
        """Predictive interval of `points`, at 1 - error."""
        half = self._quantile(self.error / 2) * self.deviation
        return self.points - half, self.points + half

    @property
    def p_value(self) -> float:
        """How often one more oracle is as far away; evenly spread in (0, 1) if it is one."""
        apart = abs(self.points) / self.deviation
        return float(2 * stats.t.sf(apart, len(self.oracles) - 1))

    @property
    def equivalence_p_value(self) -> float:
        """Of the hypothesis that the difference is the margin or more, by two one-sided tests.

        Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15.
        """
        inside = (self.margin - abs(self.points)) / self.deviation
        return float(stats.t.sf(inside, len(self.oracles) - 1))

    @property
    def verdict(self) -> Verdict:
        """Equivalent: less than the margin apart; differs: more; each with its error.

        What is within the margin by its figure, but of which an oracle might be outside, cannot be
        told: more oracles may tell.
        """
        if self.equivalence_p_value < self.error:
            return "equivalent"
        low, high = self.interval
        return "differs" if low > self.margin or high < -self.margin else "cannot tell"

    def _quantile(self, error: float) -> float:
        return float(stats.t.isf(error, len(self.oracles) - 1))


@final
@dataclass(frozen=True, kw_only=True)
class OracleGap:
    """Accuracy on who left, who stays and strangers, beside that of oracles.

    Attributes:
        forget: On who left.
        retain: On who stays.
        test: On strangers.

    Example:
        >>> def found(unlearned: float) -> Difference:
        ...     return Difference(
        ...         unlearned=unlearned, oracles=(0.90, 0.91, 0.90), examples=1000, margin=5.0
        ...     )
        >>> gap = OracleGap(forget=found(1.0), retain=found(0.90), test=found(0.90))
        >>> gap.verdict, gap.direction, round(gap.average_gap, 2)
        ('differs', 'under-unlearning', 3.44)
    """

    forget: Difference
    retain: Difference
    test: Difference

    @property
    def parts(self) -> dict[str, Difference]:
        """The three by name."""
        return {name: getattr(self, name) for name in _SETS}

    @property
    def average_gap(self) -> float:
        """Mean of the absolute differences, in points (the score of arXiv 2310.12508).

        It hides on which side a model is, and a large gap on who left behind small ones.
        """
        return math.fsum(abs(each.points) for each in self.parts.values()) / len(_SETS)

    @property
    def average_gap_interval(self) -> tuple[float, float]:
        """Where it lies if all three intervals hold, in points."""
        low, high = 0.0, 0.0
        for each in self.parts.values():
            ends = [abs(end) for end in each.interval]
            low += 0.0 if each.interval[0] <= 0 <= each.interval[1] else min(ends)
            high += max(ends)
        return low / len(_SETS), high / len(_SETS)

    @property
    def verdict(self) -> Verdict:
        """Equivalent if all three are; differs if one does, at a third of the error each."""
        found = [each.verdict for each in self.parts.values()]
        if all(each == "equivalent" for each in found):
            return "equivalent"
        return "differs" if "differs" in found else "cannot tell"

    @property
    def direction(self) -> Direction:
        """Whether who left is still known, or answered worse than oracles answer them.

        By the sign of the difference on who left, where its interval is on one side of zero.
        """
        low, high = self.forget.interval
        if low > 0:
            return "under-unlearning"
        return "over-unlearning" if high < 0 else "cannot tell"

    def __str__(self) -> str:
        """A line a set, and the verdict."""
        lines = [
            f"{name:7} {each.unlearned:.4f}, oracles {each.mean:.4f}: {each.points:+.2f} points "
            f"({each.interval[0]:+.2f} to {each.interval[1]:+.2f}), {each.verdict}"
            for name, each in self.parts.items()
        ]
        low, high = self.average_gap_interval
        lines.append(
            f"average gap {self.average_gap:.2f} points ({low:.2f} to {high:.2f}); margin "
            f"{self.forget.margin:g}, {len(self.forget.oracles)} oracles: {self.verdict}"
        )
        return "\n".join(lines)


def oracle_gap(
    unlearned: Model,
    oracles: Sequence[Model],
    *,
    forget: Any,
    retain: Any,
    test: Any,
    margin: float,
) -> OracleGap:
    """Holds a model that forgot against models that were really trained without the people.

    What the caller answers for: the oracles are trained as the model was, differ in their seed
    alone, and never saw anybody of `forget`.

    Args:
        unlearned: A module or function that gives logits `[n, classes]` for images; a module is
            asked in evaluation mode, and its modes are put back.
        oracles: At least 2 such models.
        forget: Who left: a map-style data set or a list of batches, as for a `Heuristic`.
        retain: Who stays.
        test: Strangers.
        margin: Percentage points of accuracy that do not matter, > 0; to be chosen before.

    Raises:
        UnlearningError: An argument is not as said.
    """
    models = checked_models(oracles, least=2)
    given = {"forget": forget, "retain": retain, "test": test}
    parts = {name: Examples.of(name, value) for name, value in given.items()}
    rows.positive("margin", margin)
    asked = {
        name: [Answers(model).accuracy(examples) for model in (unlearned, *models)]
        for name, examples in parts.items()
    }
    found = {
        name: Difference(
            unlearned=shares[0],
            oracles=tuple(shares[1:]),
            examples=len(parts[name]),
            margin=float(margin),
            error=_ERROR / len(_SETS),
        )
        for name, shares in asked.items()
    }
    return OracleGap(**found)
