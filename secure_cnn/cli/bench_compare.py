"""`secure-cnn bench compare`: what changed between two benchmarks, with an exit code to gate on."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from secure_cnn.bench.comparison import Change, Comparison, compare
from secure_cnn.printable import Terminal
from secure_cnn.record import Measurements

__all__ = ["compare_command"]

_WORSE = 7


def compare_command(
    before: Annotated[Path, typer.Argument(help="The earlier file of `--json`.")],
    after: Annotated[Path, typer.Argument(help="The later one.")],
    tolerance: Annotated[
        float, typer.Option(help="By what part of itself a figure may get worse.")
    ] = 0.05,
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this metric; may be repeated.")
    ] = None,
) -> None:
    """Show what changed beyond the noise; exit code 7 where something got worse than tolerated.

    A figure changed if its intervals before and after do not overlap.
    """
    found = compare(Measurements.read(before), Measurements.read(after), metrics=metric or [])
    worse = found.worse(tolerance)
    console = Terminal(stderr=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}")
    Terminal().print(_table(found, worse))
    for title, rows in (("before", found.only_before), ("after", found.only_after)):
        for row in rows:
            told = f"only {title}: {row.case}, {row.variant}, {row.metric}"
            console.print(told)
    console.print(_summary(found, worse, tolerance))
    if worse:
        raise typer.Exit(_WORSE)


def _table(found: Comparison, worse: tuple[Change, ...]) -> Table:
    """What changed beyond the noise, worst first."""
    table = Table(title="beyond the noise: intervals that do not overlap")
    for column in ("case", "variant", "metric", "before", "after", "change", ""):
        words = column in ("case", "variant", "metric", "")
        table.add_column(column, justify="left" if words else "right")
    changed = [change for change in found.changes if change.beyond_noise]
    for change in sorted(changed, key=lambda each: -each.worsening):
        rise = change.after.median - change.before.median
        part = f"{100 * rise / abs(change.before.median):+.1f} %" if change.before.median else "–"
        better = "worse, tolerated" if change.worse else "better"
        table.add_row(
            change.before.case,
            change.before.variant,
            change.before.metric,
            f"{change.before.median:.4g} {change.before.unit}",
            f"{change.after.median:.4g} {change.after.unit}",
            part,
            "WORSE" if change in worse else better,
        )
    return table


def _summary(found: Comparison, worse: tuple[Change, ...], tolerance: float) -> str:
    """How many of how many."""
    changed = [change for change in found.changes if change.beyond_noise]
    better = sum(not change.worse for change in changed)
    return (
        f"{len(found.changes)} figures in both: {len(changed)} changed beyond the noise, {better} "
        f"better, {len(worse)} worse by more than {100 * tolerance:g} %"
    )
