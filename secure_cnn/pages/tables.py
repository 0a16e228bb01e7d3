"""A run, or several side by side, as one table for a terminal; the page says more."""

from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from secure_cnn.pages.tradeoff import COLUMNS, cells
from secure_cnn.printable import printable
from secure_cnn.record.comparison import Comparison
from secure_cnn.record.results import ResultRecord
from secure_cnn.record.run import RunRecord
from secure_cnn.record.tradeoff import TradeoffPoint, pareto_front

__all__ = ["comparison_table", "summary_table"]

_COLUMNS = ("accuracy", "macro recall", "robust accuracy", "ε", "s/step", "÷ plain")


def summary_table(record: RunRecord) -> Table:
    """One row for each finished training of the run.

    Returns:
        A table with accuracy, macro recall, robust accuracy with its 95 % interval, ε, seconds of
        a step, and that step against the plain one (both timed in turn, on the same images).
    """
    table = Table(title=f"{record.model.name} on {record.data.name}", box=box.SIMPLE_HEAD)
    table.add_column("training", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for result in record.results:
        table.add_row(result.variant, *_cells(record, result))
    return table


def comparison_table(comparison: Comparison, chosen: TradeoffPoint | None) -> Table:
    """The same figures for a terminal; the chosen variant bears a star."""
    table = Table(
        title=f"{len(comparison.runs)} runs on {comparison.data.name}", box=box.SIMPLE_HEAD
    )
    widths = {"variant": 16, "robust accuracy": 9}
    for column in COLUMNS[1:]:
        side: Literal["left", "right"] = "left" if column == "variant" else "right"
        table.add_column(column, justify=side, overflow="fold", min_width=widths.get(column))
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


def _cells(record: RunRecord, result: ResultRecord) -> list[str]:
    """One row's figures; a dash where nothing was measured."""
    cost = {row.metric: row.median for row in record.cost if row.variant == result.variant}
    robust = "–"
    if result.robust_accuracy is not None:
        low, high = result.robust_low or 0.0, result.robust_high or 0.0
        robust = f"{_percent(result.robust_accuracy)} ({100 * low:.0f}-{100 * high:.0f})"
    epsilon = result.epsilon
    return [
        _percent(result.accuracy),
        _percent(result.macro_recall),
        robust,
        "∞" if epsilon is None else f"{epsilon:.2f}",
        f"{cost['time']:.4f}" if "time" in cost else "–",
        f"{cost['time_ratio']:.2f}x" if "time_ratio" in cost else "–",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
