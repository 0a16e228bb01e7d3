"""What changed between two benchmarks beyond the noise, so that a project can gate on it.

The rule: a figure changed if its interval before and its interval after do not overlap, and by how
much is the ratio of the medians. Of two unchanged figures whose 95 % intervals are right and about
equally wide, fewer than one in a hundred is called changed; among hundreds of rows one may be, so
a gate asks for a least change too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from secure_cnn.errors import RunError
from secure_cnn.record import Measurements, Row, noise_checks

__all__ = ["BenchmarkComparison", "Change", "compare", "higher_is_better"]

_BETTER_IF_HIGHER = (
    *("accuracy", "macro_recall", "robust_accuracy", "autoattack", "agreement"),
    *("images_per_second", "payload_vs_aesgcm"),
)
_AFTER = ("_same_examples", "_same_time")


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure before and after."""

    before: Row
    after: Row

    @property
    def comparable(self) -> bool:
        """Whether both are numbers, in the same unit."""
        numbers = (self.before, self.after)
        known = not any(math.isnan(v) for row in numbers for v in (row.low, row.median, row.high))
        return known and self.before.unit == self.after.unit

    @property
    def beyond_noise(self) -> bool:
        """Whether the intervals do not overlap; touching is overlapping."""
        apart = self.after.low > self.before.high or self.after.high < self.before.low
        return self.comparable and apart

    @property
    def worsening(self) -> float:
        """By what part of the figure before it got worse; negative where it got better.

        Of a figure that was 0 any worsening is infinite.
        """
        if not self.comparable or self.before.median == self.after.median:
            return 0.0
        rise = self.after.median - self.before.median
        worse = -rise if higher_is_better(self.before.metric) else rise
        size = abs(self.before.median)
        return worse / size if size else math.copysign(math.inf, worse)

    @property
    def worse(self) -> bool:
        """Whether it got worse beyond the noise."""
        return self.beyond_noise and self.worsening > 0


@final
@dataclass(frozen=True, kw_only=True)
class BenchmarkComparison:
    """Two benchmarks side by side; `warnings` say what makes that less than fair."""

    changes: tuple[Change, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    warnings: tuple[str, ...]

    def worse(self, tolerance: float) -> tuple[Change, ...]:
        """What got worse beyond the noise and by more than this part of itself, worst first."""
        if not tolerance >= 0:
            raise RunError(f"tolerance: expected at least 0, got {tolerance}")
        found = [each for each in self.changes if each.worse and each.worsening > tolerance]
        return tuple(sorted(found, key=lambda each: -each.worsening))


def compare(
    before: Measurements, after: Measurements, *, metrics: Sequence[str] = ()
) -> BenchmarkComparison:
    """Compares figure by figure; rows belong together by case, variant and metric.

    Only `metrics` are compared, and all where none is named. A RunError says that no figure is in
    both, or that one is twice in a file.
    """
    first, second = _by_key(before, metrics), _by_key(after, metrics)
    shared = [key for key in first if key in second]
    if not shared:
        raise RunError(
            "expected two benchmarks with figures in common, got none; compare the same cases"
            + (f" and metrics ({', '.join(metrics)})" if metrics else "")
        )
    changes = tuple(Change(before=first[key], after=second[key]) for key in shared)
    return BenchmarkComparison(
        changes=changes,
        only_before=tuple(row for key, row in first.items() if key not in second),
        only_after=tuple(row for key, row in second.items() if key not in first),
        warnings=(
            *_differences("hardware", before.hardware, after.hardware),
            *_differences("versions", before.versions, after.versions),
            *(f"before: {it.verdict}" for it in noise_checks(before.rows) if not it.quiet),
            *(f"after: {it.verdict}" for it in noise_checks(after.rows) if not it.quiet),
            *(f"{_name(it.before)}: not comparable" for it in changes if not it.comparable),
        ),
    )


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better: shares that are right, and speeds; all else is a cost."""
    for ending in _AFTER:
        metric = metric.removesuffix(ending)
    return metric in _BETTER_IF_HIGHER


def _by_key(measured: Measurements, metrics: Sequence[str]) -> dict[tuple[str, str, str], Row]:
    found: dict[tuple[str, str, str], Row] = {}
    for row in measured.rows:
        key = (row.case, row.variant, row.metric)
        if metrics and row.metric not in metrics:
            continue
        if key in found:
            raise RunError(f"{_name(row)}: expected one row, got two; measure anew")
        found[key] = row
    return found


def _differences(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    names = sorted({*before, *after})
    told = {name: (before.get(name, "unknown"), after.get(name, "unknown")) for name in names}
    return [
        f"{what}: {name} was {old}, is {new}" for name, (old, new) in told.items() if old != new
    ]


def _name(row: Row) -> str:
    return f"{row.case}, {row.variant}, {row.metric}"
