"""`secure-cnn compare`: what the variants of some runs give and take, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from secure_cnn.cli.options import make_folder
from secure_cnn.pages import comparison_table, write_comparison
from secure_cnn.printable import Terminal
from secure_cnn.record import FRONT_RULE, Needs, SavedRun, choose, compare_runs

__all__ = ["compare"]

_NONE_FITS = 7


def compare(
    *,
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs on the same data.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.html and .json.")] = None,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Choose among variants with at most this epsilon.")
    ] = None,
    min_robust: Annotated[
        float | None, typer.Option(help="Choose among those with at least this robust accuracy.")
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Choose among those at most this many times slower.")
    ] = None,
) -> None:
    """Show what each variant gives and takes; with limits, choose one, or exit with code 7."""
    needs = Needs(epsilon=max_epsilon, robust_accuracy=min_robust, time=max_time)
    comparison = compare_runs([SavedRun.read(*each) for each in _named(runs)])
    chosen = choose(comparison.points, needs) if needs.words else None
    Terminal().print(comparison_table(comparison, chosen))
    messages = Terminal(stderr=True)
    for warning in comparison.warnings:
        messages.print(warning, style="bold red")
    for note in (FRONT_RULE, *comparison.notes):
        messages.print(note)
    if out is not None:
        make_folder(out)
        write_comparison(comparison, needs, out)
        messages.print(f"report: {out / 'compare.html'}")
    if needs.words and chosen is None:
        messages.print(f"no variant keeps the limits: {needs.words}", style="bold red")
        raise typer.Exit(_NONE_FITS)
    if chosen is not None:
        messages.print(f"chosen under {needs.words}: {chosen.name}")


def _named(folders: list[Path]) -> list[tuple[Path, str]]:
    """Each folder with its last name, or with all of its path where two end alike."""
    last = [folder.resolve().name for folder in folders]
    names = last if len(set(last)) == len(last) else [str(folder) for folder in folders]
    return list(zip(folders, names, strict=True))
