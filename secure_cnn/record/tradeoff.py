"""What each variant gives and takes, which are beaten, and which to take.

Deliberately not here: one score for everything. A protection is something that one needs or does
not need, so a choice is made by limits (`Needs`) and not by weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secure_cnn.record import wording
from secure_cnn.record.document import Checked, require
from secure_cnn.record.run import ResultRecord, RunRecord

__all__ = [
    "FRONT_RULE",
    "Estimate",
    "LeakageEstimate",
    "Needs",
    "TradeoffPoint",
    "choose",
    "pareto_front",
    "points_of",
]

FRONT_RULE = (
    "Filled marks are on the Pareto front: no other variant is at least as good in accuracy, macro "
    "recall, robust accuracy, ε and time, and better in one of them. What was not measured counts "
    "as worst; intervals and leakage are not taken into account."
)
_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Estimate(Checked):
    """A measured value between the ends of its interval."""

    value: float
    low: float
    high: float

    def _check(self) -> None:
        ordered = self.low <= self.value <= self.high
        require(ordered, "estimate", "low <= value <= high", (self.low, self.value, self.high))


@dataclass(frozen=True, kw_only=True)
class LeakageEstimate(Checked):
    """How well attacks tell who was in the data; ½ and `realised_fpr` would be a guess.

    `auc` is the area under the curve of the strongest attack, between the least and the largest of
    the models attacked. `tpr` is the largest share of members that an attack finds at the false
    positive rate `fpr`, both fractions, or None where the examples are too few; `realised_fpr` is
    the share of others that was named there. `unlike` marks what stands beside a measurement of
    other attacks, or with another number of shadow models.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"realised_fpr", "unlike"})

    auc: Estimate
    tpr: Estimate | None = None
    fpr: float | None = None
    realised_fpr: float | None = None
    unlike: bool = False

    def _check(self) -> None:
        both = (self.tpr is None) == (self.fpr is None)
        require(both, "leakage.fpr", "a true positive rate with its false one, or neither", self)


@dataclass(frozen=True, kw_only=True)
class TradeoffPoint(Checked):
    """What one variant gives and takes; None is not measured, or not promised.

    `audited` is of one step: the largest lower bound on ε that an audit found, and the claim.
    `time` is that of a step against plain.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"leakage"})

    name: str
    accuracy: Estimate
    macro_recall: float
    robust_accuracy: Estimate | None = None
    epsilon: float | None = None
    audited: tuple[float, float] | None = None
    time: Estimate | None = None
    leakage: LeakageEstimate | None = None


@dataclass(frozen=True, kw_only=True)
class Needs(Checked):
    """The limits that a variant must keep to be taken; None is no limit."""

    epsilon: float | None = None
    robust_accuracy: float | None = None
    time: float | None = None

    def _check(self) -> None:
        for name in ("epsilon", "robust_accuracy", "time"):
            limit: float | None = getattr(self, name)
            require(limit is None or limit >= 0, f"needs.{name}", "a number of at least 0", limit)

    @property
    def words(self) -> str:
        """The limits in one phrase; empty where there are none."""
        said = (
            self.epsilon is not None and f"ε ≤ {self.epsilon:g}",
            self.robust_accuracy is not None
            and f"robust accuracy ≥ {wording.share(self.robust_accuracy)}",
            self.time is not None and f"a step of at most {self.time:g} × plain",
        )
        return ", ".join(part for part in said if part)

    def met_by(self, point: TradeoffPoint) -> bool:
        """Whether a point keeps every limit; what was not measured keeps none."""
        _, _, robust, private, quick = _merits(point)
        return (
            (self.epsilon is None or -private <= self.epsilon)
            and (self.robust_accuracy is None or robust >= self.robust_accuracy)
            and (self.time is None or -quick <= self.time)
        )


def pareto_front(points: Sequence[TradeoffPoint]) -> tuple[bool, ...]:
    """Whether each point is beaten by no other: `FRONT_RULE` says when one is."""
    merits = [_merits(point) for point in points]
    return tuple(not any(_beats(other, own) for other in merits) for own in merits)


def choose(points: Sequence[TradeoffPoint], needs: Needs) -> TradeoffPoint | None:
    """The most accurate point of the front that keeps the limits, or None if there is none."""
    front = pareto_front(points)
    fit = [point for point, on in zip(points, front, strict=True) if on and needs.met_by(point)]
    return max(fit, key=_merits, default=None)


def points_of(record: RunRecord) -> list[TradeoffPoint]:
    """A point for each result of a run, with what the run itself measured."""
    times = {
        row.variant: Estimate(value=row.median, low=row.low, high=row.high)
        for row in record.cost
        if row.metric == "time_ratio"
    }
    # Plain against itself: a benchmark of the protections alone need not say so.
    times = {"plain": Estimate(value=1.0, low=1.0, high=1.0)} | times if times else {}
    return [
        TradeoffPoint(
            name=result.variant,
            accuracy=_accuracy(result),
            macro_recall=result.macro_recall,
            robust_accuracy=_robust(result),
            epsilon=result.epsilon,
            time=times.get(result.variant),
        )
        for result in record.results
        if math.isfinite(result.accuracy)
    ]


def _merits(point: TradeoffPoint) -> tuple[float, float, float, float, float]:
    """The five measures, larger being better; what is not known is worst."""
    robust, epsilon, time = point.robust_accuracy, point.epsilon, point.time
    recall = point.macro_recall
    return (
        point.accuracy.value,
        -math.inf if math.isnan(recall) else recall,
        -math.inf if robust is None else robust.value,
        -math.inf if epsilon is None else -epsilon,
        -math.inf if time is None else -time.value,
    )


def _beats(other: Sequence[float], own: Sequence[float]) -> bool:
    """Whether `other` is nowhere worse and somewhere better."""
    pairs = list(zip(other, own, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _accuracy(result: ResultRecord) -> Estimate:
    """Accuracy with its Wilson (1927) interval, from the images that were counted.

    `defenses` has the same formula, and may not be imported: a record stands on no package.
    """
    count, share = sum(map(sum, result.confusion)), result.accuracy
    if count == 0:
        return Estimate(value=share, low=0.0, high=1.0)
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Estimate(value=share, low=low, high=high)


def _robust(result: ResultRecord) -> Estimate | None:
    value, low, high = result.robust_accuracy, result.robust_low, result.robust_high
    if value is None or low is None or high is None:
        return None
    return Estimate(value=value, low=low, high=high) if low <= value <= high else None
