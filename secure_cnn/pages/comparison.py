"""Runs side by side: the page of a comparison, and its table for a terminal."""

from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from secure_cnn.pages.canvas import colors_of
from secure_cnn.pages.classes import recall_dots, recall_table
from secure_cnn.pages.template import fill
from secure_cnn.pages.tradeoff import COLUMNS, Tradeoff, cells
from secure_cnn.printable import printable
from secure_cnn.record import Comparison, Needs, TradeoffPoint
from secure_cnn.record.document import write_text
from secure_cnn.record.tradeoff import pareto_front

__all__ = ["comparison_table", "render_comparison", "write_comparison"]

_WIDTHS = {"variant": 16, "robust accuracy": 9}


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
    """The same figures for a terminal; the chosen variant bears a star."""
    title = f"{len(comparison.runs)} runs on {comparison.data.name}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in COLUMNS[1:]:
        side: Literal["left", "right"] = "left" if column == "variant" else "right"
        table.add_column(column, justify=side, overflow="fold", min_width=_WIDTHS.get(column))
    front = pareto_front(comparison.points)
    for number, (point, on_front) in enumerate(zip(comparison.points, front, strict=True), start=1):
        _, name, accuracy, recall, robust, epsilon, audited, time, _ = cells(
            number, point, on_front=on_front
        )
        star = "★ " if point is chosen else ""
        brief = [each.partition("\n")[0] for each in (accuracy, time)]
        figures = (brief[0], recall, robust, epsilon, audited, brief[1])
        table.add_row(Text(star + printable(name)), *figures, "●" if on_front else "")
    return table
