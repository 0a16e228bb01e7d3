"""Figures of a run: each is a pure function from a record to one SVG string.

Every variant keeps its colour across all figures of a record, and plain is always grey. Figures are
drawn 360 pixels wide, the width of a phone, and laid out side by side by the page.
Deliberately not here: numbers that the record does not hold.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter

from secure_cnn.pages.canvas import (
    CARD,
    HAIR,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Canvas,
    render,
    short,
    tick_percent,
)
from secure_cnn.record.document import require
from secure_cnn.record.measurements import Row
from secure_cnn.record.results import EpochRecord, ResultRecord
from secure_cnn.record.run import RunRecord

__all__ = [
    "class_recall",
    "colors_of",
    "confusion_matrix",
    "cost_bars",
    "recall_dots",
    "variant_colors",
]

BAR = 11
MOST_CLASSES = 24
"""With more classes, single rows and cells cannot be read: figures show a part and say so."""

_PLAIN, _SHAPES = ("|", "▬"), (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"))
_COSTS = {"time_ratio": "Time per step, against plain", "memory_ratio": "Memory, against plain"}


def variant_colors(record: RunRecord) -> dict[str, str]:
    """The colour of every variant in a record, in the order in which they appear.

    Returns:
        A colour such as `"#0b62a8"` by variant; `"plain"` is grey and comes first.
    """
    parts: tuple[EpochRecord | ResultRecord | Row, ...]
    parts = (*record.epochs, *record.results, *record.cost)
    every = [part.variant for part in parts]
    return colors_of(every)


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in the order in which they appear; plain is grey and first."""
    others = [name for name in dict.fromkeys(names) if name != "plain"]
    hues = SERIES[1:]
    return {"plain": SERIES[0]} | {n: hues[i % len(hues)] for i, n in enumerate(others)}


def class_recall(record: RunRecord) -> str:
    """Accuracy, macro recall and recall per class of every variant; diamonds are under attack.

    With more than 24 classes, the 24 with the lowest recall in the last result are shown.
    """
    results = record.results
    order = list(range(len(record.data.classes)))
    if len(order) > MOST_CLASSES and results:
        order = sorted(order, key=lambda index: _or_zero(results[-1].recall[index]))[:MOST_CLASSES]
    thickness = BAR * max(1, len(results)) + 8
    height = 18 * (len(results) + 1) + 16 + thickness * (len(order) + 2) + 30
    draw = partial(_bars, record, order, thickness)
    return render("recall", "Accuracy and recall by class", (WIDTH, height), draw)


def confusion_matrix(record: RunRecord, variant: str) -> str:
    """Which class was taken for which: a row is a true class, its shade the share of that class.

    Counts are printed up to 24 classes; beyond, about every tenth class is named.

    Raises:
        RunError: The record has no result of that variant.
    """
    found = [result for result in record.results if result.variant == variant]
    known = [result.variant for result in record.results]
    require(bool(found), "variant", f"one of {known}", variant)
    longest = max(len(short(name, 10)) for name in record.data.classes)
    margin = 24 + 6.2 * longest
    below = 28 + (6.2 * longest if longest > 2 else 18)
    color = variant_colors(record)[variant]
    draw = partial(_confusion, found[0], record.data.classes, color, margin)
    size = (WIDTH, WIDTH - margin + below)
    return render("confusion", f"Confusion matrix of {variant}", size, draw)


def cost_bars(record: RunRecord, metric: Literal["time_ratio", "memory_ratio"]) -> str:
    """A cost against plain, one bar for each case and variant, with its spread as a whisker."""
    rows = [row for row in record.cost if row.metric == metric]
    draw = partial(_cost, rows, variant_colors(record), metric)
    return render(metric, f"Cost: {metric}", (WIDTH, 44 + 40 * max(1, len(rows))), draw)


def recall_dots(
    results: Mapping[str, ResultRecord], classes: Sequence[str], colors: Mapping[str, str]
) -> str:
    """Accuracy, macro recall and recall per class, a dot for each result; plain is a bar.

    With more than 24 classes, the 24 with the lowest recall in any result are shown.
    """
    every = list(results.values())
    order = sorted(
        range(len(classes)), key=lambda k: min((_or_zero(r.recall[k]) for r in every), default=0.0)
    )
    shown = sorted(order[:MOST_CLASSES])
    size = (WIDTH, 18 * len(results) + 22 * (len(shown) + 2) + 44)
    draw = partial(_dots, results, [(k, classes[k]) for k in shown], colors)
    return render("recall-dots", "Accuracy and recall by class", size, draw)


