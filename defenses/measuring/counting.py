"""What counts of images say, and what they do not: intervals and exact tests.

Every threshold of a verdict is one of the two questions here (`outnumbers`, `exceeds`), so that no
verdict rests on a difference which other images of the same kind might have turned round.

A model that answers at random is asked several times about each image. Its answers are written as a
row of 1 (right) and 0, one for each draw; that of a deterministic model has one. An image counts
with the share of its draws that are right.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from defenses.errors import EvaluationError
from defenses.quantities import as_whole, shown

__all__ = [
    "REPEATS",
    "Answers",
    "check_repeats",
    "draws_interval",
    "exceeds",
    "majority",
    "mcnemar",
    "outnumbers",
    "share",
    "standing",
    "wilson_interval",
]

Answers = tuple[str, ...]
"""By image, its draws; empty where it was not asked about."""

REPEATS = 20
"""How often a random model is asked about each image, unless its attacks have more draws."""

_LEVEL = 0.01  # an honest model fails one comparison in a hundred by chance
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


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
    return _score_interval(hits / count, count)


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p value of McNemar's test (1947): are two discordant counts alike?

    How probable counts at least this unequal are where the two are equally good, in (0, 1].
    """
    return min(1.0, 2 * _tail(max(one, other), one + other))


def outnumbers(more: int, fewer: int, *, level: float = _LEVEL) -> bool:
    """Is a discordant count larger than its counterpart, beyond chance (McNemar, one-sided)?

    `level` is how often it may say yes where both are equally likely.
    """
    return _tail(more, more + fewer) < level


def majority(successes: int, trials: int) -> float:
    """The exact one-sided p value of a sign test: are more than half of all successes?

    How probable at least so many are where at most half of all are, in (0, 1].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise EvaluationError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    return max(_tail(successes, trials), 5e-324)  # never 0, however small; a float ends there


def exceeds(successes: int, trials: int, share: float) -> bool:
    """Is a proportion above `share`, beyond its 95 % interval? Never, where nothing was tried."""
    return trials > 0 and wilson_interval(successes, trials)[0] > share


def share(draws: str) -> float:
    """The share of draws that are right."""
    return draws.count("1") / len(draws)


def standing(
    correct: Sequence[bool],
    outcomes: Mapping[str, Sequence[bool | None]],
    repeats: Mapping[str, Answers],
) -> Iterator[tuple[str, Answers]]:
    """For `"clean"` and each attack, the draws of each image's worst version up to there.

    `repeats` has the draws by `"clean"` and attack, and is empty of a deterministic model, whose
    answers are `correct` and `outcomes` themselves.
    """
    rows = repeats.get("clean", tuple("01"[right] for right in correct))
    yield "clean", rows
    for name, found in outcomes.items():
        answers = repeats.get(name, tuple("0" if each is False else "" for each in found))
        pairs = zip(rows, answers, strict=True)
        rows = tuple(min(old, new or old, key=lambda row: row.count("1")) for old, new in pairs)
        yield name, rows


def draws_interval(rows: Answers) -> tuple[float, float]:
    """The 95 % interval of the mean share: Wilson's, widened by what the draws add.

    Shares between 0 and 1 of mean p vary by at most p (1 - p), which is what Wilson's interval of
    n images takes: it holds for shares, a little too wide. Draws that images of a batch have in
    common add the variance of the mean over draws, which is measured from draw to draw. Of one
    draw it is Wilson's interval itself. The worst of several versions is taken by the same draws
    that it is judged by, so that the share of an attacked image is low rather than high.

    There is at least one row, and all are equally long.
    """
    count, draws = len(rows), len(rows[0])
    right = sum(row.count("1") for row in rows)
    mean = right / (count * draws)
    common = 0.0
    if draws > 1:
        each = [sum(row[draw] == "1" for row in rows) / count for draw in range(draws)]
        common = sum((value - mean) ** 2 for value in each) / (draws - 1) / draws
    images = mean * (1 - mean) / count
    return _score_interval(mean, count * images / (images + common) if common else count)


def check_repeats(
    repeats: Mapping[str, Answers], outcomes: Mapping[str, Sequence[bool | None]], count: int
) -> None:
    """Refuses draws that do not belong to these outcomes of so many images."""
    if not repeats:
        return
    clean = repeats.get("clean", ())
    draws = len(clean[0]) if clean else 0
    fits = draws > 0 and list(repeats) == ["clean", *outcomes]
    for name, rows in repeats.items():
        expected = outcomes.get(name, [True] * count)
        fits = fits and len(rows) == len(expected) == count
        for row, outcome in zip(rows, expected, strict=False):
            fits = fits and set(row) <= {"0", "1"} and len(row) == (0 if outcome is None else draws)
            fits = fits and (name == "clean" or not row or ("1" in row) is outcome)
    if not fits:
        raise EvaluationError(
            "repeats: expected as many draws of 0 and 1 for each image and attack"
        )


def _score_interval(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; dependent trials count for fewer, not a whole number."""
    centre = (share + _Z * _Z / (2 * trials)) / (1 + _Z * _Z / trials)
    spread = share * (1 - share) / trials + _Z * _Z / (4 * trials * trials)
    half = _Z * math.sqrt(spread) / (1 + _Z * _Z / trials)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _tail(heads: int, tosses: int) -> float:
    """The probability of at least so many heads with a fair coin.

    In whole numbers up to the one division: floats would lose the small tails that decide.
    """
    ways = 0
    term = math.comb(tosses, heads)
    for count in range(heads, tosses + 1):
        ways += term
        term = term * (tosses - count) // (count + 1)
    probability: float = ways / 2**tosses
    return probability
