"""The figures of a benchmark of protections, each a pure function from rows to one SVG."""

from collections.abc import Mapping, Sequence
from functools import partial

from secure_cnn.report._canvas import CARD, HAIR, INK, MUTED, SERIES, Canvas, render, short
from secure_cnn.report.bench_noise import CONTROL, NoiseCheck
from secure_cnn.report.measurements import Row

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

_WIDTH, _ROW, _LEFT = 560, 24, 190
_NAME = 25


def ratio_bars(case: str, ratios: Sequence[Row], check: NoiseCheck | None) -> str:
    """Each variant's time against plain with its interval; the noise of the machine as a band.

    Args:
        case: What was worked on.
        ratios: The `time_ratio` rows of the case, at least one.
        check: Plain against plain, where it was timed.

    Returns:
        One SVG string.

    Example:
        >>> row = Row(case="compact", variant="private", metric="time_ratio",
        ...           median=1.5, low=1.4, high=1.6, unit="x", n=15)
        >>> ratio_bars("compact", [row], None).startswith("<svg")
        True
    """
    size = (_WIDTH, 28 + _ROW * len(ratios) + 26)
    return render(
        f"ratio-{case}", f"Time against plain: {case}", size, partial(_ratios, ratios, check)
    )


def parts_bars(case: str, parts: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time of a step goes, one stacked bar a variant.

    Args:
        case: What was worked on.
        parts: Seconds by part, by variant; at least one variant.

    Returns:
        One SVG string.

    Example:
        >>> parts_bars("compact", {"plain": {"forward": 0.1, "other": 0.01}}).startswith("<svg")
        True
    """
    size = (_WIDTH, 50 + _ROW * len(parts) + 40)
    return render(f"parts-{case}", f"Parts of a step: {case}", size, partial(_parts, parts))


def scaling_curves(axis: str, times: Mapping[str, Mapping[float, float]]) -> str:
    """Time against size, both in logarithms, one line a variant.

    Args:
        axis: What grows.
        times: Seconds by size, by variant; at least one variant.

    Returns:
        One SVG string.

    Example:
        >>> scaling_curves("batch", {"plain": {8: 0.1, 16: 0.2}}).startswith("<svg")
        True
    """
    draw = partial(_curves, axis, times)
    return render(f"scaling-{axis}", f"Time against {axis}", (_WIDTH, 270), draw)


def trained_dots(case: str, shares: Mapping[str, Mapping[str, float]]) -> str:
    """What each variant came to: with the same examples a dot, in the same time a diamond.

    Args:
        case: What was worked on.
        shares: By variant, by metric such as `accuracy_same_time`; at least one variant.

    Returns:
        One SVG string.

    Example:
        >>> trained_dots("compact", {"plain": {"accuracy_same_time": 0.9}}).startswith("<svg")
        True
    """
    size = (_WIDTH, 28 + _ROW * len(shares) + 26)
    return render(f"trained-{case}", f"Accuracy: {case}", size, partial(_dots, shares))


def _ratios(rows: Sequence[Row], check: NoiseCheck | None, canvas: Canvas) -> None:
    """Bars from 0, whiskers, and the ratio as words at the right."""
    canvas.text(0, 12, "Time of a step ÷ plain", bold=True, size=12.5)
    axes = canvas.axes(_LEFT, 28, _WIDTH - _LEFT - 60, _ROW * len(rows))
    axes.set(xlim=(0, 1.05 * max(row.high for row in rows)), ylim=(len(rows), 0))
    if check is not None:
        axes.axvspan(check.low, check.high, color=MUTED, alpha=0.25, lw=0)
        canvas.text(_WIDTH, 12, "▒ noise of this machine", color=MUTED, align="right")
    axes.axvline(1, color=INK, lw=1)
    for number, row in enumerate(rows):
        color = SERIES[0] if row.variant in ("plain", CONTROL) else SERIES[1]
        axes.barh(number + 0.5, row.median, 0.55, color=color, alpha=0.75)
        axes.hlines(number + 0.5, row.low, row.high, color=INK, lw=1.6)
        y = 28 + _ROW * (number + 0.5)
        _name(canvas, y, row.variant)
        canvas.text(_WIDTH, y, f"{row.median:.2f}", align="right", bold=True)
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)


def _parts(parts: Mapping[str, Mapping[str, float]], canvas: Canvas) -> None:
    """A legend in two lines, then the bars, milliseconds below."""
    used = [name for name in SHOWN_PARTS if any(name in own for own in parts.values())]
    for number, name in enumerate(used):
        x, y = 112 * (number % 5), 10 + 18 * (number // 5)
        color, _ = SHOWN_PARTS[name]
        sign = "■" if SHOWN_PARTS[name][1] == 1 else "▥"
        canvas.text(x, y, sign, color=color)
        canvas.text(x + 14, y, name)
    axes = canvas.axes(_LEFT, 50, _WIDTH - _LEFT - 16, _ROW * len(parts))
    widest = max(sum(own.values()) for own in parts.values()) or 1e-3
    axes.set(xlim=(0, 1050 * widest), ylim=(len(parts), 0))
    for number, (variant, own) in enumerate(parts.items()):
        left = 0.0
        for name in used:
            value, (color, opacity) = 1000 * own.get(name, 0.0), SHOWN_PARTS[name]
            if value:
                hatch = None if opacity == 1 else "////"
                axes.barh(
                    number + 0.5, value, 0.6, left, color=color, alpha=opacity, hatch=hatch, ec=CARD
                )
            left += value
        _name(canvas, 50 + _ROW * (number + 0.5), variant)
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)
    canvas.text(_WIDTH, 54 + _ROW * len(parts) + 22, "ms", color=MUTED, align="right")


def _curves(axis: str, times: Mapping[str, Mapping[float, float]], canvas: Canvas) -> None:
    """Straight lines are powers."""
    canvas.text(0, 12, f"Milliseconds against {axis}", bold=True, size=12.5)
    axes = canvas.axes(44, 30, _WIDTH - 44 - 170, 195)
    axes.set(xscale="log", yscale="log")
    for number, (variant, own) in enumerate(times.items()):
        color = SERIES[number % len(SERIES)]
        dashes = "-" if number < len(SERIES) else "--"
        costs = [1000 * seconds for seconds in own.values()]
        axes.plot(list(own), costs, color=color, lw=2, ls=dashes, marker="o", ms=4)
        canvas.text(_WIDTH - 160, 40 + 18 * number, "●", color=color)
        canvas.text(_WIDTH - 144, 40 + 18 * number, short(variant, 22))
    sizes = sorted({size for own in times.values() for size in own})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(color=HAIR, lw=1)
    canvas.text(44 + (_WIDTH - 214) / 2, 258, axis, color=MUTED, align="center")


def _dots(shares: Mapping[str, Mapping[str, float]], canvas: Canvas) -> None:
    """Accuracy in one colour, robust accuracy in the other."""
    kinds = (("accuracy", SERIES[1]), ("robust_accuracy", SERIES[2]))
    canvas.text(0, 12, "● same examples  ◇ same time", color=INK)
    for x, (kind, color) in zip((_WIDTH - 130, _WIDTH), kinds, strict=True):
        canvas.text(x, 12, kind.replace("_", " "), color=color, align="right", bold=True)
    axes = canvas.axes(_LEFT, 28, _WIDTH - _LEFT - 16, _ROW * len(shares))
    axes.set(xlim=(0, 1), ylim=(len(shares), 0))
    for number, (variant, own) in enumerate(shares.items()):
        for kind, color in kinds:
            for when, sign, fill in (("examples", "o", color), ("time", "D", "none")):
                share = own.get(f"{kind}_same_{when}")
                if share is not None:
                    axes.scatter(
                        [share], [number + 0.5], 40, marker=sign, c=fill, ec=color, lw=1.6, zorder=3
                    )
        _name(canvas, 28 + _ROW * (number + 0.5), variant)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)


def _name(canvas: Canvas, y: float, variant: str) -> None:
    """A variant left of its bar; a long one in two lines, broken where protections are joined."""
    parts = variant.split("+")
    if len(variant) <= _NAME or len(parts) == 1:
        canvas.text(_LEFT - 8, y, short(variant, _NAME), align="right")
        return
    lines = [("+".join(parts[:n]) + "+", "+".join(parts[n:])) for n in range(1, len(parts))]
    for words, down in zip(min(lines, key=lambda pair: max(map(len, pair))), (-6, 6), strict=True):
        canvas.text(_LEFT - 8, y + down, short(words, _NAME + 3), align="right", size=10)
