"""`secure-cnn certificate`: signed records of what was done, verified and signed by who checked.

What it says goes to standard output, messages to standard error.
"""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from secure_cnn import archive
from secure_cnn.cli.keys import Verifiers, verifiers_from
from secure_cnn.cli.options import message
from secure_cnn.pages import write_certificate_page

__all__ = ["app", "check", "verify"]

_File: TypeAlias = Annotated[Path, typer.Argument(help="A certificate.")]
_Previous: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="The certificate before it in the model's life, verified with it."),
]

app = typer.Typer(
    help="Signed records of what was done: verify one, sign for having checked it.",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Signed records of what was done: verify one, sign for having checked it."""


@app.command()
def verify(
    file: _File,
    trusted: Verifiers,
    previous: _Previous = None,
    page: Annotated[
        Path | None, typer.Option(help="Write it as a page of HTML, for people; of erasure only.")
    ] = None,
) -> None:
    """Check signatures, proofs and every byte, without network and data; show what it says."""
    found = archive.verify_certificate(file, trusted=verifiers_from(trusted), previous=previous)
    _show(found, previous)
    if page is not None:
        write_certificate_page(found, page)
        message(f"page: {page}")


@app.command()
def check(
    file: _File,
    trusted: Verifiers,
    signer: Annotated[
        Path, typer.Option(help="The signing key of who checked it: not of who made it.")
    ],
    previous: _Previous = None,
) -> None:
    """Verify a certificate and add the signature of somebody who checked it, in its file."""
    found = archive.check_certificate(
        file,
        signer=archive.read_signer(signer),
        trusted=verifiers_from(trusted),
        previous=previous,
    )
    _show(found, previous)
    message(f"signed as checked: {file}")


def _show(found: archive.Verified, previous: Path | None) -> None:
    """What it says, who signed, and what was not checked."""
    typer.echo(str(found))
    before = found.value.previous if isinstance(found.value, archive.Erasure) else ""
    if before and previous is None:
        message("note: the certificate before it was not checked; name its file with --previous")
