"""Copies of a model made from its answers, beside a copy that never asked."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from secure_cnn.pages.canvas import INK, MUTED, SERIES, WIDTH, Canvas, percents, render, short
from secure_cnn.pages.template import Fact, Table
from secure_cnn.record import ExtractionRecord, wording

__all__ = [
    "MOST_POOLS",
    "extraction_fact",
    "extraction_figures",
    "extraction_table",
    "extraction_words",
]

MOST_POOLS = 8
"""Pools with a figure; a table has all."""

_LEFT, _PLOT, _LINE, _GAP = 40, 116, 18, 54
_FOOT = 28 + 2 * (_PLOT + _GAP) + 8
"""Where the plots with the labels of their axes end."""
_DASHES = (0, (4, 3))
_NAMES, _BAR = 132, 22


class _Measure(NamedTuple):
    title: str
    value: str
    baseline: str


_MEASURES = (
    _Measure("Accuracy of the copy", "accuracy", "baseline"),
    _Measure("Fidelity: answers as the victim does", "fidelity", "baseline_fidelity"),
)


def extraction_figures(records: Sequence[ExtractionRecord], victim: float) -> list[str]:
    """For each pool accuracy and fidelity over queries, a line for each way of answering.

    Where a pool was asked one budget alone, a bar for each: one dot makes no line.
    `victim` is the accuracy of the model that was asked.
    """
    drawn = []
    for number, pool in enumerate(list(dict.fromkeys(each.pool for each in records))[:MOST_POOLS]):
        own = [each for each in records if each.pool == pool and each.queries > 0]
        if own:
            answers = list(dict.fromkeys(each.answers for each in own))
            budgets = {each.queries for each in own}
            if len(budgets) == 1:
                height: float = 28 + len(_MEASURES) * (26 + _BAR * (len(answers) + 2))
                draw = partial(_bars, own, victim)
                told = f"after {budgets.pop():,} questions"
            else:
                height = _FOOT + 16 + _LINE * (len(answers) + 2)
                draw, told = partial(_pool, own, answers, victim), "by queries"
            title = f"Copies from the pool {pool}: accuracy and fidelity {told}"
            drawn.append(render(f"extraction-{number}", title, (WIDTH, height), draw))
    return drawn


def extraction_table(records: Sequence[ExtractionRecord]) -> Table:
    """A row for each copy, beside the one that never asked."""
    head = ("pool", "answers", "queries", "accuracy", "never asked", "fidelity", "never asked")
    transfers = _transfers(records)
    rows = [
        (
            each.pool,
            each.answers,
            f"{each.queries:,}",
            *map(wording.share, (each.accuracy, each.baseline)),
            *map(wording.share, (each.fidelity, each.baseline_fidelity)),
            *(map(wording.share, (each.transfer, each.baseline_transfer)) if transfers else ()),
        )
        for each in records
    ]
    return (*head, *(("attacks that transfer", "never asked") if transfers else ())), rows


def extraction_fact(records: Sequence[ExtractionRecord]) -> Fact:
    """The fidelity of the best copy, beside that of one that never asked."""
    best = max(records, key=lambda each: each.fidelity)
    beside = "no copy was made that never asked"
    if best.baseline_fidelity is not None:
        beside = f"{wording.share(best.baseline_fidelity)} of a copy that never asked"
    return Fact(
        name="Fidelity of a copy",
        value=wording.share(best.fidelity),
        detail=f"{beside}; at most: pool {best.pool}, {best.answers}, {best.queries:,} queries",
    )


def extraction_words(records: Sequence[ExtractionRecord]) -> list[str]:
    """What was asked, and why some of it has no figure, a sentence each."""
    budgets = sorted({each.queries for each in records})
    *first, last = [f"{budget:,}" for budget in budgets]
    asked = f"{', '.join(first)} and {last}" if first else last
    words = [f"Asked: {asked} questions. A budget of more images than a pool has is left out."]
    alone = dict.fromkeys(each.pool for each in records if each.baseline_fidelity is None)
    if alone:
        words.append(
            f"Whoever has {' or '.join(alone)} has no labels, so that no copy is made of it that "
            "never asks."
        )
    if not _transfers(records):
        words.append(
            "No attack was tried on copies: that is done where the run has a threat model."
        )
    return words


def _transfers(records: Sequence[ExtractionRecord]) -> bool:
    """Whether an attack was made on any copy."""
    return any(
        each is not None
        for record in records
        for each in (record.transfer, record.baseline_transfer)
    )


def _bars(records: Sequence[ExtractionRecord], victim: float, canvas: Canvas) -> None:
    """One budget: a bar for each way of answering, what never asked, and the victim itself."""
    first = records[0]
    title = f"Pool: {short(first.pool, 30)}, {first.queries:,} questions"
    canvas.text(0, 12, title, bold=True, size=12.5, room=WIDTH)
    top = 28.0
    for measure, itself in zip(_MEASURES, (victim, 1.0), strict=True):
        canvas.text(0, top + 8, measure.title, color=MUTED)
        never = getattr(first, measure.baseline)
        rows: list[tuple[str, float | None, str]] = [
            *((each.answers, getattr(each, measure.value), SERIES[1]) for each in records),
            ("never asked", never, MUTED),
            ("the victim itself", itself, INK),
        ]
        axes = canvas.axes(_NAMES, top + 18, WIDTH - _NAMES - 50, _BAR * len(rows))
        axes.set(xlim=(0, 1), ylim=(len(rows), 0), xticks=[], yticks=[])
        for row, (words, value, color) in enumerate(rows):
            y = top + 18 + _BAR * (row + 0.5)
            axes.barh(row + 0.5, value or 0.0, 0.55, color=color, alpha=0.8)
            canvas.text(_NAMES - 8, y, short(words, 24), align="right", room=_NAMES - 8)
            canvas.text(WIDTH, y, wording.share(value), align="right", bold=True)
        top += 26 + _BAR * len(rows)


def _pool(
    records: Sequence[ExtractionRecord], answers: Sequence[str], victim: float, canvas: Canvas
) -> None:
    canvas.text(0, 12, f"Pool: {short(records[0].pool, 40)}", bold=True, size=12.5, room=WIDTH)
    colors = [SERIES[1 + number % (len(SERIES) - 1)] for number in range(len(answers))]
    for place, measure in enumerate(_MEASURES):
        top = 28 + place * (_PLOT + _GAP)
        canvas.text(0, top + 6, measure.title, color=MUTED)
        axes = canvas.axes(_LEFT, top + 18, WIDTH - _LEFT - 16, _PLOT, grid="y")
        if place == 0:
            axes.axhline(victim, color=INK, lw=1.2)
        _lines(axes, records, dict(zip(answers, colors, strict=True)), measure)
        _scale(axes, sorted({each.queries for each in records}))
        canvas.settle(axes)
    middle = _LEFT + (WIDTH - _LEFT - 16) / 2
    canvas.text(middle, _FOOT - 6, "queries", color=MUTED, align="center")
    signs = canvas.axes(0, _FOOT + 10, 24, _LINE * (len(answers) + 2))
    signs.set(xlim=(0, 1), ylim=(len(answers) + 2, 0), xticks=[], yticks=[])
    lines: list[tuple[str, str, Any]] = [
        (each, color, "-") for each, color in zip(answers, colors, strict=True)
    ]
    lines += [("a copy that never asked", MUTED, _DASHES), ("the victim itself", INK, "-")]
    for row, (words, color, dashes) in enumerate(lines):
        signs.plot([0, 1], [row + 0.5] * 2, color=color, lw=1.8, ls=dashes)
        canvas.text(32, _FOOT + 10 + _LINE * (row + 0.5), short(words, 44), room=WIDTH - 32)


def _lines(
    axes: Axes, records: Sequence[ExtractionRecord], colors: Mapping[str, str], measure: _Measure
) -> None:
    """A line for each way of answering; what never asked is the same for all of them."""
    for answers, color in colors.items():
        own = sorted((e for e in records if e.answers == answers), key=lambda each: each.queries)
        points = _points(own, measure.value)
        axes.plot(*points, color=color, lw=2, marker="o", ms=4.5, clip_on=False)
    never = {each.queries: each for each in records if getattr(each, measure.baseline) is not None}
    if never:
        own = [never[queries] for queries in sorted(never)]
        points = _points(own, measure.baseline)
        # A dot, too: of one budget there is no line.
        axes.plot(*points, color=MUTED, lw=1.6, ls=_DASHES, marker="o", ms=3.5, clip_on=False)


def _points(records: Sequence[ExtractionRecord], name: str) -> tuple[list[float], list[float]]:
    return [float(each.queries) for each in records], [getattr(each, name) for each in records]


def _scale(axes: Axes, queries: Sequence[int]) -> None:
    """Powers as equal steps, a tick at every budget; shares in percent."""
    axes.set_xscale("log")
    axes.set_xlim(queries[0] / 1.25, 1.25 * queries[-1])
    axes.set_xticks(queries, [f"{each:,}" for each in queries])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(0.05, 0.55 * (high - low))
    axes.set_ylim(max(0.0, middle - half), min(1.0, middle + half))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    percents(axes.yaxis)
