"""Lower bounds on epsilon from counts and from a Gaussian trade-off, as pure functions.

Each answers: which (epsilon, delta) can no mechanism have that behaved like this? Choosing a
threshold or a number of guesses by looking at the same data is deliberately not here: `scores` does
that, and pays for it.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from privacy.errors import PlanError
from privacy.quantities import probability, real, whole

__all__ = ["epsilon_of_counts", "epsilon_of_guesses", "gdp_delta", "gdp_epsilon", "one_run_p_value"]

_LARGEST_EPSILON = 700.0
"""Above it e^epsilon has no double; a bound that high says `no privacy` as well as any."""


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


def epsilon_of_counts(
    *, hits: int, positives: int, false_alarms: int, negatives: int, delta: float, confidence: float
) -> float:
    """Epsilon that a fixed test's counts rule out, by Clopper-Pearson intervals of its two rates.

    An (epsilon, delta)-private mechanism has TPR <= e^epsilon FPR + delta for every test. Each rate
    is bounded at half of the error, so that the bound holds at `confidence` whatever their joint
    distribution.

    Args:
        positives: How many there were, at least 1.
        negatives: How many there were, at least 1.
        delta: In (0, 1).
        confidence: In (0, 1).

    Returns:
        A lower bound on epsilon, at least 0.
    """
    delta, error = probability("delta", delta), (1 - probability("confidence", confidence)) / 2
    low = float(special.betaincinv(hits, positives - hits + 1, error)) if hits else 0.0
    high = 1.0
    if false_alarms < negatives:
        high = float(special.betaincinv(false_alarms + 1, negatives - false_alarms, 1 - error))
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def one_run_p_value(
    *, examples: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How likely so many correct guesses or more are, were the mechanism (epsilon, delta)-private.

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


def _binomial(counts: npt.NDArray[np.int_], trials: int, chance: float) -> npt.NDArray[np.float64]:
    """Probability of each count of successes."""
    ways = special.gammaln(trials + 1) - special.gammaln(counts + 1)
    ways = ways - special.gammaln(trials - counts + 1)
    logs = ways + special.xlogy(counts, chance) + special.xlogy(trials - counts, 1 - chance)
    found: npt.NDArray[np.float64] = np.exp(logs)
    return found
