"""Measurements: the one shape of every benchmark, so that anyone can read and compare them.

With the rows go the machine and the versions that a number depends on, and what the noise of that
machine was. Deliberately not here: measuring, and host names, user names and paths: they say
nothing about a number, and records are handed on.
"""

import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

import torch

from secure_cnn.record.document import Checked, Document, require

__all__ = [
    "CONTROL",
    "PLAIN",
    "Measurements",
    "NoiseCheck",
    "Row",
    "hardware",
    "noise_checks",
    "variant_name",
    "version",
    "versions",
]

PLAIN = "plain"
"""The variant without any protection, against which all others are measured."""
CONTROL = "plain-again"
"""The variant that is the plain training once more."""

_DISTRIBUTIONS = ("torch", "opacus", "torchattacks", "cryptography", "safetensors", "secure-cnn")


def variant_name(protections: Iterable[str]) -> str:
    """The name of the protections that are on, as every row and every record has it."""
    return "+".join(protections) or PLAIN


@dataclass(frozen=True, kw_only=True)
class Row(Checked):
    """One measured value with its spread: the median of `n` values, between `low` and `high`.

    `case` is a model or a recipe, `variant` the protection (`"plain"`, `"private+pgd"`, …) or a
    rival.
    """

    case: str
    variant: str
    metric: str
    median: float
    low: float
    high: float
    unit: str
    n: int

    def _check(self) -> None:
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

    `hardware` and `versions` are as the functions of that name give them, with the versions of the
    rivals measured; `created` is ISO 8601.
    """

    created: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class NoiseCheck:
    """How noisy the machine was: plain training timed against itself, in turn with all others.

    The truth of `ratio` is 1: any difference is noise, and no figure of the same benchmark is known
    more precisely than that. `within` are variants that cannot be told from plain.
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
        least = f"{100 * max(self.high - 1, 1 - self.low):.0f} %"
        said = (
            f"1 lies in it; differences below {least} are noise."
            if self.quiet
            else f"not 1: this machine is too noisy for differences below {least}."
        )
        said = f"{self.case}: plain against plain gave {found}, {said}"
        return f"{said} Within the noise: {', '.join(self.within)}." if self.within else said


def noise_checks(rows: Iterable[Row]) -> tuple[NoiseCheck, ...]:
    """One check for each case whose steps were timed with `CONTROL` among them."""
    ratios = [row for row in rows if row.metric == "time_ratio"]
    checks = []
    for control in (row for row in ratios if row.variant == CONTROL):
        noise = NoiseCheck(case=control.case, ratio=control, within=())
        within = tuple(
            row.variant
            for row in ratios
            if row.case == control.case
            and row.variant not in (PLAIN, CONTROL)
            and row.low <= noise.high
            and row.high >= noise.low
        )
        checks.append(NoiseCheck(case=control.case, ratio=control, within=within))
    return tuple(checks)


def versions() -> dict[str, str]:
    """The versions of Python and of everything that a number may depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _DISTRIBUTIONS}


def version(distribution: str) -> str:
    """The installed version of one distribution; one that is missing says so."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What this process may use of the machine: `cores` are logical, `threads` are torch's.

    `memory` is in bytes, None where the system does not tell; a GPU is named by its model.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "cpu": _cpu(Path("/proc/cpuinfo")),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
    }


def _cpu(cpuinfo: Path) -> str:
    """The processor's own name, or at least its architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
