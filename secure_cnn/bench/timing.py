"""Fair timing: cases in turn within one run, ratios pair by pair, a median and how sure it is.

Nothing here knows what is timed. The clock and the order's generator are arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from secure_cnn.errors import RunError

__all__ = ["Estimate", "estimate", "interleave", "ratios"]

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median and the interval in which it lies with 95 % confidence."""

    median: float
    low: float
    high: float
    n: int


def interleave(
    cases: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[], float],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Runs every case once a round, in an order drawn anew, so that drift meets all alike.

    Args:
        cases: What to time, by name.
        rounds: Counted rounds, at least 1.
        warmup: Rounds that are run first and not counted.
        clock: Seconds, ever rising.
        seed: Of the order.

    Returns:
        Seconds of each counted call, round by round.

    Raises:
        RunError: There is no round to count.

    Example:
        >>> ticks = iter(range(100))
        >>> cases = {"a": lambda: None, "b": lambda: None}
        >>> interleave(cases, rounds=2, warmup=1, clock=lambda: next(ticks))
        {'a': [1, 1], 'b': [1, 1]}
    """
    if rounds < 1:
        raise RunError(f"rounds: expected at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(seed)
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for index in torch.randperm(len(names), generator=generator).tolist():
            start = clock()
            cases[names[index]]()
            elapsed = clock() - start
            if number >= warmup:
                seconds[names[index]].append(elapsed)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, how often the denominator goes into the numerator.

    Example:
        >>> ratios([2.0, 3.0], [1.0, 1.0])
        [2.0, 3.0]
    """
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median with its 95 % bootstrap interval (Efron 1979, percentile method).

    Args:
        values: At least one measurement.
        seed: Of the resampling.

    Example:
        >>> estimate([1.0, 1.0, 1.0])
        Estimate(median=1.0, low=1.0, high=1.0, n=3)
    """
    tensor = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(tensor), (_RESAMPLES, len(tensor)), generator=generator)
    medians = tensor[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(median=median(tensor.tolist()), low=low, high=high, n=len(tensor))
