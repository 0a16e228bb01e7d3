"""The page of a benchmark of protections: figures, the numbers beside them, and the noise."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from secure_cnn.pages.canvas import (
    CARD,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Canvas,
    colors_of,
    render,
    short,
)
from secure_cnn.pages.template import Table, breakable, fill
from secure_cnn.pages.tradeoff import Tradeoff
from secure_cnn.record import CONTROL, Measurements, Needs, NoiseCheck, Row, noise_checks, wording
from secure_cnn.record.document import write_text
from secure_cnn.record.tradeoff import Estimate, TradeoffPoint

__all__ = ["SHOWN_PARTS", "render_bench", "write_bench"]

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

_TRAINED = ("accuracy", "macro_recall", "robust_accuracy", "epsilon")
_ROW, _BAR = 36, 0.68
"""Height of a variant's row, and where in it the bar is; its name is above."""

_NAME, _ACROSS, _CURVES = 58, 3, 190
"""Letters of a name, parts in a line of the legend, and the height of the curves."""

_Found = Mapping[tuple[str, str], Row]
"""The rows of one case, by variant and metric."""

_Seconds = Mapping[str, Mapping[str, float]]
"""By variant, by part of a step."""


def write_bench(path: Path, measured: Measurements) -> None:
    """Writes the page of what `secure-cnn bench overhead` found, atomically."""
    write_text(path, render_bench(measured))


def render_bench(measured: Measurements) -> str:
    """The page as text; it needs no network and runs no script."""
    rows = measured.rows
    # A case with images per second is a training; one with an exponent was let grow.
    cases = [_case(rows, case) for case in _with(rows, "images_per_second")]
    axes = [_axis(rows, axis) for axis in _with(rows, "exponent")]
    sections = [(f"case-{n}", case["name"]) for n, case in enumerate(cases, start=1)]
    sections += [("growth", "How cost grows")] if axes else []
    values = {
        "measured": measured,
        "checks": noise_checks(rows),
        "cases": cases,
        "axes": axes,
        "sections": [*sections, ("conditions", "Conditions")],
    }
    return fill("bench.html.jinja", values)


def _with(rows: Iterable[Row], metric: str) -> list[str]:
    return list(dict.fromkeys(row.case for row in rows if row.metric == metric))


def _case(every: Iterable[Row], case: str) -> dict[str, Any]:
    rows = [row for row in every if row.case == case]
    check = next((each for each in noise_checks(rows)), None)
    ratios = [row for row in rows if row.metric == "time_ratio"]
    found = {(row.variant, row.metric): row for row in rows}
    parts = {
        variant: {
            part: found[variant, f"time_{part}"].median
            for part in SHOWN_PARTS
            if (variant, f"time_{part}") in found
        }
        for variant in (row.variant for row in ratios)
    }
    parts = {variant: own for variant, own in parts.items() if own}
    size, draw = (WIDTH, 42 + _ROW * len(ratios) + 26), partial(_ratios, ratios, check)
    figures = [render(f"ratio-{case}", f"Time against plain: {case}", size, draw)]
    if parts:
        top = 30 + 18 * math.ceil(len(_used(parts)) / _ACROSS)
        size, draw = (WIDTH, top + _ROW * len(parts) + 26), partial(_parts, parts, top)
        figures.append(render(f"parts-{case}", f"Parts of a step: {case}", size, draw))
    return {
        "name": case,
        "steps": _steps_table(ratios, found),
        "parts": _parts_table(parts) if parts else None,
        "trained": _trained_table(found),
        "figures": figures,
        "tradeoff": _tradeoff(found),
    }


def _steps_table(ratios: Sequence[Row], found: _Found) -> Table:
    head = ("variant", "ms", "÷ plain", "interval", "images/s", "memory MiB", "÷ plain")
    rows = [
        (
            breakable(row.variant),
            _milliseconds(found[row.variant, "time"].median),
            f"{row.median:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
            f"{found[row.variant, 'images_per_second'].median:.0f}",
            _median(found, row.variant, "memory", digits=2),
            _median(found, row.variant, "memory_ratio", digits=2),
            _median(found, row.variant, "disk", digits=0, unit=1024),
            str(row.n),
        )
        for row in ratios
    ]
    return (*head, "disk KiB", "rounds"), rows


def _median(found: _Found, variant: str, metric: str, *, digits: int, unit: float = 1) -> str:
    row = found.get((variant, metric))
    return "–" if row is None else f"{row.median / unit:.{digits}f}"


def _parts_table(parts: _Seconds) -> Table:
    used = _used(parts)
    cells = [
        [_milliseconds(own[part]) if part in own else "–" for part in used]
        for own in parts.values()
    ]
    names = map(breakable, parts)
    return ("variant", *used), [(name, *row) for name, row in zip(names, cells, strict=True)]


def _used(parts: _Seconds) -> list[str]:
    return [part for part in SHOWN_PARTS if any(part in own for own in parts.values())]


def _trained_table(found: _Found) -> Table | None:
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in found):
        results = {
            when: [found.get((variant, f"{name}_same_{when}")) for name in _TRAINED]
            for when in ("examples", "time")
        }
        if any(any(own) for own in results.values()):
            for when, (*shares, epsilon) in results.items():
                told = [wording.share(None if row is None else row.median) for row in shares]
                budget = "∞" if epsilon is None else f"{epsilon.median:.2f}"
                rows.append((breakable(variant), when, *told, budget))
    head = ("variant", "with the same", "accuracy", "macro recall", "robust accuracy", "ε")
    return (head, rows) if rows else None


