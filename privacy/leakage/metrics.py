"""What scores of membership are worth: areas, rates at a threshold, and what is behind a verdict.

Rates are fractions, never percents, each with its interval; and where too few non-members were
asked to tell a rate, there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.table import Flags
from privacy.statistics import Numbers, clopper_pearson, roc_area

__all__ = [
    "PointOnCurve",
    "area",
    "areas",
    "oracle_threshold",
    "point",
    "point_of_all",
    "resolved",
    "shadow_thresholds",
]

_LEAST_ALARMS = 10
"""False alarms that a rate must let one expect: fewer tell nothing of it."""
_ERROR = 0.025
"""Of each end of a 95 % interval."""


@final
@dataclass(frozen=True, kw_only=True)
class PointOnCurve:
    """How a threshold does: of so many members so many are found, of so many others so many named.

    Ties count against the attack: a score *above* the threshold is a hit.

    Attributes:
        fpr: The false positive rate that was asked for, a fraction.
        threshold: What scores must be above.
        hits: Members above it, of `positives`.
        positives: Members.
        false_alarms: Non-members above it, of `negatives`.
        negatives: Non-members.
        ties: Scores that are exactly the threshold.

    Example:
        >>> found = point(np.array([3.0, 2.0]), np.array([1.0, 0.0]), threshold=1.0, fpr=0.0)
        >>> found.tpr, found.false_alarms
        (1.0, 0)
    """

    fpr: float
    threshold: float
    hits: int
    positives: int
    false_alarms: int
    negatives: int
    ties: int

    @property
    def tpr(self) -> float:
        """The true positive rate: share of the members that are found."""
        return self.hits / self.positives

    @property
    def tpr_interval(self) -> tuple[float, float]:
        """95 % interval of the true positive rate (Clopper and Pearson)."""
        return clopper_pearson(self.hits, self.positives, error=_ERROR)

    @property
    def realised_fpr(self) -> float:
        """Share of the non-members that are above the threshold."""
        return self.false_alarms / self.negatives

    @property
    def kept(self) -> bool:
        """Whether it names at most twice as many others as was asked.

        A threshold of shadow models may name far more where scores tie or models differ: what it
        finds then is no figure at the rate that was asked.
        """
        return self.realised_fpr <= 2 * self.fpr

    @property
    def fpr_interval(self) -> tuple[float, float]:
        """95 % interval of the realised false positive rate (Clopper and Pearson)."""
        return clopper_pearson(self.false_alarms, self.negatives, error=_ERROR)

    def ppv(self, prior: float) -> float:
        """Share of the named who are members, where `prior` of those asked about are.

        1 where nobody is named: nothing wrong was said.

        Raises:
            LeakageError: `prior` is not in (0, 1).
        """
        arguments.number("prior", prior, "a share in (0, 1)", lambda x: 0 < x < 1)
        right, wrong = prior * self.tpr, (1 - prior) * self.realised_fpr
        return right / (right + wrong) if right + wrong else 1.0


def area(scores: Numbers, members: Flags) -> float:
    """Probability that a member's score is above a non-member's; a tie counts half.

    Raises:
        LeakageError: There is no member, or nobody else.

    Example:
        >>> area(np.array([2.0, 1.0, 1.0]), np.array([True, True, False]))
        0.75
    """
    positives, negatives = _sides(scores, members)
    return roc_area(positives, negatives)


def areas(scores: Numbers, members: Flags) -> Numbers:
    """`area` of each model, a column of `[examples, models]` each: float64 `[models]`.

    Raises:
        LeakageError: A model has no member, or nothing else.
    """
    arguments.scores("scores", scores, axes=2)
    arguments.flags("members", members, scores)
    count = members.sum(0)
    if not (np.minimum(count, len(members) - count) > 0).all():
        raise LeakageError("members: expected some and some others of each model, got none")
    columns = zip(np.ascontiguousarray(scores.T), np.ascontiguousarray(members.T), strict=True)
    above = np.array([_pairs_above(own[mine], own[~mine]) for own, mine in columns])
    found: Numbers = above / (count * (len(members) - count))
    return found


def _pairs_above(positives: Numbers, negatives: Numbers) -> float:
    """In how many pairs of the two the first is the larger; half of those where they are equal."""
    low, high = np.sort(negatives), np.sort(positives)  # sorted, it is found twice as fast
    sides: tuple[Literal["left"], Literal["right"]] = ("left", "right")
    return float(sum(int(np.searchsorted(low, high, side).sum()) for side in sides)) / 2


def resolved(negatives: int, fpr: float) -> bool:
    """Whether so many non-members can tell a true positive rate at this false positive rate.

    Example:
        >>> resolved(10_000, 0.001), resolved(5_000, 0.001)
        (True, False)
    """
    arguments.whole("negatives", negatives, least=0)
    arguments.number("fpr", fpr, "a fraction in [0, 1]", lambda x: 0 <= x <= 1)
    return negatives * fpr >= _LEAST_ALARMS - 1e-9


def oracle_threshold(scores: Numbers, members: Flags, fpr: float) -> float:
    """The lowest threshold that at most `fpr` of the non-members pass: no attacker knows it."""
    return _threshold(_sides(scores, members)[1], fpr)


def shadow_thresholds(scores: Numbers, members: Flags, fprs: Sequence[float]) -> Numbers:
    """For each model the lowest thresholds that at most `fprs` of the others' non-members pass.

    An attacker knows them: they are of shadow models, whose members they chose.

    Args:
        scores: `[examples, models]`.
        members: `[examples, models]`.
        fprs: Fractions in [0, 1).

    Returns:
        Float64 `[fprs, models]`.

    Example:
        >>> scores = np.array([[5.0, 1.0], [2.0, 6.0], [3.0, 4.0]])
        >>> members = np.array([[True, False], [False, True], [False, False]])
        >>> shadow_thresholds(scores, members, [0.0, 0.5])
        array([[4., 3.],
               [1., 2.]])
    """
    arguments.scores("scores", scores, axes=2)
    arguments.flags("members", members, scores)
    arguments.sequence("fprs", fprs, "fractions")
    # More than so many a threshold never lets pass, whichever model's own are left out.
    others = scores[~members]
    most = min(len(others), len(scores) + 1 + _allowed(len(others), max(fprs, default=0.0)))
    least = np.partition(others, len(others) - most)[len(others) - most] if most else 0.0
    rows, models = np.nonzero(~members & (scores >= least))
    order = np.argsort(-scores[rows, models], kind="stable")
    ordered, owners = scores[rows, models][order], models[order]
    negatives = (~members).sum(0)
    found = np.empty((len(fprs), scores.shape[1]))
    for model in range(scores.shape[1]):
        count = len(others) - int(negatives[model])
        if not count:
            raise LeakageError("members: expected non-members of a shadow model, got none")
        found[:, model] = ordered[owners != model][[_allowed(count, fpr) for fpr in fprs]]
    return found


def point(
    positives: Numbers | Sequence[float],
    negatives: Numbers | Sequence[float],
    *,
    threshold: float,
    fpr: float,
) -> PointOnCurve:
    """How a threshold does on scores of members and of others.

    Raises:
        LeakageError: There is no member, or nobody else.
    """
    found, others = _listed("positives", positives), _listed("negatives", negatives)
    arguments.number("threshold", threshold, "a number", lambda _: True)
    arguments.number("fpr", fpr, "a fraction in [0, 1]", lambda x: 0 <= x <= 1)
    if not len(found) or not len(others):
        raise LeakageError(
            f"members: expected some and some others, got {len(found)} and {len(others)}"
        )
    return PointOnCurve(
        fpr=fpr,
        threshold=threshold,
        hits=int((found > threshold).sum()),
        positives=len(found),
        false_alarms=int((others > threshold).sum()),
        negatives=len(others),
        ties=int((found == threshold).sum() + (others == threshold).sum()),
    )


def point_of_all(scores: Numbers, limits: Numbers, members: Flags, *, fpr: float) -> PointOnCurve:
    """All models together, each at its own threshold, from which what is above is counted."""
    above = scores > limits
    hits, positives = int((above & members).sum()), int(members.sum())
    return PointOnCurve(
        fpr=fpr,
        threshold=0.0,
        hits=hits,
        positives=positives,
        false_alarms=int(above.sum()) - hits,
        negatives=members.size - positives,
        ties=int((scores == limits).sum()),
    )


def _listed(name: str, value: Numbers | Sequence[float]) -> Numbers:
    """Scores in an array or a list."""
    found = np.asarray(value, dtype=float) if isinstance(value, (list, tuple)) else value
    arguments.scores(name, found, axes=1)
    return np.asarray(found, dtype=float)


def _sides(scores: Numbers, members: Flags) -> tuple[Numbers, Numbers]:
    arguments.scores("scores", scores, axes=1)
    arguments.flags("members", members, scores)
    positives, negatives = scores[members], scores[~members]
    if not len(positives) or not len(negatives):
        raise LeakageError(
            f"members: expected some and some others, got {len(positives)} and {len(negatives)}"
        )
    return positives, negatives


def _threshold(negatives: Numbers, fpr: float) -> float:
    return float(np.sort(negatives)[::-1][_allowed(len(negatives), fpr)])


def _allowed(negatives: int, fpr: float) -> int:
    """How many of them may pass."""
    arguments.number("fpr", fpr, "a fraction in [0, 1)", lambda x: 0 <= x < 1)
    return int(fpr * negatives + 1e-9)
