"""The page of a comparison: its trade-offs, its classes, and what differs between the runs."""

from pathlib import Path

from secure_cnn.pages.classes import recall_table
from secure_cnn.pages.figures import colors_of, recall_dots
from secure_cnn.pages.template import fill
from secure_cnn.pages.tradeoff import Tradeoff
from secure_cnn.record.comparison import Comparison
from secure_cnn.record.document import write_text
from secure_cnn.record.tradeoff import Needs

__all__ = ["render_comparison", "write_comparison"]


def write_comparison(comparison: Comparison, needs: Needs, folder: str | Path) -> None:
    """Writes `compare.json` and the page `compare.html` into a folder, each atomically.

    Raises:
        RunError: The place cannot be written to.
    """
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
