"""The trade-off map: accuracy against robust accuracy, ε, time and leakage.

A mark has the same number and colour in every panel and in the table beside them; a filled one is
on the Pareto front. Marks that would cover each other are moved apart, and a line leads back.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from secure_cnn.pages.canvas import CARD, INK, MUTED, WIDTH, Canvas, percents, render, tick_percent
from secure_cnn.record import FRONT_RULE, Needs, TradeoffPoint, choose, wording
from secure_cnn.record.tradeoff import Estimate, LeakageEstimate, pareto_front

__all__ = ["Tradeoff", "TradeoffRow", "cells", "columns_of", "tradeoff_map"]

_FIRST = ("no.", "variant", "accuracy", "macro recall", "robust accuracy", "ε")
_AUDITED = "ε of a step, audited"
_LEAKED = ("leakage, AUC", "leakage, TPR")
_LAST = ("step ÷ plain", "front")

_HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 280, 46, 36, 16, 54
_MARK, _GAP = 8.0, 18.0

_Point = tuple[float, float]


class _Panel(NamedTuple):
    name: str
    title: str
    label: str
    of: Callable[[TradeoffPoint], Estimate | None]
    tick: Callable[[float], str]
    unbounded: str = ""
    """What stands for a point without a value, in a column at the right of a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class TradeoffRow:
    """A line of the table beside the map."""

    color: str
    on_front: bool
    chosen: bool
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """The map, its numbers and its rules, as pages show them.

    Without two points to compare there are no `panels`; without limits `choice` is empty.
    """

    columns: tuple[str, ...]
    panels: tuple[str, ...]
    rows: tuple[TradeoffRow, ...]
    choice: str

    rule: ClassVar = FRONT_RULE

    @classmethod
    def between(
        cls, points: Sequence[TradeoffPoint], colors: Mapping[str, str], needs: Needs
    ) -> "Tradeoff":
        """What is to be shown of these points under these limits."""
        front, chosen = pareto_front(points), choose(points, needs) if needs.words else None
        columns = columns_of(points)
        rows = []
        for number, (point, on_front) in enumerate(zip(points, front, strict=True), start=1):
            words = cells(number, point, on_front=on_front)
            rows.append(
                TradeoffRow(
                    color=colors[point.name],
                    on_front=on_front,
                    chosen=point is chosen,
                    cells=tuple(words[column] for column in columns),
                )
            )
        choice = _choice(chosen, needs)
        panels = tuple(tradeoff_map(points, colors))
        return cls(columns=columns, panels=panels, rows=tuple(rows), choice=choice)


def columns_of(points: Iterable[TradeoffPoint]) -> tuple[str, ...]:
    """The columns for these points: of audits and of leakage where one of them has any."""
    every = list(points)
    audited = (_AUDITED,) if any(point.audited is not None for point in every) else ()
    leaked = _LEAKED if any(point.leakage is not None for point in every) else ()
    return (*_FIRST, *audited, *leaked, *_LAST)


def cells(number: int, point: TradeoffPoint, *, on_front: bool) -> dict[str, str]:
    r"""What stands in a point's row by column; an interval is in a second line of its cell."""
    audited, time, leaked = point.audited, point.time, point.leakage
    words = (
        str(number),
        point.name,
        _interval(point.accuracy),
        wording.share(point.macro_recall),
        "–" if point.robust_accuracy is None else _interval(point.robust_accuracy),
        "none" if point.epsilon is None else wording.epsilon(point.epsilon),
        "–" if audited is None else f"≥ {audited[0]:.2f}\nof {wording.epsilon(audited[1])}",
        *(("–", "–") if leaked is None else _leaked(leaked)),
        "–" if time is None else f"{time.value:.2f}×\n{time.low:.2f}–{time.high:.2f}",
        "yes" if on_front else "no",
    )
    return dict(zip((*_FIRST, _AUDITED, *_LEAKED, *_LAST), words, strict=True))