def _dots(
    results: Mapping[str, ResultRecord],
    classes: Sequence[tuple[int, str]],
    colors: Mapping[str, str],
    canvas: Canvas,
) -> None:
    """A legend, then a row for each class."""
    shapes = _shapes(results, colors)
    for index, name in enumerate(results):
        y = 9 + 18 * index
        canvas.text(96, y, shapes[name][1], color=colors[name])
        canvas.text(114, y, short(name, 34))
    top = 18 * len(results) + 12
    rows = ["accuracy", "macro recall", *(name for _, name in classes)]
    axes = canvas.axes(96, top, WIDTH - 96 - 20, 22 * len(rows))
    axes.set(xlim=(0, 1), ylim=(len(rows), 0))
    _share_axis(axes)
    at = [row + 0.5 for row in range(len(rows))]
    axes.set_yticks(at, [short(name) for name in rows])
    axes.hlines(at, 0, 1, color=HAIR, lw=1)
    for label in axes.get_yticklabels()[:2]:
        label.set_fontweight("bold")
    for name, result in results.items():
        shares = [result.accuracy, result.macro_recall, *(result.recall[k] for k, _ in classes)]
        known = [(x, y) for x, y in zip(shares, at, strict=True) if not math.isnan(x)]
        xs, ys = zip(*known, strict=True)
        marker, color = shapes[name][0], colors[name]
        if name == "plain":
            axes.scatter(xs, ys, 150, color, marker=marker, lw=3, zorder=2, clip_on=False)
        else:
            axes.scatter(xs, ys, 52, color, marker=marker, ec=CARD, lw=1, zorder=3, clip_on=False)


