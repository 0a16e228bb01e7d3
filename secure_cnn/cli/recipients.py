"""`secure-cnn archive recipients`: who can open a file; the payload is never touched."""

from pathlib import Path
from typing import Annotated

import typer

from secure_cnn import archive
from secure_cnn.cli.keys import reader_from, writers_from
from secure_cnn.cli.options import (
    File,
    IdentityFile,
    Kek,
    PassphraseFile,
    Recipients,
    message,
    needed,
)

__all__ = ["add", "app", "list_", "remove"]

app = typer.Typer(help="Who can open a file: list, add, remove.", no_args_is_help=True)


@app.command("list")
def list_(file: File) -> None:
    """Print kind and key id of each, one a line; needs no key, and nothing vouches for it."""
    for slot in archive.inspect(file).slots:
        typer.echo(str(slot))


@app.command()
def add(
    file: File,
    recipient: Recipients = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="Add a passphrase; - asks.")
    ] = None,
    new_kek: Annotated[str | None, typer.Option(help="Add a key-encryption key; as --kek.")] = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
) -> None:
    """Let more people open a file."""
    who = writers_from(recipient or [], new_passphrase_file, new_kek)
    if not who:
        raise archive.InvalidKey("expected somebody to add, got nobody; name one with --recipient")
    reader = needed(reader_from(identity, passphrase_file, kek))
    archive.change_recipients(file, identity=reader, add=who)
    message(f"added {len(who)} to {file}")


@app.command()
def remove(
    file: File,
    key_id: Annotated[list[str], typer.Argument(help="Key ids, as `list` prints them.")],
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
) -> None:
    """Take people's slots away; who kept the file key can still read this file."""
    reader = needed(reader_from(identity, passphrase_file, kek))
    archive.change_recipients(file, identity=reader, remove=key_id)
    message(f"removed {len(key_id)} from {file}")
    message("hint: whoever read it before may have kept the file key; to shut them out, rotate")