def _leaked(leaked: LeakageEstimate) -> tuple[str, str]:
    """As fractions, a rate with that of others, realised and asked; `*` marks what is unlike."""
    area, rate, mark = leaked.auc, leaked.tpr, " *" if leaked.unlike else ""
    words = f"{wording.fraction(area.value)}{mark}\n{area.low:.3f}–{area.high:.3f}"
    if rate is None or leaked.fpr is None:
        return words, "–"
    at = f"FPR {wording.fraction(leaked.realised_fpr)}"
    asked = f"{leaked.fpr:g} asked"
    found = f"{wording.fraction(rate.value)}\n{at}"
    return words, f"{found}\n{asked}\n{rate.low:.3f}–{rate.high:.3f}"


def _interval(estimate: Estimate) -> str:
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{wording.share(estimate.value)}\n{low:.1f}–{high:.1f}"


def _choice(chosen: TradeoffPoint | None, needs: Needs) -> str:
    if not needs.words:
        return ""
    if chosen is None:
        return f"No variant keeps the limits: {needs.words}."
    return f"★ {chosen.name}: the most accurate that keeps the limits, {needs.words}."


def _exact(value: float | None) -> Estimate | None:
    """A value that is no measurement and has no spread."""
    return None if value is None else Estimate(value=value, low=value, high=value)


_PANELS = (
    _Panel(
        *("robust", "Accuracy and robust accuracy", "robust accuracy, more is better →"),
        of=lambda point: point.robust_accuracy,
        tick=tick_percent,
    ),
    _Panel(
        *("epsilon", "Accuracy and privacy", "← ε, less protects more"),
        of=lambda point: _exact(point.epsilon),
        tick=lambda value: f"{value:g}",
        unbounded="none",
    ),
    _Panel(
        *("time", "Accuracy and time", "← time of a step ÷ plain, less is better"),
        of=lambda point: point.time,
        tick=lambda value: f"{value:g}×",
    ),
    _Panel(
        *("leakage", "Accuracy and leakage", "← AUC of the strongest attack, less is better"),
        of=lambda point: None if point.leakage is None else point.leakage.auc,
        tick=lambda value: f"{value:g}",
    ),
)


def tradeoff_map(points: Sequence[TradeoffPoint], colors: Mapping[str, str]) -> list[str]:
    """A panel for each of robust accuracy, ε, time and leakage that tells at least two points.

    The number of a point is its place, from 1.
    """
    drawn = [(panel, partial(_draw, panel, points, colors)) for panel in _PANELS]
    return [
        render(f"tradeoff-{panel.name}", panel.title, (WIDTH, _HEIGHT), draw)
        for panel, draw in drawn
        if _tells(panel, points)
    ]


def _tells(panel: _Panel, points: Sequence[TradeoffPoint]) -> bool:
    """Whether there are two points to compare; one without a bound is a point if it is shown."""
    known = sum(panel.of(point) is not None for point in points)
    return known >= 2 or bool(panel.unbounded and known == 1 and len(points) >= 2)


def _draw(
    panel: _Panel, points: Sequence[TradeoffPoint], colors: Mapping[str, str], canvas: Canvas
) -> None:
    """Whiskers where the values are, numbered marks as near to them as there is room."""
    canvas.title(panel.title)
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    axes = canvas.axes(_LEFT, _TOP, width, height, grid="y")
    _vertical(axes, [point.accuracy for point in points])
    beyond = _horizontal(axes, panel, points)
    canvas.settle(axes)
    front = pareto_front(points)
    shown = [n for n, point in enumerate(points) if panel.of(point) or panel.unbounded]
    places = []
    for number in shown:
        across = panel.of(points[number]) or _exact(beyond)
        assert across is not None, "a point without a value is beyond all others"
        _whiskers(axes, across, points[number].accuracy, colors[points[number].name])
        x, y = axes.transData.transform((across.value, points[number].accuracy.value))
        places.append((float(x), canvas.height - float(y)))
    left = WIDTH * axes.get_position().x0
    box = (left + _MARK, _TOP + _MARK, _LEFT + width - _MARK, _TOP + height - _MARK)
    marks = _apart(places, box)
    for number, place, mark in zip(shown, places, marks, strict=True):
        _mark(canvas, number + 1, place, mark, colors[points[number].name], filled=front[number])
    middle = _LEFT + width / 2
    canvas.text(middle, _HEIGHT - 12, panel.label, color=MUTED, align="center")
    canvas.text(0, _TOP - 8, "accuracy ↑", color=MUTED, size=10)


