"""The figures of a robustness evaluation, each a pure function from plain values to one SVG."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
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

__all__ = ["eps_curve", "recall_bars", "recall_rows"]

_HEIGHT, _ROW = 236, 20
_MOST_CLASSES = 24
_CLEAN, _ATTACKED = SERIES[1], SERIES[2]


def eps_curve(
    curve: Sequence[Mapping[str, Any]], threat: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    """Accuracy against the size of the perturbation, with its 95 % band.

    Args:
        curve: Points with `eps`, `accuracy` and `interval`, from radius 0 upwards.
    """
    title = "Accuracy against the size of the perturbation"
    draw = partial(_curve, curve, float(threat["eps"]), summary)
    return render("eps-curve", title, (WIDTH, _HEIGHT), draw)


def recall_rows(
    classes: Sequence[str], summary: Mapping[str, Any]
) -> list[tuple[str, float | None, float | None]]:
    """Name, clean share and attacked share: accuracy, macro recall, then the classes.

    With more than 24 classes, those with the lowest recall under attack.
    """
    order = sorted(range(len(classes)), key=lambda k: summary["worst_case_recall"][k] or 0.0)
    shown = sorted(order[:_MOST_CLASSES])
    return [
        ("accuracy", summary["clean_accuracy"], summary["worst_case_accuracy"]),
        ("macro recall", summary["clean_macro_recall"], summary["worst_case_macro_recall"]),
        *((classes[k], summary["clean_recall"][k], summary["worst_case_recall"][k]) for k in shown),
    ]


def recall_bars(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Recall of each class, clean as a bar and under attack as a diamond.

    Args:
        rows: As `recall_rows` gives them.
    """
    size = (WIDTH, 30 + _ROW * len(rows) + 26)
    return render(
        "robust-recall", "Recall by class, clean and attacked", size, partial(_bars, rows)
    )


def _curve(
    curve: Sequence[Mapping[str, Any]], eps: float, summary: Mapping[str, Any], canvas: Canvas
) -> None:
    """The band, the line, and the evaluation's own figure as a diamond with its whisker."""
    canvas.text(0, 12, "Accuracy against eps", bold=True, size=12.5)
    axes = canvas.axes(40, 34, WIDTH - 56, 160)
    radii = [point["eps"] for point in curve]
    shares = [point["accuracy"] for point in curve]
    low, high = zip(*(point["interval"] for point in curve), strict=True)
    # Equal ratios between the radii would crowd at the left of a linear axis.
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set(xlim=(0, radii[-1]), ylim=(0, 1))
    axes.fill_between(radii, low, high, color=_CLEAN, alpha=0.18, lw=0)
    axes.plot(radii, shares, color=_CLEAN, lw=2, clip_on=False)
    axes.scatter(radii, shares, 30, c=_CLEAN, ec=CARD, lw=1, zorder=3, clip_on=False)
    worst, interval = summary["worst_case_accuracy"], summary["worst_case_interval"]
    axes.vlines(eps, *interval, color=_ATTACKED, lw=2, zorder=4)
    axes.scatter([eps], [worst], s=46, marker="D", c=CARD, ec=_ATTACKED, lw=1.8, zorder=5)
    _share_axis(axes)
    ticks = [radius for k, radius in enumerate(radii) if k == 0 or k > 1]
    axes.set_xticks(ticks, [f"{radius:.2g}" for radius in ticks])
    axes.minorticks_off()
    canvas.text(40 + (WIDTH - 56) / 2, _HEIGHT - 10, "eps", color=MUTED, align="center")
    canvas.text(WIDTH, 12, f"◇ worst case {worst:.1%} at {eps:.3g}", color=_ATTACKED, align="right")


def _bars(rows: Sequence[tuple[str, float | None, float | None]], canvas: Canvas) -> None:
    """One row each: a bar to the clean share, a diamond at the attacked one."""
    canvas.text(96, 9, "■", color=_CLEAN)
    canvas.text(110, 9, "clean", color=INK)
    canvas.text(160, 9, "◇", color=_ATTACKED)
    canvas.text(174, 9, "worst case under attack", color=INK)
    axes = canvas.axes(96, 26, WIDTH - 96 - 16, _ROW * len(rows))
    axes.set(xlim=(0, 1), ylim=(len(rows), 0))
    at = [row + 0.5 for row in range(len(rows))]
    axes.barh(at, [clean or 0.0 for _, clean, _ in rows], 0.55, color=_CLEAN, alpha=0.75)
    found = [(share, y) for (_, _, share), y in zip(rows, at, strict=True) if share is not None]
    xs, ys = zip(*found, strict=True)
    axes.scatter(xs, ys, s=36, marker="D", c=CARD, ec=_ATTACKED, lw=1.6, zorder=3, clip_on=False)
    axes.set_yticks(at, [short(name) for name, _, _ in rows])
    for label in axes.get_yticklabels()[:2]:
        label.set_fontweight("bold")
    axes.xaxis.set_major_formatter(FuncFormatter(tick_percent))
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="x", color=HAIR, lw=1)
    axes.set_axisbelow(True)


def _share_axis(axes: Axes) -> None:
    """Percent from the bottom to the top, with hairlines."""
    axes.yaxis.set_major_formatter(FuncFormatter(tick_percent))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color=HAIR, lw=1)
    axes.set_axisbelow(True)
