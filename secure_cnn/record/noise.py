"""Whether a machine was quiet enough for what a benchmark says: plain against plain in one run.

Two times the same training, in turn with all others, must differ by nothing. What they do differ
by is the noise of the machine, and no figure is better known than that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from secure_cnn.record.measurements import Row

__all__ = ["CONTROL", "NoiseCheck", "noise_checks"]

CONTROL = "plain-again"
"""The variant that is the plain training once more."""


@final
@dataclass(frozen=True, kw_only=True)
class NoiseCheck:
    """What plain against plain came to.

    Attributes:
        case: What was worked on.
        ratio: Plain against plain, of which the truth is 1.
        within: Variants whose ratio cannot be told from the plain step's own.
    """

    case: str
    ratio: Row
    within: tuple[str, ...]

    @property
    def quiet(self) -> bool:
        """Whether 1 lies in the interval, as it does in about 19 of 20 runs on any machine."""
        return self.ratio.low <= 1 <= self.ratio.high

    @property
    def low(self) -> float:
        """The lower end of what noise alone makes of 1."""
        return min(self.ratio.low, 1.0)

    @property
    def high(self) -> float:
        """The upper end of what noise alone makes of 1."""
        return max(self.ratio.high, 1.0)

    @property
    def verdict(self) -> str:
        """What to think of the figures of this case, in a sentence or two."""
        found = f"{self.ratio.median:.2f} ({self.ratio.low:.2f} to {self.ratio.high:.2f})"
        least = 100 * max(self.high - 1, 1 - self.low)
        said = (
            f"{self.case}: plain against plain gave {found}, 1 lies in it; differences below "
            f"{least:.0f} % are noise."
            if self.quiet
            else f"{self.case}: plain against plain gave {found}, not 1: this machine is too noisy "
            f"for differences below {least:.0f} %."
        )
        return f"{said} Within the noise: {', '.join(self.within)}." if self.within else said


def noise_checks(rows: Iterable[Row]) -> tuple[NoiseCheck, ...]:
    """One check for each case that was timed with its control.

    Args:
        rows: Rows of a benchmark; the `time_ratio` of each variant against `plain` among them.
    """
    ratios = [row for row in rows if row.metric == "time_ratio"]
    checks = []
    for control in (row for row in ratios if row.variant == CONTROL):
        low, high = min(control.low, 1.0), max(control.high, 1.0)
        within = tuple(
            row.variant
            for row in ratios
            if row.case == control.case
            and row.variant not in ("plain", CONTROL)
            and row.low <= high
            and row.high >= low
        )
        checks.append(NoiseCheck(case=control.case, ratio=control, within=within))
    return tuple(checks)
