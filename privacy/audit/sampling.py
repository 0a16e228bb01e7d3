"""Are the samples those of one independent secret coin a row and a step, of the planned chance?

The audit sees every row of every sample, canary or not. Each check asks one thing of that table of
zeros and ones, by exact binomial laws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from privacy.audit.report import Check, at_most, joint
from privacy.statistics import (
    Numbers,
    counts,
    disjoint_pairs,
    extreme,
    lean,
    odds,
    scatter,
    smallest,
)

__all__ = ["Samples", "check_sampling_battery"]


@dataclass(frozen=True)
class Samples:
    """Which rows were in which sample: how often each was read, [steps, rows], and the rate."""

    table: Numbers
    rate: float

    @property
    def coins(self) -> Numbers:
        """Which rows were in, zeros and ones [steps, rows]."""
        return np.minimum(self.table, 1.0)

    @property
    def both(self) -> float:
        """Chance that two independent coins are both heads."""
        return self.rate**2

    @property
    def same(self) -> float:
        """Chance that two independent coins fall alike."""
        return self.rate**2 + (1 - self.rate) ** 2


def check_sampling_battery(
    runs: dict[str, Samples], *, error: float, seed: int
) -> tuple[Check, ...]:
    """Every check of the sampler, each failing an honest one with probability at most `error`."""
    random = np.random.default_rng(seed)

    def of_all(
        tests: Callable[[Samples, np.random.Generator], dict[str, float]],
    ) -> dict[str, float]:
        found = {name: tests(samples, random) for name, samples in runs.items()}
        return {f"{test}, {name}": p for name, of in found.items() for test, p in of.items()}

    repeats = max(float(samples.table.max(initial=0.0)) for samples in runs.values())
    says = "how often one row is in one sample, at most once"
    once = at_most("rows once", repeats, 1.0, says=says)
    batteries = {
        "sampling": (_rate, "p-value of the share of all rows that were in the samples"),
        "sample sizes": (_sizes, "p-value of the samples' sizes, as those of independent coins"),
        "rows": (_rows, "p-value of how often each row was in, as all others"),
        "rows together": (_together, "p-value of how often two rows were in together"),
        "samples apart": (_apart, "p-value of how often a row was in two samples"),
    }
    checks = [
        joint(name, of_all(tests), error=error, says=words)
        for name, (tests, words) in batteries.items()
    ]
    return (once, *checks)


def _rate(samples: Samples, _: np.random.Generator) -> dict[str, float]:
    coins = samples.coins
    return {"all coins": float(odds(coins.sum(), coins.size, samples.rate))}


def _sizes(samples: Samples, random: np.random.Generator) -> dict[str, float]:
    """Sizes scatter as a binomial, on both sides, and without a trend or a rhythm."""
    steps, rows = samples.coins.shape
    sizes = samples.coins.sum(1)
    scores = counts(sizes, rows, samples.rate, random)
    # A sample that is cut, or filled, to its expected size scatters enough for the other tests.
    expected = rows * samples.rate
    larger = float(special.bdtrc(np.floor(expected), rows, samples.rate))
    smaller = float(special.bdtr(np.ceil(expected) - 1, rows, samples.rate))
    return {
        "one size": extreme(scores),
        "all sizes": scatter(scores),
        "sizes above the expected one": float(odds((sizes > expected).sum(), steps, larger)),
        "sizes below the expected one": float(odds((sizes < expected).sum(), steps, smaller)),
        "a trend": lean(scores, np.arange(steps) - (steps - 1) / 2),
        "every other size": lean(scores, (-1.0) ** np.arange(steps)),
    }


def _rows(samples: Samples, random: np.random.Generator) -> dict[str, float]:
    """No row is in more often than others; nor do they take turns."""
    steps, rows = samples.coins.shape
    scores = counts(samples.coins.sum(0), steps, samples.rate, random)
    return {
        "one row": extreme(scores),
        "all rows": scatter(scores),
        "first rows": lean(scores, np.arange(rows) - (rows - 1) / 2),
        "every other row": lean(scores, (-1.0) ** np.arange(rows)),
    }


def _together(samples: Samples, _: np.random.Generator) -> dict[str, float]:
    """No two rows share a coin, or exclude each other; nor do neighbours."""
    coins = samples.coins
    return {
        "two rows": _any_two(coins.T, samples),
        "rows so far apart": smallest(_at_distances(coins.T, samples)),
    }


def _apart(samples: Samples, _: np.random.Generator) -> dict[str, float]:
    """No sample depends on another one: not on the last, nor on any at a fixed distance."""
    coins = samples.coins
    return {
        "two samples": _any_two(coins, samples),
        "samples so far apart": smallest(_at_distances(coins, samples)),
    }


def _any_two(lines: Numbers, samples: Samples) -> float:
    """P-value of the least likely pair of lines of coins, corrected for the number of pairs."""
    number, length = lines.shape
    if number < 2:
        return 1.0
    pairs = np.triu_indices(number, 1)
    heads = (lines @ lines.T)[pairs]
    each = lines.sum(1)
    alike = length - each[pairs[0]] - each[pairs[1]] + 2 * heads
    # Few different counts occur: each one's odds are computed once.
    least = []
    for found, chance in ((heads, samples.both), (alike, samples.same)):
        least.append(float(odds(np.unique(found), length, chance).min()))
    return min(1.0, min(least) * 2 * len(heads))


def _at_distances(lines: Numbers, samples: Samples) -> list[float]:
    """P-values, for every distance, of how often two lines so far apart agree or are both heads."""
    number, length = lines.shape
    p_values = [1.0]
    for lag in range(1, min(number // 2, 64) + 1):
        for chosen in disjoint_pairs(number, lag):
            one, other = lines[chosen], lines[chosen + lag]
            trials = len(chosen) * length
            p_values.append(float(odds((one * other).sum(), trials, samples.both)))
            p_values.append(float(odds((one == other).sum(), trials, samples.same)))
    return p_values
