"""What `secure-cnn train` says of a run that has ended, or can go on."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from secure_cnn.cli.options import INTERRUPTED
from secure_cnn.own_network import as_arguments, is_own_name
from secure_cnn.pages import summary_table
from secure_cnn.printable import Terminal
from secure_cnn.recipe import Recipe, Run

__all__ = ["tell", "way_on"]


def way_on(recipe: Recipe) -> str:
    """How a run goes on that was not given the time to stop after its step."""
    folder = Path(recipe.out)
    if not (folder / "run.json").exists():
        return "nothing was trained yet; the same command begins anew"
    return f"go on from its last checkpoint with {_resuming(folder, recipe.to_dict())}"


def _resuming(folder: Path, settings: Mapping[str, Any]) -> str:
    """The command, as a shell takes it."""
    own = is_own_name(settings["model"])
    named = " " + as_arguments(settings["model"], settings["model_options"]) if own else ""
    return f"secure-cnn train --out {shlex.quote(str(folder))} --resume{named}"


def tell(done: Run) -> None:
    """The table on stdout, the places on stderr."""
    messages = Terminal(stderr=True)
    if done.record.status == "interrupted":
        keys = ", with its recipients and signer again and --identity" if done.folder.sealed else ""
        further = _resuming(done.folder.root, done.record.settings)
        messages.print(f"interrupted; hint: go on with {further}{keys}")
        raise typer.Exit(INTERRUPTED)
    Terminal().print(summary_table(done.record))
    for note in done.record.notes:
        messages.print(note)
    messages.print(f"checkpoint: {done.folder.model}")
    messages.print(f"report: {done.folder.page}")
