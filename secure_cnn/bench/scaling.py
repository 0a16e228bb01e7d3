"""How the cost grows as the work grows: batch, width, depth, image size, steps and attack steps.

A cost that grows as a power of the work is a straight line in logarithms; its slope is the
exponent: 1 where twice the work takes twice the time, below 1 where something is shared out. The
slope is fitted by least squares to the medians, one for each size: rounds of the same size are no
evidence on how a power law fits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import final

import torch
from scipy.stats import t as student
from torch import nn

from secure_cnn.bench.overhead import Stretch, take_turns
from secure_cnn.bench.parts import marks_for
from secure_cnn.bench.rows import measured_row
from secure_cnn.bench.step import Protection, Workload, synthetic
from secure_cnn.bench.timed_training import TimedTraining
from secure_cnn.bench.variant import PLAIN, variant_of
from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError
from secure_cnn.record import Row

__all__ = ["AXES", "Exponent", "Size", "fit_exponent", "measure_scaling", "network"]

_CLASSES = 10
_NOWHERE = Path("nothing-is-saved")


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work there is: a stack of convolutions on square images.

    Attributes:
        batch: Images a step.
        width: Channels of each convolution, a multiple of 4.
        depth: Convolutions.
        side: Height and width of an image, at least 8.
        steps: Steps of a stretch.
        attack_steps: Gradient steps of an iterative attack, for whoever makes the variants.

    Raises:
        RunError: A number is out of its range.
    """

    batch: int = 16
    width: int = 16
    depth: int = 4
    side: int = 16
    steps: int = 1
    attack_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("batch", "width", "depth", "side", "steps", "attack_steps"):
            value, least = getattr(self, name), {"width": 4, "side": 8}.get(name, 1)
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
    """The slope of log cost against log size, by least squares.

    Attributes:
        value: The slope.
        standard_error: Of the slope, from how far the points lie from the line.
        points: How many there are, at least 3.
    """

    value: float
    standard_error: float
    points: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval by Student's t with `points - 2` degrees of freedom."""
        half = float(student.ppf(0.975, self.points - 2)) * self.standard_error
        return self.value - half, self.value + half


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fits cost = a * size ** exponent.

    Args:
        sizes: At least three, > 0, two of them different.
        costs: As many, > 0.

    Raises:
        RunError: There are too few points, or one is not above 0.
    """
    if len(sizes) != len(costs) or len(sizes) < 3 or len(set(sizes)) < 2:
        raise RunError(
            f"expected at least 3 sizes, two of them different, with as many costs, got {sizes} "
            f"and {costs}"
        )
    if not all(math.isfinite(value) and value > 0 for value in (*sizes, *costs)):
        raise RunError(f"expected finite sizes and costs above 0, got {sizes} and {costs}")
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
    """Times every variant at every size of one axis, in turn within one run, and fits exponents.

    Args:
        axis: One of `AXES`.
        variants_at: The variants at a size, the same names at each, `plain` among them.
        rounds: Counted rounds, at least 1.
        device: Where the work runs; the CPU by default.

    Returns:
        Of the case of each size, such as `width 32`, the `time` of each variant's stretch and its
        `time_ratio`; of the case `width`, for each variant its `exponent` with the 95 % interval,
        and its `exponent_error`, the standard error.

    Raises:
        RunError: There is no such axis, no plain variant, or not the same variants at each size.
    """
    if axis not in AXES:
        raise RunError(f"axis: expected one of {', '.join(AXES)}, got {axis}")
    at = {size: variants_at(size) for size in AXES[axis]}
    names = list(next(iter(at.values())))
    if PLAIN not in names or any(set(own) != set(names) for own in at.values()):
        raise RunError(f"variants: expected {PLAIN} and the same others at each size, got {names}")
    place = device or torch.device("cpu")
    keys = {f"{name}\n{getattr(size, axis)}": (name, size) for size in at for name in names}
    turns = take_turns(
        {key: _stretch(size, at[size][name], place, clock) for key, (name, size) in keys.items()},
        rounds=rounds,
    )
    seconds = {keys[key]: [sum(each.values()) for each in own] for key, own in turns.items()}
    rows = []
    for (name, size), own in seconds.items():
        case = f"{axis} {getattr(size, axis)}"
        against = [a / b for a, b in zip(own, seconds[PLAIN, size], strict=True)]
        rows.append(measured_row(case, name, "time", own, "s"))
        rows.append(measured_row(case, name, "time_ratio", against, "x"))
    for name in names:
        sizes = [float(getattr(size, axis)) for size in AXES[axis]]
        costs = [median(seconds[name, size]) for size in AXES[axis]]
        rows += _exponent_rows(axis, name, fit_exponent(sizes, costs))
    return rows


def _stretch(
    size: Size, protection: Protection, device: torch.device, clock: Callable[[], float]
) -> Stretch:
    """Steps of that size."""
    spec = DataSpec(shape=(3, size.side, size.side), classes=tuple("0123456789"))
    images = synthetic(spec, size.batch)
    load = Workload(case="", model=network(size).to(device), split=images)
    marks = marks_for(device, clock)
    training = TimedTraining(load, variant_of(protection), _NOWHERE, marks, batch_size=size.batch)
    return partial(training.stretch, size.steps)


def _exponent_rows(axis: str, variant: str, found: Exponent) -> list[Row]:
    """The exponent with its interval, and its standard error."""
    low, high = found.interval
    ends = {"exponent": (low, found.value, high), "exponent_error": (found.standard_error,) * 3}
    return [
        Row(
            case=axis,
            variant=variant,
            metric=metric,
            low=smallest,
            median=middle,
            high=largest,
            unit="1",
            n=found.points,
        )
        for metric, (smallest, middle, largest) in ends.items()
    ]
