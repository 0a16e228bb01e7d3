"""Measurements: the one shape of every benchmark, so that anyone can read and compare them.

Deliberately not here: measuring. A row says what was found, never how to find it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secure_cnn.record.document import Document, conform, require

__all__ = ["Measurements", "Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured value with its spread.

    Attributes:
        case: What was worked on: a model or a recipe, such as `"resnet20"`.
        variant: The protection (`"plain"`, `"private"`, `"private+pgd"`, …) or a rival.
        metric: What was measured: `"time_ratio"` and `"memory_ratio"` are against `plain`.
        median: The middle of `n` values, in `unit`.
        low: The lower end of the spread, at most `median`.
        high: The upper end of the spread, at least `median`.
        unit: The unit of the three numbers, such as `"x"`, `"s"` or `"MiB"`.
        n: How many values were measured, at least 1.

    Raises:
        RunError: A value has the wrong type, or `low <= median <= high` does not hold.

    Example:
        >>> Row(case="compact", variant="private", metric="time_ratio",
        ...     median=1.3, low=1.2, high=1.5, unit="x", n=30).median
        1.3
    """

    case: str
    variant: str
    metric: str
    median: float
    low: float
    high: float
    unit: str
    n: int

    def __post_init__(self) -> None:
        """Refuse what is no measurement."""
        conform(self)
        require(self.n >= 1, "rows.n", "at least 1 measured value", self.n)
        numbers = (self.low, self.median, self.high)
        ordered = any(map(math.isnan, numbers)) or sorted(numbers) == list(numbers)
        require(ordered, f"rows[{self.case}, {self.metric}]", "low <= median <= high", numbers)

    @property
    def words(self) -> tuple[str, str, str]:
        """Low end, median and high end for a table, seconds in milliseconds."""
        scale, unit = {"s": (1000, " ms"), "1": (1, "")}.get(self.unit, (1, f" {self.unit}"))
        digits = 6 if self.unit == "1" else 2
        ends = (self.low, self.median, self.high)
        low, middle, high = (f"{scale * value:.{digits}f}" for value in ends)
        return low, middle + unit, high


@dataclass(frozen=True, kw_only=True)
class Measurements(Document):
    """A benchmark's document: rows, and where and with what they were measured.

    Attributes:
        created: When, as ISO 8601.
        hardware: As `secure_cnn.record.hardware` gives it.
        versions: As `secure_cnn.record.versions` gives it, and those of the rivals measured.
        rows: The measured values.

    Raises:
        RunError: A value has the wrong type.

    Example:
        >>> document = Measurements(created="2025-01-01T00:00:00Z", hardware={}, versions={})
        >>> document.to_dict()["schema"]
        1
    """

    created: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what the schema does not know."""
        conform(self)
