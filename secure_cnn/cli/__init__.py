"""The command line: parse, call, print. Data goes to stdout, messages to stderr.

Exit codes: 0 done; 1 an error we did not foresee, or a question answered with no; 2 wrong usage;
3 data, model, settings or folder; 4 privacy, also where `leakage` finds more than ε allows or one
of its controls fails; 5 attacks and robustness; 6 archives and keys; 7 `evaluate` or `leakage`
misses what `--require` demands, no run keeps the limits of `compare`, a benchmark got worse than
`bench compare` tolerates, or `reproduce` finds other figures than those on record; 130 interrupted,
with a checkpoint to resume from.
"""

import sys
from typing import Annotated

import typer

from defenses import DefenseError
from privacy import PrivacyError
from secure_cnn.archive import ArchiveError
from secure_cnn.cli import (
    archive,
    audit,
    bench,
    certificate,
    compare,
    evaluate,
    forget,
    leakage,
    recipes,
    train,
)
from secure_cnn.errors import SecureCNNError
from secure_cnn.printable import Terminal, spell_out
from secure_cnn.record import versions

__all__ = ["app", "main"]

_CODES = (
    "Exit codes: 0 done; 2 usage; 3 data, model, settings or folder; 4 privacy, or leakage beyond "
    "epsilon; 5 attacks and robustness; 6 archives and keys; 7 a demand or limit that is missed; "
    "130 interrupted, to be resumed."
)

app = typer.Typer(
    name="secure-cnn",
    epilog=_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("leakage")(leakage.leakage)
app.command("forget")(forget.forget_command)
app.command("compare")(compare.compare)
app.command("recipes")(recipes.recipes_command)
app.command("reproduce")(recipes.reproduce_command)
app.add_typer(bench.app, name="bench")
app.add_typer(archive.app, name="archive")
app.add_typer(certificate.app, name="certificate")


def _tell_version(asked: bool) -> None:
    if asked:
        found = versions()
        ours = found.pop("secure-cnn")
        beside = ", ".join(f"{name} {each}" for name, each in found.items())
        typer.echo(f"secure-cnn {ours} ({beside})")
        raise typer.Exit


@app.callback()
def _whole(
    *,
    asked: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_tell_version,
            is_eager=True,
            help="Print the version, and those of what its figures depend on.",
        ),
    ] = False,
) -> None:
    """Train CNNs that are private, robust and sealed, and see what each protection costs."""


_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ArchiveError, 6),
    (DefenseError, 5),
    (PrivacyError, 4),
    (SecureCNNError, 3),
)


def main() -> None:
    """Runs the command line; an error of ours is one line on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    try:
        app()
    except (ArchiveError, DefenseError, PrivacyError, SecureCNNError) as error:
        message, _, hint = " ".join(str(error).split()).partition("; ")
        console = Terminal(stderr=True)
        console.print(f"error: {message}", style="bold red")
        if hint:
            console.print(f"hint: {hint}")
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))
