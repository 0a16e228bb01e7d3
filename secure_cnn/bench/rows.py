"""From what was measured to a row of the results: repeated values, or a share of a count."""

from collections.abc import Sequence

import defenses
from secure_cnn.bench.timing import estimate
from secure_cnn.record import Row

__all__ = ["measured_row", "share_row"]


def measured_row(case: str, variant: str, metric: str, values: Sequence[float], unit: str) -> Row:
    """Values as their median with its 95 % bootstrap interval; a single one is exact."""
    found = estimate(values)
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        median=found.median,
        low=found.low,
        high=found.high,
        unit=unit,
        n=found.n,
    )


def share_row(case: str, variant: str, metric: str, right: int, count: int) -> Row:
    """A share of the images with its 95 % interval (Wilson 1927)."""
    low, high = defenses.wilson_interval(right, count)
    share = right / count
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        median=share,
        low=min(low, share),
        high=max(high, share),
        unit="1",
        n=count,
    )
