"""The picture of a certification: how many images are provably correct, by length of the attack.

Plain values go in, an SVG comes out. Deliberately not here: the certificates themselves.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secure_cnn.pages.canvas import (
    HAIR,
    MUTED,
    SERIES,
    WIDTH,
    Canvas,
    render,
    short,
    tick_percent,
)
from secure_cnn.record.document import require

__all__ = ["CurvePoint", "certificate_curve"]

_LEFT, _TOP, _PLOT, _LINE = 40, 30, 160, 18

CurvePoint = tuple[float, float, float, float]
"""Radius, certified accuracy, and the two ends of its interval."""


def certificate_curve(curves: Mapping[str, Sequence[CurvePoint]]) -> str:
    """Certified accuracy against the l2 radius, one line with its interval for each model.

    Args:
        curves: By name, at least one and at most six, points of ascending radius up to the largest
            that could be certified: for a `CertificationReport`, `summary.curve` of its `to_dict`.

    Raises:
        RunError: There is no curve, there are too many, or one is not of this form.
    """
    require(1 <= len(curves) <= len(SERIES), "curves", f"1 to {len(SERIES)}", len(curves))
    for name, points in curves.items():
        fits = len(points) > 0 and all(
            len(point) == 4 and 0 <= point[2] <= point[1] <= point[3] <= 1 for point in points
        )
        rises = all(a[0] < b[0] for a, b in pairwise(points))
        require(
            fits and rises and points[0][0] >= 0,
            f"curves.{name}",
            "points (radius, accuracy, low, high) of ascending radius and low <= accuracy <= high",
            list(points)[:2],
        )
    title = "Certified accuracy by radius"
    size = (WIDTH, _TOP + _PLOT + 52 + _LINE * (len(curves) + 2))
    return render("certificate", title, size, partial(_draw, curves))


def _draw(curves: Mapping[str, Sequence[CurvePoint]], canvas: Canvas) -> None:
    """Lines in pale bands, their names below."""
    canvas.text(0, 12, "Certified accuracy", bold=True, size=12.5)
    width, below = WIDTH - _LEFT - 14, _TOP + _PLOT + 32
    axes = canvas.axes(_LEFT, _TOP, width, _PLOT)
    _frame(axes, max(points[-1][0] for points in curves.values()))
    words = "l2 radius, pixels in [0, 1]"
    canvas.text(_LEFT + width / 2, below, words, color=MUTED, align="center")
    # A single curve is the subject of the picture, not its plain baseline: skip the grey.
    colors = SERIES[1:] if len(curves) < len(SERIES) else SERIES
    for number, ((name, points), color) in enumerate(zip(curves.items(), colors, strict=False)):
        radii, accuracy, low, high = zip(*points, strict=True)
        axes.fill_between(radii, low, high, color=color, alpha=0.16, lw=0)
        axes.plot(radii, accuracy, color=color, lw=2)
        axes.plot([radii[-1]] * 2, [accuracy[-1], 0], color=color, lw=1.2, ls=(0, (2, 2)))
        y = below + 22 + number * _LINE
        canvas.text(_LEFT, y, short(name, 30), color=color, bold=True)
        canvas.text(WIDTH - 14, y, f"{accuracy[0]:.1%} at 0", align="right")
    notes = ("Share of images proven correct under every change", "this long; band: 95 % interval.")
    for number, note in enumerate(notes):
        bottom = canvas.height - 8 - _LINE * (1 - number)
        canvas.text(_LEFT, bottom, note, color=MUTED)


def _frame(axes: Axes, largest: float) -> None:
    """From 0 to all, with hairlines across."""
    axes.set_xlim(0, 1.02 * largest or 1.0)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_percent))
    axes.tick_params(axis="x", pad=8)
    axes.grid(axis="y", color=HAIR, lw=1)
    axes.set_axisbelow(True)
