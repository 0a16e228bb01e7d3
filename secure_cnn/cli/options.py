"""What several commands share: options, messages, output folders, and which options were given."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from secure_cnn.errors import RunError
from secure_cnn.printable import Terminal
from secure_cnn.recipe import Recipe

__all__ = ["JsonFile", "given_settings", "make_folder", "message"]

JsonFile: TypeAlias = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file.")
]


def message(text: str) -> None:
    """One line on standard error, for people."""
    Terminal(stderr=True).print(text)


def given_settings(context: typer.Context) -> list[str]:
    """The options on the command line that are settings of a recipe, but `--out`."""
    names = sorted((set(Recipe.__dataclass_fields__) - {"out"}) & set(context.params))
    return [
        "--" + name.replace("_", "-")
        for name in names
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def make_folder(out: Path) -> None:
    """Makes the folder that a command writes to, where it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: expected a folder that can be made: {error.strerror}") from error
