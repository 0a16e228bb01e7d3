"""The figures of a benchmark of protections, each a pure function from rows to one SVG."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes

from secure_cnn.pages.canvas import CARD, HAIR, INK, MUTED, SERIES, WIDTH, Canvas, render, short
from secure_cnn.record.measurements import Row
from secure_cnn.record.noise import CONTROL, NoiseCheck

__all__ = ["SHOWN_PARTS", "parts_bars", "ratio_bars", "scaling_curves", "trained_dots"]

SHOWN_PARTS = {
    "data": (SERIES[0], 1.0),
    "attack": (SERIES[2], 1.0),
    "forward": (SERIES[1], 1.0),
    "backward": (SERIES[1], 0.55),
    "clipping": (SERIES[3], 1.0),
    "noise": (SERIES[3], 0.5),
    "optimizer": (SERIES[4], 1.0),
    "averaging": (SERIES[4], 0.5),
    "saving": (SERIES[5], 1.0),
    "other": (MUTED, 0.35),
}
"""Colour and opacity of each part of a step, in the order in which they are drawn."""

_ROW, _BAR = 36, 0.68
"""Height of a variant's row, and where in it the bar is; its name is above."""

_NAME, _ACROSS, _CURVES = 58, 3, 190
"""Letters of a name, parts in a line of the legend, and the height of the curves."""


def ratio_bars(case: str, ratios: Sequence[Row], check: NoiseCheck | None) -> str:
    """Each variant's time against plain with its interval; the noise of the machine as a band.

    Args:
        ratios: The `time_ratio` rows of the case, at least one.
        check: Plain against plain, where it was timed.
    """
    size = (WIDTH, 42 + _ROW * len(ratios) + 26)
    draw = partial(_ratios, ratios, check)
    return render(f"ratio-{case}", f"Time against plain: {case}", size, draw)