def _vertical(axes: Axes, shares: Sequence[Estimate]) -> None:
    low, high = min(each.low for each in shares), max(each.high for each in shares)
    margin = max(0.01, 0.08 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(1.0, high + margin) + 0.25 * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    percents(axes.yaxis)


def _horizontal(axes: Axes, panel: _Panel, points: Sequence[TradeoffPoint]) -> float:
    """The panel's own scale; returns where a point without a value stands."""
    found = [each for each in map(panel.of, points) if each is not None]
    low, high = min(each.low for each in found), max(each.high for each in found)
    if panel.unbounded:
        return _logarithmic(axes, panel, (max(low, 1e-3), high), len(found) < len(points))
    margin = 0.08 * (high - low) or 0.05
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.tick(value)))
    axes.tick_params(axis="x", pad=8)
    return high


def _logarithmic(axes: Axes, panel: _Panel, ends: _Point, missing: bool) -> float:
    """Ticks at 1, 2 and 5 of each power, and a column for what has no bound at all."""
    low, high = ends[0] / 1.6, ends[1] * 1.6
    beyond: float = high * (high / low) ** 0.22
    axes.set_xscale("log")
    axes.set_xlim(low, beyond * (high / low) ** 0.14 if missing else high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    ticks = ticks if len(ticks) <= 6 else [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    labels = [panel.tick(tick) for tick in ticks]
    if missing:
        axes.axvline(high, color=MUTED, lw=1, ls=(0, (3, 3)))
        ticks, labels = [*ticks, beyond], [*labels, panel.unbounded]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", pad=8)
    return beyond


def _whiskers(axes: Axes, across: Estimate, up: Estimate, color: str) -> None:
    axes.vlines(across.value, up.low, up.high, color=color, lw=1.4, alpha=0.55)
    if across.low < across.high:
        axes.hlines(up.value, across.low, across.high, color=color, lw=1.4, alpha=0.55)


def _mark(
    canvas: Canvas, number: int, place: _Point, at: _Point, color: str, *, filled: bool
) -> None:
    """A number in a disk, and a line to where its value is if that is elsewhere."""
    axes = canvas.axes(0, 0, canvas.width, canvas.height)
    axes.set(xlim=(0, canvas.width), ylim=(canvas.height, 0), xticks=[], yticks=[])
    if math.dist(place, at) > 1:
        axes.plot(*zip(place, at, strict=True), color=INK, lw=0.8)
        axes.scatter(*place, s=14, c=color, lw=0, zorder=3)
    fill, words = (color, CARD) if filled else (CARD, color)
    axes.scatter(*at, s=(2 * _MARK) ** 2, c=fill, ec=color, lw=1.5, zorder=4)
    canvas.text(at[0], at[1] + 0.5, str(number), color=words, align="center", size=10, bold=True)


def _apart(places: Sequence[_Point], box: tuple[float, float, float, float]) -> list[_Point]:
    """Places inside the box and, where there is room, `_GAP` apart; moved as little as needed."""
    left, top, right, bottom = box
    marks = [complex(*place) for place in places]
    for _ in range(80):
        for first in range(len(marks)):
            for second in range(first):
                push = _push(marks[first] - marks[second])
                marks[first], marks[second] = marks[first] + push, marks[second] - push
        marks = [
            complex(min(max(at.real, left), right), min(max(at.imag, top), bottom)) for at in marks
        ]
    return [(at.real, at.imag) for at in marks]


def _push(apart: complex) -> complex:
    """How far each of two marks moves: half of the distance that is missing between them."""
    distance = abs(apart)
    if distance >= _GAP:
        return 0j
    # On the very same spot there is no direction: apart sideways.
    direction = apart / distance if distance > 1e-6 else 1 + 0.3j
    return direction * (_GAP - distance) / 2
