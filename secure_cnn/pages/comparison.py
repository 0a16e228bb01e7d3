"""Runs side by side: the page of a comparison, and its table for a terminal."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from secure_cnn.pages.canvas import colors_of
from secure_cnn.pages.classes import recall_dots, recall_table
from secure_cnn.pages.template import fill
from secure_cnn.pages.tradeoff import Tradeoff, cells
from secure_cnn.printable import printable
from secure_cnn.record import Comparison, Needs, TradeoffPoint
from secure_cnn.record.document import write_text
from secure_cnn.record.tradeoff import pareto_front

__all__ = ["comparison_table", "render_comparison", "write_comparison"]

_HEAD = 9
_BRIEF = (
    *("variant", "accuracy", "macro recall", "robust accuracy", "ε", "ε of a step, audited"),
    *("leakage", "step ÷ plain"),
)
"""The columns for a terminal: number and front are marks there, or nothing."""


def write_comparison(comparison: Comparison, needs: Needs, folder: str | Path) -> None:
    """Writes `compare.json` and the page `compare.html` into a folder, each atomically."""
    comparison.write(Path(folder, "compare.json"))
    write_text(Path(folder, "compare.html"), render_comparison(comparison, needs))


def render_comparison(comparison: Comparison, needs: Needs) -> str:
    """The page as text; it needs no network and runs no script."""
    colors = colors_of(comparison.results)
    classes = comparison.data.classes
    plain = [name for name, each in comparison.results.items() if each.variant == "plain"]
    baseline = plain[0] if len(plain) == 1 else None
    values = {
        "comparison": comparison,
        "tradeoff": Tradeoff.between(comparison.points, colors, needs),
        "recall": recall_dots(comparison.results, classes, colors),
        "recalls": recall_table(comparison.results, classes, baseline),
        "baseline": baseline,
        "differences": (("", *comparison.runs), comparison.differences),
    }
    return fill("comparison.html.jinja", values)


def comparison_table(comparison: Comparison, chosen: TradeoffPoint | None) -> Table:
    """The same figures for a terminal, without columns that say nothing.

    A filled mark is on the front, and the chosen variant bears a star.
    """
    title = f"{len(comparison.runs)} runs on {comparison.data.name}"
    # Little between the columns, and heads on lines of their own: all is to fit 80 letters.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    front = pareto_front(comparison.points)
    points = enumerate(zip(comparison.points, front, strict=True), start=1)
    rows = [_brief(cells(number, point, on_front=on)) for number, (point, on) in points]
    columns = [name for name in _BRIEF if any(row[name] != "–" for row in rows)]
    for column in columns:
        if column == "variant":
            table.add_column(column, overflow="fold")
        else:
            head = textwrap.fill(column, _HEAD, break_long_words=False)
            table.add_column(head, justify="right", no_wrap=True)
    for row, point, on_front in zip(rows, comparison.points, front, strict=True):
        star = "★ " if point is chosen else ""
        name = Text(f"{'●' if on_front else '○'} {star}{printable(point.name)}")
        table.add_row(*(name if column == "variant" else row[column] for column in columns))
    return table


def _brief(words: Mapping[str, str]) -> dict[str, str]:
    """Cells in which only robust accuracy has room for its interval, and leakage for one column."""
    brief = {name: words[name].partition("\n")[0] for name in ("accuracy", "step ÷ plain")}
    area, *_ = words["leakage, AUC"].split("\n")
    rate = words["leakage, TPR"].split("\n")[:2]
    leakage = "–" if area == "–" else "\n".join((f"AUC {area}", f"TPR {rate[0]}", *rate[1:]))
    return {**words, **brief, "leakage": leakage}
