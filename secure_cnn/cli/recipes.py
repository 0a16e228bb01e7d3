"""`secure-cnn recipes` and `secure-cnn reproduce`: recipes by name, and whether they hold."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from secure_cnn.cli.options import INTERRUPTED, JsonFile, interruptible, message
from secure_cnn.engine import keep_freed_memory
from secure_cnn.printable import Terminal
from secure_cnn.recipe.named import NAMED, NamedRecipe, named_recipe, stored_results
from secure_cnn.recipe.reproduction import Agreement, agreements, reproduce
from secure_cnn.record import Row

__all__ = ["recipes_command", "reproduce_command"]

_DISAGREES = 7
_SHARES = {
    "accuracy": "accuracy",
    "macro_recall": "macro recall",
    "autoattack": "AutoAttack",
}


def recipes_command(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.")] = None,
) -> None:
    """List the recipes that have a name, what each is for, and what it reached."""
    terminal = Terminal()
    if name is None:
        terminal.print(_all(stored_results().rows))
        message("one in full: secure-cnn recipes NAME; train it: secure-cnn train --recipe NAME")
        return
    one = named_recipe(name)
    terminal.print(f"{one.name}: {one.says}")
    for setting, value in one.settings.items():
        terminal.print(f"  {setting} = {_shown(setting, value)}")
    terminal.print(f"source: {one.source}")
    terminal.print(f"chosen by: {one.chosen}")


def reproduce_command(
    *,
    name: Annotated[str, typer.Argument(help="One of secure-cnn recipes.")],
    seeds: Annotated[int, typer.Option(help="Trainings, with the seeds 0, 1, ...")] = 5,
    data: Annotated[
        str | None, typer.Option(help="Images; needed for a recipe that is for any.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Test images that AutoAttack tries; 0 takes all.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/reproduce-NAME by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Train a named recipe anew, and hold its figures against those on record."""
    keep_freed_memory()
    named = named_recipe(name)
    folder = Path(f"runs/reproduce-{name}") if out is None else out
    with interruptible(lambda: f"the same command again goes on from {folder}"):
        found = reproduce(named, folder, seeds=seeds, data=data, attacked=samples or None)
    if found is None:
        message(f"interrupted; hint: the same command again goes on from {folder}")
        raise typer.Exit(INTERRUPTED)
    if json_file is not None:
        found.write(json_file)
    stored = [row for row in stored_results().rows if row.case == name]
    terminal = Terminal()
    terminal.print(_figures(named, found.rows))
    message(f"runs and their pages: {folder}")
    if data is not None and data != named.recipe.data:
        message(f"note: nothing is on record for {data}")
        return
    compared = agreements(stored, found.rows)
    for each in compared:
        message(_words(each))
    if not compared:
        message(f"note: nothing is on record for {name}")
    if not all(each.agrees for each in compared):
        raise typer.Exit(_DISAGREES)


def _all(rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("recipe", "for", "reached"):
        table.add_column(column, no_wrap=column == "recipe")
    for name, one in NAMED.items():
        reached = [
            f"{word} {_share(row)}"
            for metric, word in _SHARES.items()
            for row in rows
            if (row.case, row.metric) == (name, metric)
        ]
        table.add_row(name, one.says, ", ".join(reached) or "–")
    return table


def _figures(named: NamedRecipe, rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=named.name, title_justify="left")
    for column in ("figure", "mean", "worst", "best", "seeds"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in rows:
        ends = (row.median, row.low, row.high)
        if row.metric in _SHARES:
            table.add_row(_SHARES[row.metric], *(f"{each:.2%}" for each in ends), str(row.n))
        elif not row.metric.endswith("_sd"):
            table.add_row(row.metric, *(f"{each:.4g}" for each in ends), str(row.n))
    return table


def _shown(setting: str, value: object) -> str:
    """A setting as it is written on the command line: 8/255, not 0.0313725."""
    if setting == "eps" and isinstance(value, float) and math.isclose(255 * value % 1, 0):
        return f"{255 * value:.0f}/255"
    return str(value)


def _share(row: Row) -> str:
    return f"{row.median:.1%} ({row.low:.1%} to {row.high:.1%}, {row.n} seeds)"


def _words(each: Agreement) -> str:
    within = "within" if each.agrees else "NOT within"
    return (
        f"{_SHARES.get(each.metric, each.metric)}: {each.found.median:.4g}, on record "
        f"{each.stored.median:.4g} ± {each.margin:.2g}: {within} the spread"
    )