def parts_bars(case: str, parts: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time of a step goes, one stacked bar a variant.

    Args:
        parts: Seconds by part, by variant; at least one variant.
    """
    used = [name for name in SHOWN_PARTS if any(name in own for own in parts.values())]
    top = 30 + 18 * math.ceil(len(used) / _ACROSS)
    size = (WIDTH, top + _ROW * len(parts) + 26)
    draw = partial(_parts, parts, used, top)
    return render(f"parts-{case}", f"Parts of a step: {case}", size, draw)


def scaling_curves(axis: str, times: Mapping[str, Mapping[float, float]]) -> str:
    """Time against size, both in logarithms, one line a variant.

    Args:
        times: Seconds by size, by variant; at least one variant.
    """
    draw = partial(_curves, axis, times)
    size = (WIDTH, _CURVES + 66 + 18 * len(times))
    return render(f"scaling-{axis}", f"Time against {axis}", size, draw)


def trained_dots(case: str, shares: Mapping[str, Mapping[str, float]]) -> str:
    """What each variant came to: with the same examples a dot, in the same time a diamond.

    Args:
        shares: By variant, by metric such as `accuracy_same_time`; at least one variant.
    """
    size = (WIDTH, 54 + _ROW * len(shares) + 26)
    return render(f"trained-{case}", f"Accuracy: {case}", size, partial(_dots, shares))


def _ratios(rows: Sequence[Row], check: NoiseCheck | None, canvas: Canvas) -> None:
    """Bars from 0, whiskers, and the ratio as words at the right."""
    canvas.text(0, 12, "Time of a step ÷ plain", bold=True, size=12.5)
    axes = _under_names(canvas, [row.variant for row in rows], top=42, right=44)
    axes.set_xlim(0, 1.05 * max(row.high for row in rows))
    if check is not None:
        axes.axvspan(check.low, check.high, color=MUTED, alpha=0.25, lw=0)
        canvas.text(0, 30, "▒ noise of this machine", color=MUTED)
    for number, row in enumerate(rows):
        color = SERIES[0] if row.variant in ("plain", CONTROL) else SERIES[1]
        axes.barh(number + _BAR, row.median, 0.36, color=color, alpha=0.75)
        axes.hlines(number + _BAR, row.low, row.high, color=INK, lw=1.6)
        axes.vlines(1, number + _BAR - 0.26, number + _BAR + 0.26, color=INK, lw=1)
        y = 42 + _ROW * (number + _BAR)
        canvas.text(WIDTH, y, f"{row.median:.2f}", align="right", bold=True)


def _parts(
    parts: Mapping[str, Mapping[str, float]], used: Sequence[str], top: float, canvas: Canvas
) -> None:
    """A legend, then the bars, milliseconds below."""
    canvas.text(0, 12, "Milliseconds of a step, by part", bold=True, size=12.5)
    for number, name in enumerate(used):
        x, y = WIDTH / _ACROSS * (number % _ACROSS), 34 + 18 * (number // _ACROSS)
        color, opacity = SHOWN_PARTS[name]
        canvas.text(x, y, "■" if opacity == 1 else "▥", color=color)
        canvas.text(x + 14, y, name)
    axes = _under_names(canvas, list(parts), top=top, right=10)
    axes.set_xlim(0, 1050 * (max(sum(own.values()) for own in parts.values()) or 1e-3))
    for number, own in enumerate(parts.values()):
        left, at = 0.0, number + _BAR
        for name in used:
            value, (color, alpha) = 1000 * own.get(name, 0.0), SHOWN_PARTS[name]
            if value:
                hatch = None if alpha == 1 else "////"
                axes.barh(at, value, 0.4, left, color=color, alpha=alpha, hatch=hatch, ec=CARD)
            left += value


def _curves(axis: str, times: Mapping[str, Mapping[float, float]], canvas: Canvas) -> None:
    """Straight lines are powers; their names below."""
    canvas.text(0, 12, f"Milliseconds against {axis}", bold=True, size=12.5)
    axes = canvas.axes(40, 28, WIDTH - 54, _CURVES)
    axes.set(xscale="log", yscale="log")
    canvas.text(40 + (WIDTH - 54) / 2, _CURVES + 53, axis, color=MUTED, align="center")
    signs = canvas.axes(40, _CURVES + 66, 22, 18 * len(times))
    signs.set(xlim=(0, 1), ylim=(len(times), 0), xticks=[], yticks=[])
    for number, (variant, own) in enumerate(times.items()):
        color = SERIES[number % len(SERIES)]
        dashes = "-" if number < len(SERIES) else "--"
        costs = [1000 * seconds for seconds in own.values()]
        axes.plot(list(own), costs, color=color, lw=2, ls=dashes, marker="o", ms=4)
        signs.plot([0, 1], [number + 0.5] * 2, color=color, lw=2, ls=dashes)
        canvas.text(70, _CURVES + 75 + 18 * number, short(variant, _NAME - 10))
    sizes = sorted({size for own in times.values() for size in own})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(color=HAIR, lw=1)


def _dots(shares: Mapping[str, Mapping[str, float]], canvas: Canvas) -> None:
    """Accuracy in one colour, robust accuracy in the other."""
    kinds = (("accuracy", SERIES[1]), ("robust_accuracy", SERIES[2]))
    for x, (kind, color) in zip((0, 70), kinds, strict=True):
        canvas.text(x, 12, kind.replace("_", " "), color=color, bold=True)
    canvas.text(0, 32, "● with the same examples   ◇ in the same time")
    axes = _under_names(canvas, list(shares), top=54, right=18)
    axes.set_xlim(0, 1)
    for number, own in enumerate(shares.values()):
        for kind, color in kinds:
            for when, sign, fill in (("examples", "o", color), ("time", "D", "none")):
                share = own.get(f"{kind}_same_{when}")
                if share is not None:
                    at = ([share], [number + _BAR])
                    axes.scatter(*at, 40, marker=sign, c=fill, ec=color, lw=1.6, zorder=3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _under_names(canvas: Canvas, names: Sequence[str], *, top: float, right: float) -> Axes:
    """Axes with a row for each name, which is above its bar: so the longest has room."""
    axes = canvas.axes(12, top, WIDTH - 12 - right, _ROW * len(names))
    axes.set_ylim(len(names), 0)
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)
    for number, name in enumerate(names):
        canvas.text(12, top + _ROW * number + 10, short(name, _NAME - 2))
    return axes
