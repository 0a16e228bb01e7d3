"""What counts of images say, and what they do not: intervals and exact tests.

Every threshold of a verdict is one of the two questions here, so that no verdict rests on a
difference which other images of the same kind might have turned round.
"""

import math

from defenses.errors import EvaluationError
from defenses.quantities import as_whole, shown

__all__ = ["exceeds", "majority", "mcnemar", "outnumbers", "score_interval", "wilson_interval"]

_LEVEL = 0.01


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), sound near 0 and 1 too.

    Args:
        successes: 0 <= successes <= trials.
        trials: At least 1.

    Returns:
        Its ends, 0 <= low <= successes / trials <= high <= 1.

    Raises:
        EvaluationError: The counts are out of range.

    Example:
        >>> low, high = wilson_interval(500, 1000)
        >>> round(low, 3), round(high, 3)
        (0.469, 0.531)
    """
    hits, count = as_whole(successes), as_whole(trials)
    if not 1 <= count < 2**63 or not 0 <= hits <= count:
        raise EvaluationError(
            f"expected 0 <= successes <= trials, got {shown(successes)} of {shown(trials)}"
        )
    return score_interval(hits / count, count)


def score_interval(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, of as many trials as its variance is worth.

    Args:
        share: In [0, 1].
        trials: Above 0; fewer than were made where these depend on each other.
    """
    z = 1.959963984540054
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p value of McNemar's test (1947): are two discordant counts alike?

    Args:
        one: Images on which only the first is right, at least 0.
        other: Images on which only the second is right, at least 0.

    Returns:
        How probable counts at least this unequal are where the two are equally good, in (0, 1].
    """
    return min(1.0, 2 * _tail(max(one, other), one + other))


def outnumbers(more: int, fewer: int, *, level: float = _LEVEL) -> bool:
    """Is a discordant count larger than its counterpart, beyond what chance does?

    The exact one-sided form of McNemar's test.

    Args:
        level: How often it may say yes where both are equally likely.
    """
    return _tail(more, more + fewer) < level


def majority(successes: int, trials: int) -> float:
    """The exact one-sided p value of a sign test: are more than half of all successes?

    Args:
        successes: 0 <= successes <= trials.
        trials: At least 1.

    Returns:
        How probable at least so many are where at most half of all are, in (0, 1].

    Raises:
        EvaluationError: The counts are out of range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise EvaluationError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    return max(_tail(successes, trials), 5e-324)  # never nothing, whatever a float can hold


def exceeds(successes: int, trials: int, share: float) -> bool:
    """Is a proportion above `share`, beyond its 95 % interval? Never, where nothing was tried."""
    return trials > 0 and wilson_interval(successes, trials)[0] > share


def _tail(heads: int, tosses: int) -> float:
    """The probability of at least so many heads with a fair coin."""
    ways = 0
    term = math.comb(tosses, heads)
    for count in range(heads, tosses + 1):
        ways += term
        term = term * (tosses - count) // (count + 1)
    probability: float = ways / 2**tosses
    return probability
