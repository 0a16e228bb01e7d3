"""What several commands share: options, messages, output folders, and which options were given."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, cast

import typer
from typer.models import OptionInfo

from secure_cnn.checkpoint import LoadedModel
from secure_cnn.data import ImageReading
from secure_cnn.data.reading import Fit
from secure_cnn.errors import RunError
from secure_cnn.printable import Terminal, printable
from secure_cnn.recipe import Recipe

__all__ = [
    "INTERRUPTED",
    "Background",
    "Groups",
    "ImageFit",
    "ImageSize",
    "JsonFile",
    "given_settings",
    "groups_for",
    "in_panels",
    "interruptible",
    "make_folder",
    "message",
    "nothing_kept",
    "number",
    "reading_for",
    "settings_from",
]

INTERRUPTED = 130
_Command = TypeVar("_Command", bound=Callable[..., None])

_DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_NUMBER = re.compile(rf"(?P<above>{_DECIMAL})(?:/(?P<below>{_DECIMAL}))?", re.ASCII | re.IGNORECASE)

ImageSize: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Bring a folder's images to this size: one number for a square, or HEIGHTxWIDTH."
    ),
]
ImageFit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="How, where the shape is another: crop (keep the middle), pad (with --background) or "
        "stretch."
    ),
]
Background: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The colour behind a folder's transparent images: white, black, #rrggbb, ..."
    ),
]
JsonFile: TypeAlias = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file.")
]
Groups: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Whose the images are: folder (DIR/cat/PERSON/1.jpg), or a CSV file with the columns "
        "path,person (of a .npz file index,person). A person is trained on or tested on, not both."
    ),
]


def number(text: str | float) -> float:
    """A size as people write it, `0.03`, `3e-2` or `8/255`; for `typer.Option(parser=number)`.

    Raises:
        typer.BadParameter: It is no such text, or no finite number.
    """
    found = _NUMBER.fullmatch(str(text))
    below = float(found["below"] or 1) if found else math.nan
    value = float(found["above"]) / below if found and below else math.nan
    if not math.isfinite(value) or math.isinf(below):
        raise typer.BadParameter(
            f"expected a finite number as 0.03 or 8/255, without spaces, got {printable(text)!r}"
        )
    return value


def in_panels(panels: Mapping[str, Sequence[str]]) -> Callable[[_Command], _Command]:
    """Shows a command's options in the help under these titles, each with its parameters' names.

    Guarantee: every option but `--help` is under exactly one title, or this raises KeyError.
    """
    title_of = {name: title for title, names in panels.items() for name in names}

    def shown(command: _Command) -> _Command:
        for name, annotation in command.__annotations__.items():
            kind, *told = getattr(annotation, "__metadata__", ()) or (None,)
            if isinstance(kind, OptionInfo):
                placed = copy(kind)  # others have it too
                placed.rich_help_panel = title_of[name]
                command.__annotations__[name] = Annotated[(annotation.__origin__, placed, *told)]
        return command

    return shown


def message(text: str) -> None:
    """One line on standard error, for people."""
    Terminal(stderr=True).print(text)


@contextmanager
def interruptible(way_on: Callable[[], str]) -> Iterator[None]:
    """Says after a Ctrl-C inside how to go on, and leaves with the exit code of one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        message(f"interrupted\nhint: {way_on()}")
        raise typer.Exit(INTERRUPTED) from interrupt


def nothing_kept() -> str:
    """The way on of a command that keeps no state."""
    return "nothing of it was kept; the same command begins anew"


def settings_from(context: typer.Context) -> dict[str, Any]:
    """The values of all options that have the name of a recipe's setting."""
    return {
        name: context.params[name] for name in Recipe.__dataclass_fields__ if name in context.params
    }


def reading_for(loaded: LoadedModel, fit: str | None, background: str | None) -> ImageReading:
    """How a model's images are read: to its size, and else as in its training.

    `fit` and `background` are those of the command line, which win over what its file claims.
    """
    claims = loaded.claims.get("data")
    claimed = claims if isinstance(claims, dict) else {}
    usual = ImageReading()
    architecture = loaded.architecture
    return ImageReading(
        size=(architecture.height, architecture.width),
        fit=cast(Fit, fit or claimed.get("image_fit", usual.fit)),
        background=background or claimed.get("background", usual.background),
        channels=architecture.channels,
    )


def groups_for(loaded: LoadedModel, data: str | None, groups: str | None) -> str | None:
    """Whose the images are: as given, or by folders as in the model's training on the same folder.

    By another file, or none, the split is another one too, of which the fingerprint tells.
    """
    claims = loaded.claims.get("data")
    claimed = claims if isinstance(claims, dict) else {}
    same = data is not None and Path(data).resolve().name == claimed.get("name")
    return groups or ("folder" if same and claimed.get("groups") == "folder" else None)


def given_settings(context: typer.Context) -> list[str]:
    """The options on the command line that are settings of a recipe, but `--out`."""
    return [
        "--" + name.replace("_", "-")
        for name in sorted(settings_from(context).keys() - {"out"})
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def make_folder(out: Path) -> None:
    """Makes the folder that a command writes to, where it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: expected a folder that can be made: {error.strerror}") from error
