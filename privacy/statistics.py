"""Exact statistics of private mechanisms: trade-off curves, bounds from counts, laws of noise.

A Gaussian trade-off curve says which (epsilon, delta) a mechanism has, bounds which no mechanism
can have that behaved as counted. Laws turn a statistic of honest noise or coins into a standard
normal score or a p-value, exactly; of any collection of scores is then asked: is one too far out
(`extreme`), do they scatter too much or too little (`scatter`), do they lean to one side (`lean`)?
Whoever chooses a threshold, or what to look at, on the same data must pay for it: not here.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from privacy.errors import PlanError
from privacy.validate import probability, real, whole

__all__ = [
    "Numbers",
    "area_interval",
    "clopper_pearson",
    "counts",
    "deviations",
    "disjoint_pairs",
    "epsilon_of_counts",
    "epsilon_of_guesses",
    "extreme",
    "gdp_delta",
    "gdp_epsilon",
    "gdp_mu",
    "lean",
    "likeness",
    "magnitudes",
    "odds",
    "one_run_p_value",
    "roc_area",
    "scatter",
    "smallest",
    "squares",
    "true_positive_rate",
]

Numbers = npt.NDArray[np.float64]

_LARGEST_EPSILON = 700.0
"""Above it e^epsilon has no double; a bound that high says `no privacy` as well as any."""
_FARTHEST = 38.0
"""Normal scores are cut here: beyond it a double has no tail probability."""
_BESIDE = 1e-9
_TOLERANCE = 0.01
"""How far a deviation may lie from the plan's beyond chance: rounding, low precision."""