def _tradeoff(found: _Found) -> Tradeoff | None:
    """What the variants give and take after as many examples; where a protection was measured."""

    def estimate(variant: str, metric: str) -> Estimate | None:
        row = found.get((variant, metric))
        return None if row is None else Estimate(value=row.median, low=row.low, high=row.high)

    points = []
    for variant in dict.fromkeys(variant for variant, _ in found):
        accuracy, recall, robust, epsilon = (
            estimate(variant, f"{metric}_same_examples") for metric in _TRAINED
        )
        if accuracy is not None and recall is not None:
            points.append(
                TradeoffPoint(
                    name=variant,
                    accuracy=accuracy,
                    macro_recall=recall.value,
                    robust_accuracy=robust,
                    epsilon=None if epsilon is None else epsilon.value,
                    time=estimate(variant, "time_ratio"),
                )
            )
    protected = any(point.robust_accuracy or point.epsilon is not None for point in points)
    colors = colors_of(point.name for point in points)
    return Tradeoff.between(points, colors, Needs()) if protected else None


def _axis(rows: Sequence[Row], axis: str) -> dict[str, Any]:
    times: dict[str, dict[float, float]] = {}
    for row in rows:
        what, _, size = row.case.rpartition(" ")
        if what == axis and row.metric == "time":
            times.setdefault(row.variant, {})[float(size)] = row.median
    own = [row for row in rows if row.case == axis]
    errors = {row.variant: f" ± {row.median:.3f}" for row in own if row.metric == "exponent_error"}
    exponents = [
        (
            breakable(row.variant),
            f"{row.median:.3f}{errors.get(row.variant, '')}",
            f"{row.low:.2f} to {row.high:.2f}",
        )
        for row in own
        if row.metric == "exponent"
    ]
    sizes = sorted({size for own in times.values() for size in own})
    cells = [
        (breakable(name), *(_milliseconds(own[size]) if size in own else "–" for size in sizes))
        for name, own in times.items()
    ]
    frame, draw = (WIDTH, _CURVES + 66 + 18 * len(times)), partial(_curves, axis, times)
    figure = render(f"scaling-{axis}", f"Time against {axis}", frame, draw) if times else None
    return {
        "name": axis,
        "exponents": (("variant", "exponent, ± s.e.", "95 % interval"), exponents),
        "times": (("variant", *(f"{axis} {size:g}" for size in sizes)), cells),
        "figure": figure,
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds >= 1e-5 else f"{1000 * seconds:.1g}"


def _ratios(rows: Sequence[Row], check: NoiseCheck | None, canvas: Canvas) -> None:
    """Each variant's time against plain with its interval; the machine's noise is a band."""
    canvas.title("Time of a step ÷ plain")
    axes = _under_names(canvas, [row.variant for row in rows], top=42, right=44)
    axes.set_xlim(0, 1.05 * max(row.high for row in rows))
    canvas.settle(axes)
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


def _parts(parts: _Seconds, top: float, canvas: Canvas) -> None:
    """Where the time of a step goes: a legend, then a stacked bar for each variant."""
    canvas.title("Milliseconds of a step, by part")
    used = _used(parts)
    for number, name in enumerate(used):
        x, y = WIDTH / _ACROSS * (number % _ACROSS), 34 + 18 * (number // _ACROSS)
        color, opacity = SHOWN_PARTS[name]
        canvas.text(x, y, "■" if opacity == 1 else "▥", color=color)
        canvas.text(x + 14, y, name)
    axes = _under_names(canvas, list(parts), top=top, right=10)
    axes.set_xlim(0, 1050 * (max(sum(own.values()) for own in parts.values()) or 1e-3))
    canvas.settle(axes)
    for number, own in enumerate(parts.values()):
        left, at = 0.0, number + _BAR
        for name in used:
            value, (color, alpha) = 1000 * own.get(name, 0.0), SHOWN_PARTS[name]
            if value:
                hatch = None if alpha == 1 else "////"
                axes.barh(at, value, 0.4, left, color=color, alpha=alpha, hatch=hatch, ec=CARD)
            left += value


def _curves(axis: str, times: Mapping[str, Mapping[float, float]], canvas: Canvas) -> None:
    """Time against size, both in logarithms, in which powers are straight lines."""
    canvas.title(f"Milliseconds against {axis}")
    axes = canvas.axes(40, 28, WIDTH - 54, _CURVES, grid="both")
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
        canvas.text(70, _CURVES + 75 + 18 * number, short(variant, _NAME - 10), room=WIDTH - 70)
    sizes = sorted({size for own in times.values() for size in own})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    ticks = ticks or [low, high]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    canvas.settle(axes)


def _under_names(canvas: Canvas, names: Sequence[str], *, top: float, right: float) -> Axes:
    """Axes with a row for each name, which is above its bar: so the longest has room."""
    axes = canvas.axes(12, top, WIDTH - 12 - right, _ROW * len(names), grid="x")
    axes.set(ylim=(len(names), 0), yticks=[])
    axes.xaxis.set_major_formatter("{x:g}")
    for number, name in enumerate(names):
        canvas.text(12, top + _ROW * number + 10, short(name, _NAME - 2), room=WIDTH - 12)
    return axes
