"""Class by class: recall before and after as a table and as figures, and the confusion matrix.

With more than 24 classes single rows and cells cannot be read: figures then show a part.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from secure_cnn.pages.canvas import (
    CARD,
    HAIR,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Canvas,
    percents,
    render,
    short,
    variant_colors,
)
from secure_cnn.pages.template import Table
from secure_cnn.record import ResultRecord, RunRecord, wording
from secure_cnn.record.document import require

__all__ = [
    "MOST_CLASSES",
    "attacked_recall",
    "class_recall",
    "confusion_matrix",
    "recall_dots",
    "recall_rows",
    "recall_table",
]

MOST_CLASSES = 24

_NAMES, _BAR = 96, 11
_PLAIN, _SHAPES = ("|", "▬"), (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"))
_CLEAN, _ATTACKED = SERIES[1], SERIES[2]

_Share = float | None


def recall_table(
    results: Mapping[str, ResultRecord], classes: Sequence[str], baseline: str | None
) -> Table:
    """The head and the rows: accuracy, macro recall, then every class.

    Each result has a column, one for its change against the one named `baseline` in percentage
    points, and one for what is left under attack where that was measured.
    """
    head, columns = ["class"], [["accuracy", "macro recall", *classes]]
    before = None if baseline is None else _shares(results[baseline])
    for name, result in results.items():
        own = _shares(result)
        head.append(name)
        columns.append([wording.share(share) for share in own])
        if before is not None and name != baseline:
            head.append("change")
            columns.append([_change(*pair) for pair in zip(before, own, strict=True)])
        if result.robust_recall is not None:
            head.append("attacked")
            attacked = (result.robust_accuracy, result.robust_macro_recall, *result.robust_recall)
            columns.append([wording.share(share) for share in attacked])
    return tuple(head), list(zip(*columns, strict=True))


def recall_rows(
    classes: Sequence[str], summary: Mapping[str, Any]
) -> list[tuple[str, _Share, _Share]]:
    """Name, clean share and attacked share: accuracy, macro recall, then the classes.

    `summary` is that of a robustness report. With more than 24 classes, those with the lowest
    recall under attack.
    """
    shown = sorted(_lowest([summary["worst_case_recall"]]))
    return [
        ("accuracy", summary["clean_accuracy"], summary["worst_case_accuracy"]),
        ("macro recall", summary["clean_macro_recall"], summary["worst_case_macro_recall"]),
        *((classes[k], summary["clean_recall"][k], summary["worst_case_recall"][k]) for k in shown),
    ]


def class_recall(record: RunRecord) -> str:
    """Accuracy, macro recall and recall per class of every variant; diamonds are under attack.

    With more than 24 classes, the 24 with the lowest recall in the last result are shown.
    """
    results, order = record.results, list(range(len(record.data.classes)))
    if len(order) > MOST_CLASSES and results:
        order = _lowest([results[-1].recall])
    thickness = _BAR * max(1, len(results)) + 8
    height = 18 * (len(results) + 1) + 16 + thickness * (len(order) + 2) + 30
    draw = partial(_bars, record, order, thickness)
    return render("recall", "Accuracy and recall by class", (WIDTH, height), draw)


def recall_dots(
    results: Mapping[str, ResultRecord], classes: Sequence[str], colors: Mapping[str, str]
) -> str:
    """Accuracy, macro recall and recall per class, a dot for each result; plain is a bar.

    With more than 24 classes, the 24 with the lowest recall in any result are shown.
    """
    shown = sorted(_lowest([result.recall for result in results.values()]))
    size = (WIDTH, 18 * len(results) + 22 * (len(shown) + 2) + 44)
    draw = partial(_dots, results, [(k, classes[k]) for k in shown], colors)
    return render("recall-dots", "Accuracy and recall by class", size, draw)


def attacked_recall(rows: Sequence[tuple[str, _Share, _Share]]) -> str:
    """The `recall_rows` of an evaluation: clean as a bar and under attack as a diamond."""
    size = (WIDTH, 30 + 20 * len(rows) + 26)
    title = "Recall by class, clean and attacked"
    return render("robust-recall", title, size, partial(_attacked, rows))


def confusion_matrix(record: RunRecord, variant: str) -> str:
    """Which class was taken for which: a row is a true class, its shade the share of that class.

    Counts are printed up to 24 classes; beyond, about every tenth class is named. A RunError says
    that the record has no result of that variant.
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


def _shares(result: ResultRecord) -> tuple[float, ...]:
    return (result.accuracy, result.macro_recall, *result.recall)


def _change(before: float, after: float) -> str:
    points = 100 * (after - before)
    if math.isnan(points):
        return "–"
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "−")


def _lowest(recalls: Sequence[Sequence[_Share]]) -> list[int]:
    worst = [min(map(_or_zero, each)) for each in zip(*recalls, strict=True)]
    return sorted(range(len(worst)), key=worst.__getitem__)[:MOST_CLASSES]


def _or_zero(share: _Share) -> float:
    """A length to draw: nothing for a class without images."""
    return 0.0 if share is None or math.isnan(share) else share