def gdp_delta(mu: float, epsilon: float) -> float:
    """The least delta at which a mu-GDP mechanism is (epsilon, delta)-differentially private.

    Source: Dong, Roth, Su 2019, arXiv 1905.02383, corollary 1.

    Raises:
        PlanError: A value is no finite number.

    Example:
        >>> round(gdp_delta(1.0, 0.0), 4)
        0.3829
    """
    mu, epsilon = real("mu", mu), real("epsilon", epsilon)
    if mu <= 0:
        return 0.0
    # In logarithms: where both terms are tiny, or e^epsilon is huge, their difference still holds.
    above = special.log_ndtr(-epsilon / mu + mu / 2)
    below = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(above) * -math.expm1(min(0.0, below - above)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at which a mu-GDP mechanism is (epsilon, delta)-differentially private.

    One step of the Gaussian mechanism with noise multiplier sigma is mu-GDP with mu = 1 / sigma.

    Args:
        mu: At least 0; `inf` is no privacy.
        delta: In (0, 1).

    Raises:
        PlanError: `delta` is not in (0, 1), or mu is negative or not a number.

    Example:
        >>> round(gdp_epsilon(1.0, 1e-5), 3)
        4.377
    """
    probability("delta", delta)
    if isinstance(mu, (float, np.floating)) and mu == math.inf:
        return math.inf
    if not real("mu", mu) >= 0:
        raise PlanError(f"mu: expected a number >= 0, got {mu}")
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    enough = mu * (mu / 2 - float(special.ndtri(delta)))
    if math.isinf(enough):
        return math.inf
    root = optimize.brentq(lambda epsilon: gdp_delta(mu, epsilon) - delta, 0.0, enough)
    return float(root)


def gdp_mu(epsilon: float, delta: float) -> float:
    """The largest mu at which every mu-GDP mechanism is (epsilon, delta)-differentially private.

    One part in 10^9 below the root, so that rounding breaks no promise.

    Raises:
        PlanError: `epsilon` is negative or no finite number, or `delta` is not in (0, 1).

    Example:
        >>> round(gdp_mu(1.0, 1e-5), 3)
        0.268
    """
    probability("delta", delta)
    if not real("epsilon", epsilon) >= 0:
        raise PlanError(f"epsilon: expected a number >= 0, got {epsilon}")
    # There the first term alone is delta, and the second takes from it.
    enough = math.sqrt(2 * epsilon) + 2 * abs(float(special.ndtri(delta))) + 2
    root = optimize.brentq(
        lambda mu: gdp_delta(mu, epsilon) - delta, 0.0, enough, xtol=1e-300, rtol=1e-12, maxiter=500
    )
    return float(root) * (1 - 1e-9)


def clopper_pearson(successes: int, trials: int, *, error: float) -> tuple[float, float]:
    """Bounds on a rate from a count: each is wrong with probability at most `error`."""
    low, high = 0.0, 1.0
    if successes:
        low = float(special.betaincinv(successes, trials - successes + 1, error))
    if successes < trials:
        high = float(special.betaincinv(successes + 1, trials - successes, 1 - error))
    return low, high


def epsilon_of_counts(
    *, hits: int, positives: int, false_alarms: int, negatives: int, delta: float, confidence: float
) -> float:
    """Lower bound on epsilon from a fixed test's counts, by Clopper-Pearson intervals of its rates.

    An (epsilon, delta)-private mechanism has TPR <= e^epsilon FPR + delta for every test. Each rate
    is bounded at half of the error, so that the bound holds at `confidence` whatever their joint
    distribution.
    """
    delta, error = probability("delta", delta), (1 - probability("confidence", confidence)) / 2
    low = clopper_pearson(hits, positives, error=error)[0]
    high = clopper_pearson(false_alarms, negatives, error=error)[1]
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def one_run_p_value(
    *, examples: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How likely `correct` or more right guesses are if the mechanism is (epsilon, delta)-private.

    Source: Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, theorem 5.2 and appendix D: at most
    P[B >= correct] + 2 m delta max_i P[correct > B >= correct - i] / i, where B counts the
    correct answers of `guesses` randomised responses.

    Args:
        examples: m, examples that were each included by an independent fair coin.
        guesses: How many coins were guessed, at most m.
        correct: How many guesses were right.
        epsilon: Claimed, >= 0.
        delta: Claimed, in [0, 1].

    Returns:
        A p-value in [0, 1].

    Raises:
        PlanError: Not 0 <= correct <= guesses <= examples, or epsilon is negative.

    Example:
        >>> one_run_p_value(examples=10, guesses=10, correct=10, epsilon=0.0, delta=0.0) == 0.5**10
        True
    """
    examples, guesses = whole("examples", examples, least=0), whole("guesses", guesses, least=0)
    correct, delta = whole("correct", correct, least=0), real("delta", delta)
    if epsilon != math.inf and not real("epsilon", epsilon) >= 0:
        raise PlanError(f"epsilon: expected a number >= 0, got {epsilon}")
    if not correct <= guesses <= examples:
        raise PlanError(
            f"guesses: expected 0 <= correct <= guesses <= examples, got {correct}, {guesses}, "
            f"{examples}"
        )
    accuracy = 1 / (1 + math.exp(-epsilon))
    beta = float(special.bdtrc(correct - 1, guesses, accuracy)) if correct else 1.0
    if not correct or not delta:
        return beta
    sums = np.cumsum(_binomial(np.arange(correct - 1, -1, -1), guesses, accuracy))
    alpha = float((sums / np.arange(1, correct + 1)).max())
    return min(1.0, beta + 2 * examples * delta * alpha)


def epsilon_of_guesses(
    *, examples: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """The largest epsilon whose one-run p-value is below 1 - confidence: it is ruled out."""
    probability("delta", delta)
    probability("confidence", confidence)

    def excess(epsilon: float) -> float:
        p_value = one_run_p_value(
            examples=examples, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta
        )
        return p_value - (1 - confidence)

    if guesses == 0 or excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
        if high > _LARGEST_EPSILON:
            return math.inf
    # The bisection keeps the end that is ruled out.
    low, high = (0.0 if high == 1.0 else high / 2), high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low


def _binomial(counts: npt.NDArray[np.int_], trials: int, chance: float) -> Numbers:
    ways = special.gammaln(trials + 1) - special.gammaln(counts + 1)
    ways = ways - special.gammaln(trials - counts + 1)
    logs = ways + special.xlogy(counts, chance) + special.xlogy(trials - counts, 1 - chance)
    found: Numbers = np.exp(logs)
    return found


def area_interval(
    area: float, positives: int, negatives: int, *, error: float
) -> tuple[float, float]:
    """Bounds on an area under a curve from its value and how many scores it is of.

    Each is wrong with a probability of about `error`: the values from which the area lies as far
    as a normal deviate of their own standard error (Newcombe 2006, Statistics in Medicine 25,
    method 5; the error by Hanley and McNeil 1982, with both numbers levelled). They have a width
    where the area is 1 too.
    """
    quantile, pairs = float(special.ndtri(1 - error)), positives * negatives
    level = (positives + negatives) / 2 - 1

    def apart(value: float) -> float:
        spread = 1 + level * ((1 - value) / (2 - value) + value / (1 + value))
        return abs(area - value) - quantile * math.sqrt(value * (1 - value) * spread / pairs)

    # Beside the area itself, which where it is 0 or 1 is a root too, but no bound.
    low = optimize.brentq(apart, 0.0, area - _BESIDE) if area > _BESIDE else 0.0
    high = optimize.brentq(apart, area + _BESIDE, 1.0) if area < 1 - _BESIDE else 1.0
    return float(low), float(high)


def roc_area(positives: Numbers, negatives: Numbers) -> float:
    """Probability that a positive's score is higher than a negative's; ties count half."""
    ranks = stats.rankdata(np.concatenate([positives, negatives]))[: len(positives)].sum()
    pairs = len(positives) * len(negatives)
    return float((ranks - len(positives) * (len(positives) + 1) / 2) / pairs)


def true_positive_rate(positives: Numbers, negatives: Numbers, *, fpr: float) -> float:
    """Share of the positives above a threshold that no more than `fpr` of the negatives pass."""
    if not 0 <= fpr <= 1:
        raise PlanError(f"fpr: expected a share in [0, 1], got {fpr}")
    allowed = int(fpr * len(negatives) + 1e-9)
    if allowed >= len(negatives):
        return 1.0
    threshold = np.sort(negatives)[::-1][allowed]
    return float((positives > threshold).mean())


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
    # The tolerance draws scores towards zero, so that too little scatter is judged without it.
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


def disjoint_pairs(number: int, lag: int) -> list[npt.NDArray[np.int_]]:
    """First members of all pairs (i, i + lag) below `number`, in two sets of disjoint pairs.

    Pairs without a common member are independent where the members are.
    """
    first = np.arange(max(0, number - lag))
    return [first[first // lag % 2 == turn] for turn in (0, 1)]


def smallest(p_values: npt.ArrayLike) -> float:
    """The smallest of several p-values, corrected for their number (Bonferroni)."""
    values = np.asarray(p_values, dtype=float)
    return min(1.0, float(values.min()) * values.size) if values.size else 1.0


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
