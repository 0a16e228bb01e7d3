"""How the cost grows as the work grows: batch, width, depth, image size, steps and attack steps.

A cost that grows as a power of the work is a straight line in logarithms; its slope is the
exponent: 1 where twice the work takes twice the time, below 1 where something is shared out. The
slope is fitted by least squares to the medians, one for each size: rounds of the same size are no
evidence on how a power law fits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import final

import torch
from scipy.stats import t as student
from torch import nn

from secure_cnn.bench.protection import Protection
from secure_cnn.bench.step import Workload, synthetic
from secure_cnn.bench.timed_training import TimedTraining
from secure_cnn.bench.timing import cost_rows, marks_for, take_turns
from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError
from secure_cnn.record import PLAIN, Row

__all__ = ["AXES", "Exponent", "Size", "fit_exponent", "measure_scaling", "network"]

_CLASSES = 10
_NOWHERE = Path("nothing-is-saved")
_WARMUP = 2
_LEAST = {"width": 4, "side": 8}


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work there is: `depth` convolutions of `width` channels on square images.

    A stretch has so many `steps`; `attack_steps` are for whoever makes the variants.
    """

    batch: int = 16
    width: int = 16
    depth: int = 4
    side: int = 16
    steps: int = 1
    attack_steps: int = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = _LEAST.get(name, 1)
            if value < least:
                raise RunError(f"{name}: expected at least {least}, got {value}")
        if self.width % 4:
            raise RunError(f"width: expected a multiple of 4, got {self.width}")


AXES: dict[str, tuple[Size, ...]] = {
    "batch": tuple(Size(batch=n) for n in (8, 16, 32, 64)),
    "width": tuple(Size(width=n) for n in (8, 16, 32, 64)),
    "depth": tuple(Size(depth=n) for n in (2, 4, 8, 16)),
    "side": tuple(Size(side=n) for n in (8, 16, 32, 64)),
    "steps": tuple(Size(steps=n) for n in (1, 2, 4, 8)),
    "attack_steps": tuple(Size(attack_steps=n) for n in (1, 2, 4, 8)),
}
"""What grows, and its sizes, each twice the one before; all else stays as `Size` has it."""


@final
@dataclass(frozen=True, kw_only=True)
class Exponent:
    """The slope of log cost against log size, by least squares, of at least 3 points."""

    value: float
    standard_error: float
    points: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval by Student's t with `points - 2` degrees of freedom."""
        half = float(student.ppf(0.975, self.points - 2)) * self.standard_error
        return self.value - half, self.value + half


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fits cost = a * size ** exponent to at least three sizes, two of them different."""
    if len(sizes) != len(costs) or len(sizes) < 3 or len(set(sizes)) < 2:
        raise RunError(
            f"expected at least 3 sizes, two of them different, with as many costs, got {sizes} "
            f"and {costs}"
        )
    if not all(math.isfinite(value) and value > 0 for value in (*sizes, *costs)):
        raise RunError(f"expected finite sizes and costs above 0, got {sizes} and {costs}")
    # By hand: scipy's linregress takes the error from 1 - r², where rounding hides a small one.
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    points = list(zip(x, y, strict=True))
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in points) / spread
    left = math.fsum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in points)
    error = math.sqrt(left / (len(x) - 2) / spread)
    return Exponent(value=slope, standard_error=error, points=len(x))


def network(size: Size) -> nn.Sequential:
    """Convolutions of the same width, each with GroupNorm and ReLU, then a mean and a linear layer.

    Its weights are drawn by torch; the global random state is as it was.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for number in range(size.depth):
            layers += [
                nn.Conv2d(size.width if number else 3, size.width, 3, padding=1, bias=False),
                nn.GroupNorm(size.width // 4, size.width),
                nn.ReLU(),
            ]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size.width, _CLASSES)]
    return nn.Sequential(*layers)


def measure_scaling(
    axis: str,
    variants_at: Callable[[Size], Mapping[str, Protection]],
    *,
    rounds: int,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times every variant at every size of one of `AXES`, in turn within one run, and fits.

    `variants_at` gives the same names at each size, `plain` among them. Of the case of each size,
    such as `width 32`, there is the `time` of each variant's stretch and its `time_ratio`; of the
    case `width`, for each variant its `exponent` with the 95 % interval, and its standard error
    `exponent_error`.
    """
    if axis not in AXES:
        raise RunError(f"axis: expected one of {', '.join(AXES)}, got {axis}")
    at = {size: variants_at(size) for size in AXES[axis]}
    names = list(next(iter(at.values())))
    if PLAIN not in names or any(set(own) != set(names) for own in at.values()):
        raise RunError(f"variants: expected {PLAIN} and the same others at each size, got {names}")
    place = device or torch.device("cpu")
    works = {float(getattr(size, axis)): size for size in AXES[axis]}
    stretches = {
        (name, work): _stretch(size, at[size][name], place, clock)
        for work, size in works.items()
        for name in names
    }
    seconds = take_turns(stretches, rounds=rounds, warmup=_WARMUP)
    rows = []
    for work in works:
        own = {name: seconds[name, work] for name in names}
        rows += cost_rows(f"{axis} {work:g}", own)
    for name in names:
        costs = [median(seconds[name, work]) for work in works]
        rows += _exponent_rows(axis, name, fit_exponent(list(works), costs))
    return rows


def _stretch(
    size: Size, protection: Protection, device: torch.device, clock: Callable[[], float]
) -> Callable[[], float]:
    spec = DataSpec(shape=(3, size.side, size.side), classes=tuple("0123456789"))
    load = Workload(case="", model=network(size).to(device), split=synthetic(spec, size.batch))
    marks = marks_for(device, clock)
    training = TimedTraining(load, protection, _NOWHERE, marks, batch_size=size.batch)
    return lambda: sum(training.stretch(size.steps).values())


def _exponent_rows(axis: str, variant: str, found: Exponent) -> list[Row]:
    low, high = found.interval
    fitted = Row(
        case=axis,
        variant=variant,
        metric="exponent",
        low=low,
        median=found.value,
        high=high,
        unit="1",
        n=found.points,
    )
    error = found.standard_error
    return [fitted, replace(fitted, metric="exponent_error", low=error, median=error, high=error)]
