"""Before and after, class by class: the rows of the table beside the figure of recall."""

import math
from collections.abc import Mapping, Sequence

from secure_cnn.record import wording
from secure_cnn.record.results import ResultRecord

__all__ = ["recall_table"]


def recall_table(
    results: Mapping[str, ResultRecord], classes: Sequence[str], baseline: str | None
) -> wording.Table:
    """The head and the rows: accuracy, macro recall, then every class.

    Each result has a column, one for its change against the baseline in percentage points, and
    one for what is left under attack where that was measured.

    Args:
        baseline: The name of what the others are compared with, or None.
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


def _shares(result: ResultRecord) -> tuple[float, ...]:
    """Accuracy, macro recall and recall."""
    return (result.accuracy, result.macro_recall, *result.recall)


def _change(before: float, after: float) -> str:
    """A difference in percentage points, with its sign."""
    points = 100 * (after - before)
    if math.isnan(points):
        return "–"
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "−")