def _rows(
    canvas: Canvas, names: Sequence[str], *, top: float, height: float, right: float
) -> tuple[Axes, list[float]]:
    """Axes from 0 to 100 % with a row for each name, the first two in bold; and their middles."""
    across = WIDTH - _NAMES - right
    axes = canvas.axes(_NAMES, top, across, height * len(names), grid="x")
    axes.set(xlim=(0, 1), ylim=(len(names), 0))
    percents(axes.xaxis, [0, 0.5, 1])
    at = [row + 0.5 for row in range(len(names))]
    axes.set_yticks(at, [short(name) for name in names])
    for label in axes.get_yticklabels()[:2]:
        label.set_fontweight("bold")
    canvas.settle(axes)
    return axes, at


def _legend(canvas: Canvas, lines: Iterable[tuple[str, str, str]]) -> None:
    for index, (sign, color, words) in enumerate(lines):
        canvas.text(_NAMES, 9 + 18 * index, sign, color=color)
        canvas.text(_NAMES + 16, 9 + 18 * index, short(words, 34), room=WIDTH - _NAMES - 16)


def _known(shares: Sequence[_Share], at: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = zip(shares, at, strict=True)
    found = [(share, y) for share, y in pairs if share is not None and not math.isnan(share)]
    return [share for share, _ in found], [y for _, y in found]


def _diamonds(axes: Axes, shares: Sequence[_Share], at: Sequence[float], color: str) -> None:
    xs, ys = _known(shares, at)
    axes.scatter(xs, ys, s=36, marker="D", c=CARD, ec=color, lw=1.5, zorder=3, clip_on=False)


def _bars(record: RunRecord, order: Sequence[int], thickness: float, canvas: Canvas) -> None:
    results, colors = record.results, variant_colors(record)
    lines = [("■", colors[result.variant], result.variant) for result in results]
    if any(result.robust_accuracy is not None for result in results):
        lines.append(("◇", INK, "the same under attack"))
    _legend(canvas, lines)
    top = 18 * len(lines) + 16
    names = ["accuracy", "macro recall", *(record.data.classes[index] for index in order)]
    axes, _ = _rows(canvas, names, top=top, height=thickness, right=44)
    for index, result in enumerate(results):
        color, attacked = colors[result.variant], result.robust_recall
        clean = [result.accuracy, result.macro_recall, *(result.recall[i] for i in order)]
        robust: list[_Share] = [result.robust_accuracy, result.robust_macro_recall]
        robust += [attacked[i] if attacked else None for i in order]
        at = [row + (4 + _BAR * (index + 0.5)) / thickness for row in range(len(names))]
        axes.barh(at, [*map(_or_zero, clean)], (_BAR - 1) / thickness, color=color)
        _diamonds(axes, robust, at, color)
        for share, y in zip(clean[:2], at, strict=False):
            canvas.text(WIDTH - 40, top + thickness * y, f"{share:.1%}", color=color, size=10)


def _dots(
    results: Mapping[str, ResultRecord],
    classes: Sequence[tuple[int, str]],
    colors: Mapping[str, str],
    canvas: Canvas,
) -> None:
    shapes = _shapes(results, colors)
    _legend(canvas, [(shapes[name][1], colors[name], name) for name in results])
    names = ["accuracy", "macro recall", *(name for _, name in classes)]
    axes, at = _rows(canvas, names, top=18 * len(results) + 12, height=22, right=20)
    axes.hlines(at, 0, 1, color=HAIR, lw=1)
    for name, result in results.items():
        shares = [result.accuracy, result.macro_recall, *(result.recall[k] for k, _ in classes)]
        (xs, ys), marker, color = _known(shares, at), shapes[name][0], colors[name]
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


def _attacked(rows: Sequence[tuple[str, _Share, _Share]], canvas: Canvas) -> None:
    """One row each: a bar to the clean share, a diamond at the attacked one."""
    signs = (("■", "clean", _NAMES, _CLEAN), ("◇", "worst case under attack", 160, _ATTACKED))
    for sign, words, x, color in signs:
        canvas.text(x, 9, sign, color=color)
        canvas.text(x + 14, 9, words)
    names, clean, attacked = zip(*rows, strict=True)
    axes, at = _rows(canvas, names, top=26, height=20, right=16)
    axes.barh(at, [*map(_or_zero, clean)], 0.55, color=_CLEAN, alpha=0.75)
    _diamonds(axes, attacked, at, _ATTACKED)


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
    canvas.settle(axes, below=18)


def _counts(axes: Axes, counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    size = 11 if len(counts) <= 12 else 7.5
    for row, column in np.argwhere(counts):
        words = f"{counts[row, column]:.0f}"
        bold = "bold" if row == column else "normal"
        axes.text(column, row, words, color=INK, size=size, ha="center", va="center", weight=bold)
    edges = [index + 0.5 for index in range(len(counts) - 1)]
    axes.hlines(edges, -0.5, len(counts) - 0.5, color=CARD, lw=1.5)
    axes.vlines(edges, -0.5, len(counts) - 0.5, color=CARD, lw=1.5)
