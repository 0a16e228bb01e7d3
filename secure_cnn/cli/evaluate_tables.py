"""The tables that `secure-cnn evaluate` prints: figures, attacks, verdicts and certificates."""

from rich.table import Table
from rich.text import Text

import defenses
from secure_cnn.evaluate import ClassificationReport

__all__ = ["attacks", "certificates", "table", "verdicts"]


def table(found: ClassificationReport, robust: defenses.RobustnessReport | None) -> Table:
    """Clean and robust figures, overall and per class."""
    table = Table()
    table.add_column("")
    table.add_column("clean", justify="right")
    recalls = [found.recall]
    if robust is not None:
        threat = robust.threat
        title = (
            f"{' and '.join(robust.robust)}, {threat.norm} {threat.eps:g}, {robust.samples} images"
        )
        table.add_column(title, justify="right")
        recalls.append(robust.worst_case_recall)
    low, high = robust.worst_case_interval if robust else (0.0, 0.0)
    table.add_row(
        "accuracy",
        _percent(found.accuracy),
        *(
            [f"{_percent(robust.worst_case_accuracy)} ({100 * low:.1f}-{100 * high:.1f})"]
            if robust
            else []
        ),
    )
    table.add_row(
        "macro recall",
        _percent(found.macro_recall),
        *([_percent(robust.worst_case_macro_recall)] if robust else []),
        end_section=True,
    )
    for index, name in enumerate(found.classes):
        table.add_row(f"recall of {name}", *(_percent(recall[index]) for recall in recalls))
    return table


def attacks(robust: defenses.RobustnessReport) -> Table:
    """How many images each attack was tried on and fooled, and what is left after it."""
    table = Table()
    for name in ("attack", "tried on", "fooled", "alone", "after it and those before"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for name, accuracy in robust.attack_accuracy.items():
        low, high = robust.attack_intervals[name]
        table.add_row(
            name,
            str(robust.tried[name]),
            str(robust.fooled[name]),
            _percent(robust.individual_accuracy[name]),
            f"{_percent(accuracy)} ({100 * low:.1f}-{100 * high:.1f})",
        )
    return table


def verdicts(robust: defenses.RobustnessReport) -> Table:
    """Each check with its outcome and what was found."""
    table = Table()
    for name in ("what should hold", "verdict", "found"):
        table.add_column(name)
    styles = {"pass": "green", "fail": "bold red", "not checked": "dim"}
    for each in robust.verdicts:
        words = "FAIL" if each.outcome == "fail" else each.outcome
        table.add_row(each.name, Text(words, styles[each.outcome]), each.sentence)
    return table


def certificates(proven: defenses.CertificationReport) -> Table:
    """Certified accuracy at a few radii, with the conditions of the proof."""
    smoothing, points = proven.smoothing, proven.curve(points=7)
    table = Table(
        title=f"proven by smoothing, sigma {smoothing.sigma:g}, {smoothing.samples} samples, "
        f"alpha {smoothing.alpha:g}, {len(proven.indices)} images"
    )
    for name in ("l2 radius", "certified accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    for point in points:
        low, high = point.interval
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        table.add_row(f"{point.radius:.2f}", _percent(point.accuracy), interval)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
