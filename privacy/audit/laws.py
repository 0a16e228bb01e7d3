"""Exact laws of honest noise and honest coins: numbers in, standard normal scores or p-values out.

Every statistic of the battery becomes a standard normal number by its own exact law, so that three
questions can be asked of any collection of them: is one too far out (`extreme`), do they scatter
too much or too little (`scatter`), do they lean to one side (`lean`)? What is looked at is
deliberately not here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from privacy.audit.checks import Check

__all__ = [
    "counts",
    "deviations",
    "extreme",
    "joint",
    "lean",
    "likeness",
    "magnitudes",
    "odds",
    "scatter",
    "smallest",
    "squares",
]

Numbers = npt.NDArray[np.float64]

_FARTHEST = 38.0
"""Normal scores are cut here: beyond it a double has no tail probability."""
_TOLERANCE = 0.01
"""How far a deviation may lie from the plan's beyond chance: rounding, low precision."""


def squares(sums: Numbers, degrees: npt.ArrayLike, *, tolerance: float = _TOLERANCE) -> Numbers:
    """Normal scores of sums of squares of `degrees` standard normal numbers each.

    A deviation within `tolerance` of 1 counts as 1: it draws scores towards zero, never away.
    """
    low = special.ndtri(special.chdtr(degrees, sums / (1 - tolerance) ** 2))
    high = -special.ndtri(special.chdtrc(degrees, sums / (1 + tolerance) ** 2))
    return _cut(np.where(low < 0, low, np.maximum(high, 0.0)))


def deviations(sums: Numbers, degrees: npt.ArrayLike) -> tuple[float, float]:
    """P-values of independent sums of squares: of the one farthest out, and of their scatter."""
    drawn = squares(sums, degrees)
    exact = squares(sums, degrees, tolerance=0.0)
    too_little = special.chdtr(exact.size, float(np.square(exact).sum()))
    too_much = special.chdtrc(drawn.size, float(np.square(drawn).sum()))
    return extreme(drawn), min(1.0, 2 * float(min(too_little, too_much)))


def counts(
    found: npt.ArrayLike, trials: npt.ArrayLike, chance: npt.ArrayLike, random: np.random.Generator
) -> Numbers:
    """Normal scores of binomial counts; a count's own probability is spread evenly by `random`."""
    below, above = _at_most(found, trials, chance, 1), _at_least(found, trials, chance, 1)
    up_to, from_it = _at_most(found, trials, chance, 0), _at_least(found, trials, chance, 0)
    # Of the smaller tail: in the other one, a small probability is lost beside 1.
    own = np.where(up_to < from_it, up_to - below, from_it - above)
    share = random.uniform(size=own.shape)
    low, high = below + share * own, above + (1 - share) * own
    return _cut(np.where(low < high, special.ndtri(low), -special.ndtri(high)))


def odds(found: npt.ArrayLike, trials: npt.ArrayLike, chance: npt.ArrayLike) -> Numbers:
    """Two-sided p-values of binomial counts: twice the smaller tail."""
    tails = _at_most(found, trials, chance, 0), _at_least(found, trials, chance, 0)
    both: Numbers = np.minimum(1.0, 2 * np.minimum(*tails))
    return both


def likeness(products: Numbers, lengths: npt.ArrayLike) -> Numbers:
    """Normal scores of cosines between independent Gaussian vectors of `lengths` numbers."""
    degrees = np.asarray(lengths, dtype=float) - 1
    cosines = np.clip(products, -1.0, 1.0)
    with np.errstate(divide="ignore"):
        students = np.abs(cosines) * np.sqrt(degrees / (1 - cosines**2))
    return _cut(-np.sign(cosines) * special.ndtri(special.stdtr(degrees, -students)))


def magnitudes(noise: Numbers) -> Numbers:
    """Standard normal numbers again, made of the magnitudes of standard normal numbers alone."""
    return _cut(-special.ndtri(2 * special.ndtr(-np.abs(noise))))


def extreme(scores: Numbers) -> float:
    """P-value of the score that is farthest out, on either side, corrected for their number."""
    if not scores.size:
        return 1.0
    return min(1.0, 2 * scores.size * float(special.ndtr(-np.abs(scores).max())))


def scatter(scores: Numbers) -> float:
    """P-value of independent scores that scatter too much or too little."""
    total, count = float(np.square(scores).sum()), scores.size
    if not count:
        return 1.0
    tails = special.chdtr(count, total), special.chdtrc(count, total)
    return min(1.0, 2 * float(min(tails)))


def lean(scores: Numbers, weights: npt.NDArray[np.floating[Any]] | None = None) -> float:
    """P-value of independent scores whose sum, weighted by `weights`, is too far from zero."""
    shares = np.ones(scores.shape) if weights is None else weights
    size = float(np.linalg.norm(shares))
    if size == 0:
        return 1.0
    return 2 * float(special.ndtr(-abs(float((shares * scores).sum())) / size))


def smallest(p_values: npt.ArrayLike) -> float:
    """The smallest of several p-values, corrected for their number."""
    values = np.asarray(p_values, dtype=float)
    return min(1.0, float(values.min()) * values.size) if values.size else 1.0


def joint(name: str, tests: Mapping[str, float], *, error: float, says: str) -> Check:
    """One check of several tests, which share its error equally."""
    least = min(tests, key=lambda test: tests[test])
    p_value = smallest(list(tests.values()))
    return Check(
        name=name,
        passed=p_value >= error,
        measured=p_value,
        limit=error,
        says=f"{says}; least likely: {least}",
    )


def _at_most(
    found: npt.ArrayLike, trials: npt.ArrayLike, chance: npt.ArrayLike, less: int
) -> Numbers:
    """Probability of a binomial count of at most `found` less `less`."""
    # Incomplete beta functions are exact in both tails, and vectorised.
    count, total = np.asarray(found, dtype=float) - less, np.asarray(trials, dtype=float)
    inside = special.betainc(
        np.maximum(total - count, 1), np.maximum(count + 1, 1), 1 - np.asarray(chance, dtype=float)
    )
    within: Numbers = np.where(count < 0, 0.0, np.where(count >= total, 1.0, inside))
    return within


def _at_least(
    found: npt.ArrayLike, trials: npt.ArrayLike, chance: npt.ArrayLike, more: int
) -> Numbers:
    """Probability of a binomial count of at least `found` and `more`."""
    count, total = np.asarray(found, dtype=float) + more, np.asarray(trials, dtype=float)
    return _at_most(total - count, total, 1 - np.asarray(chance, dtype=float), 0)


def _cut(scores: Numbers) -> Numbers:
    """Scores within what a double can tell."""
    return np.clip(np.nan_to_num(scores, nan=_FARTHEST), -_FARTHEST, _FARTHEST)
