"""Curves of a run: test loss, test accuracy and ε against epochs, all variants in one frame.

Deliberately not here: smoothing. A point is what was measured at the end of an epoch, and an epoch
whose value is not finite has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secure_cnn.pages.canvas import (
    CARD,
    HAIR,
    INK,
    MUTED,
    WIDTH,
    Canvas,
    render,
    short,
    tick_percent,
)
from secure_cnn.pages.figures import variant_colors
from secure_cnn.record.run import RunRecord

__all__ = ["accuracy_curve", "epsilon_curve", "loss_curve"]


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One line of a curve: a value at each epoch where it is finite."""

    variant: str
    color: str
    points: tuple[tuple[float, float], ...]


def accuracy_curve(record: RunRecord) -> str:
    """Test accuracy against epochs, all variants in one frame."""
    series = _series(record, "test_accuracy")
    return render("accuracy", "Test accuracy by epoch", (WIDTH, 230), partial(_curve, series, "%"))


def loss_curve(record: RunRecord) -> str:
    """Mean test cross-entropy against epochs, all variants in one frame."""
    series = _series(record, "test_loss")
    return render("loss", "Test loss by epoch", (WIDTH, 230), partial(_curve, series, "loss"))


def epsilon_curve(record: RunRecord) -> str:
    """ε spent against epochs, for the variants that are private."""
    series = _series(record, "epsilon")
    return render("epsilon", "Epsilon spent by epoch", (WIDTH, 230), partial(_curve, series, "ε"))


def _series(record: RunRecord, value: str) -> list[_Series]:
    """One series for each variant that has a finite value at some epoch."""
    found = []
    for variant, color in variant_colors(record).items():
        epochs = [epoch for epoch in record.epochs if epoch.variant == variant]
        pairs = [(float(epoch.epoch), getattr(epoch, value)) for epoch in epochs]
        points = tuple((x, y) for x, y in pairs if y is not None and math.isfinite(y))
        if points:
            found.append(_Series(variant=variant, color=color, points=points))
    return found


def _curve(series: Sequence[_Series], unit: str, canvas: Canvas) -> None:
    """Lines with their names and last values at the right end, instead of a legend."""
    title = {"%": "Test accuracy", "loss": "Test loss", "ε": "ε spent"}[unit]
    canvas.text(0, 12, title, bold=True, size=12.5)
    if not series:
        canvas.text(0, 40, "No epoch has been recorded yet.", color=MUTED)
        return
    axes = canvas.axes(40, 34, WIDTH - 40 - 112, 158)
    _frame(axes, series, unit)
    for line in series:
        x, values = zip(*line.points, strict=True)
        axes.plot(x, values, color=line.color, lw=2, clip_on=False)
        if len(x) <= 15:
            axes.scatter(x, values, 36, c=line.color, ec=CARD, lw=1, zorder=3, clip_on=False)
    ends = [_pixel(axes, line.points[-1], canvas.height) for line in series]
    for line, y in zip(series, _spread(ends, 30, 44, 196), strict=True):
        canvas.text(WIDTH - 102, y - 7, short(line.variant), color=line.color, bold=True, size=11)
        canvas.text(WIDTH - 102, y + 7, _amount(line.points[-1][1], unit), color=INK, size=11)
    canvas.text(40 + (WIDTH - 152) / 2, 221, "epoch", color=MUTED, align="center")


def _frame(axes: Axes, series: Sequence[_Series], unit: str) -> None:
    """Limits around the data, whole epochs below, hairlines across."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    margin = 0.1 * (max(ys) - min(ys)) or 0.05
    low = max(0.0, min(ys) - margin) if unit == "%" else 0.0
    high = min(1.0, max(ys) + margin) if unit == "%" else 1.08 * max(ys) or 1.0
    alone = 0.5 if min(xs) == max(xs) else 0.0
    axes.set_xlim(min(xs) - alone, max(xs) + alone)
    axes.set_ylim(low, high)
    whole = range(int(min(xs)), int(max(xs)) + 1)
    axes.set_xticks(whole[:: math.ceil(len(whole) / 6)])
    axes.tick_params(axis="x", pad=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(tick_percent))
    axes.grid(axis="y", color=HAIR, lw=1)
    axes.set_axisbelow(True)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and, if they fit, between the limits."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = [0.0] * len(wanted)
    edge = low
    for index in order:
        places[index] = max(wanted[index], edge)
        edge = places[index] + gap
    edge = high
    for index in reversed(order):
        places[index] = min(places[index], edge)
        edge = places[index] - gap
    return places


def _pixel(axes: Axes, point: tuple[float, float], height: float) -> float:
    """How far below the figure's top a point of the axes lies."""
    return height - float(axes.transData.transform(point)[1])


def _amount(value: float, unit: str) -> str:
    """A last value in the unit of its curve; ε is never rounded down."""
    if unit == "%":
        return f"{value:.1%}"
    return f"{math.ceil(value * 100) / 100:.2f}" if unit == "ε" else f"{value:.3f}"
