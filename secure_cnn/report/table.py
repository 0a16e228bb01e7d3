"""The summary of a run as one table for a terminal; the page says the same at length."""

from rich import box
from rich.table import Table

from secure_cnn.report.record import RunRecord
from secure_cnn.report.results import ResultRecord

__all__ = ["summary_table"]

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