def _shapes(names: Iterable[str], colors: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """A marker and its sign for each name: another one where a colour comes again."""
    found: dict[str, tuple[str, str]] = {}
    seen = Counter[str]()
    for name in names:
        found[name] = _PLAIN if name == "plain" else _SHAPES[seen[colors[name]] % len(_SHAPES)]
        seen[colors[name]] += 1
    return found


def _bars(record: RunRecord, order: Sequence[int], thickness: float, canvas: Canvas) -> None:
    """Rows from the top: accuracy, macro recall, then the classes."""
    results, colors = record.results, variant_colors(record)
    top = _legend(results, colors, canvas)
    names = ["accuracy", "macro recall", *(record.data.classes[index] for index in order)]
    axes = canvas.axes(96, top, WIDTH - 96 - 44, thickness * len(names))
    axes.set(xlim=(0, 1), ylim=(thickness * len(names), 0))
    _share_axis(axes)
    axes.set_yticks([thickness * (row + 0.5) for row in range(len(names))])
    axes.set_yticklabels([short(name) for name in names])
    for index, result in enumerate(results):
        attacked = result.robust_recall
        clean = [result.accuracy, result.macro_recall, *(result.recall[i] for i in order)]
        robust: list[float | None] = [result.robust_accuracy, result.robust_macro_recall]
        robust += [attacked[i] if attacked else None for i in order]
        y = [thickness * row + 4 + BAR * (index + 0.5) for row in range(len(names))]
        axes.barh(y, [_or_zero(value) for value in clean], BAR - 1, color=colors[result.variant])
        _diamonds(axes, robust, y, colors[result.variant])
        for row in range(2):
            words = f"{clean[row]:.1%}"
            canvas.text(WIDTH - 40, top + y[row], words, color=colors[result.variant], size=10)
    for label in axes.get_yticklabels()[:2]:
        label.set_fontweight("bold")


def _legend(results: Sequence[ResultRecord], colors: dict[str, str], canvas: Canvas) -> float:
    """One line of words for each variant; returns where the drawing may begin."""
    lines = [("■", colors[result.variant], result.variant) for result in results]
    if any(result.robust_accuracy is not None for result in results):
        lines.append(("◇", INK, "the same under attack"))
    for index, (sign, color, words) in enumerate(lines):
        canvas.text(96, 9 + 18 * index, sign, color=color)
        canvas.text(112, 9 + 18 * index, short(words, 34), color=INK)
    return 18 * len(lines) + 16


def _diamonds(axes: Axes, shares: Sequence[float | None], y: Sequence[float], color: str) -> None:
    """The shares that are left under attack, where they were measured."""
    found = [(share, at) for share, at in zip(shares, y, strict=True) if share is not None]
    if found:
        xs, ys = zip(*found, strict=True)
        axes.scatter(xs, ys, s=36, marker="D", c=CARD, ec=color, lw=1.5, zorder=3, clip_on=False)


def _confusion(
    result: ResultRecord, classes: Sequence[str], color: str, margin: float, canvas: Canvas
) -> None:
    """Shade by share of the true class, counts where they can be read."""
    count, side = len(classes), canvas.width - margin - 2
    axes = canvas.axes(margin, 2, side, side)
    counts = np.array(result.confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = np.empty((*shares.shape, 4))
    # Opacity that stops where ink is still read on it serves light and dark pages alike.
    image[..., :3], image[..., 3] = to_rgb(color), 0.04 + 0.6 * shares**0.6
    axes.imshow(image, aspect="auto")
    shown = range(0, count, 1 if count <= MOST_CLASSES else math.ceil(count / 10))
    names = [short(classes[index], 10) for index in shown]
    axes.set_xticks(list(shown), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(list(shown), names)
    axes.tick_params(labelsize=11 if count <= 12 else 8.5)
    if count <= MOST_CLASSES:
        _counts(axes, counts)
    canvas.text(margin + side / 2, canvas.height - 8, "predicted", color=MUTED, align="center")
    axes.set_ylabel("true", labelpad=4)


def _counts(axes: Axes, counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    """The number in each cell that has one, and gaps between cells."""
    size = 11 if len(counts) <= 12 else 7.5
    for row, column in np.argwhere(counts):
        words = f"{counts[row, column]:.0f}"
        bold = "bold" if row == column else "normal"
        axes.text(column, row, words, color=INK, size=size, ha="center", va="center", weight=bold)
    edges = [index + 0.5 for index in range(len(counts) - 1)]
    axes.hlines(edges, -0.5, len(counts) - 0.5, color=CARD, lw=1.5)
    axes.vlines(edges, -0.5, len(counts) - 0.5, color=CARD, lw=1.5)


def _cost(rows: Sequence[Row], colors: dict[str, str], metric: str, canvas: Canvas) -> None:
    """A bar from nothing to the median, a whisker from low to high, and a line where plain is."""
    canvas.text(0, 12, _COSTS[metric], bold=True, size=12.5)
    if not rows:
        canvas.text(0, 40, "Nothing has been measured.", color=MUTED)
        return
    height = 40 * len(rows)
    axes = canvas.axes(0, 30, WIDTH - 64, height)
    axes.set(xlim=(0, 1.02 * max(1.0, *(row.high for row in rows))), ylim=(len(rows), 0))
    axes.set_xticks([])
    axes.set_yticks([])
    for index, row in enumerate(rows):
        color = colors[row.variant]
        axes.barh(index + 0.7, row.median, 0.34, color=color)
        axes.hlines(index + 0.7, row.low, row.high, color=INK, lw=1.5)
        ends = [row.low, row.high]
        axes.vlines(ends, index + 0.6, index + 0.8, color=INK, lw=1.5)
        axes.vlines(1, index + 0.46, index + 0.94, color=INK, lw=1.5, ls=(0, (2, 1)))
        y = 30 + 40 * index
        canvas.text(0, y + 11, short(f"{row.variant} · {row.case}", 40), color=INK)
        words = f"{row.median:.2f}×"
        canvas.text(WIDTH, y + 28, words, color=color, bold=True, align="right", size=12.5)


def _share_axis(axes: Axes) -> None:
    """An axis from 0 to 100 %."""
    axes.xaxis.set_major_formatter(FuncFormatter(tick_percent))
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)


def _or_zero(value: float) -> float:
    """A length to draw: nothing for a class without images."""
    return 0.0 if math.isnan(value) else value
