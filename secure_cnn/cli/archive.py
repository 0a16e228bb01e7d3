"""`secure-cnn archive`: keys, and what is in a sealed file."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from secure_cnn import archive
from secure_cnn.cli.keys import unlocking_from, verifiers_from

__all__ = ["app", "inspect", "keygen", "open_", "verify"]

app = typer.Typer(help="Keys, and what is in a sealed file.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(help="A sealed file.")]


@app.command()
def keygen(
    out: Annotated[
        Path, typer.Argument(help="The secret key's file; it must not exist. Mode 0600.")
    ],
    signer: Annotated[
        bool, typer.Option("--signer", help="Make a signing key, not an identity.")
    ] = False,
) -> None:
    """Make a key; the public half is printed."""
    if signer:
        made = archive.generate_signer()
        archive.write_signer(out, made)
        public = made.verifier.to_text()
    else:
        identity = archive.generate_identity()
        archive.write_identity(out, identity)
        public = identity.recipient.to_text()
    typer.echo(public)
    _message(f"secret key: {out}; keep it where the sealed files are not")


@app.command()
def inspect(
    file: _File,
    as_json: Annotated[bool, typer.Option("--json", help="Print the claims as JSON.")] = False,
) -> None:
    """Show what a file says of itself; needs no key, checks no signature."""
    info = archive.inspect(file)
    typer.echo(json.dumps(info.claims, indent=1, sort_keys=True) if as_json else str(info))


@app.command()
def verify(
    file: _File,
    trusted: Annotated[
        list[str], typer.Option(help="A verifier's public text, or a file of them.")
    ],
) -> None:
    """Check the signature over claims and content; needs no decryption key."""
    info = archive.verify(file, trusted=verifiers_from(trusted))
    typer.echo(str(info))


@app.command("open")
def open_(
    file: _File,
    out: Annotated[
        Path, typer.Option(help="Where the plain safetensors file goes; it must not exist.")
    ],
    identity: Annotated[Path | None, typer.Option(help="The identity that opens it.")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="Or the passphrase; - asks.")] = None,
    trusted: Annotated[
        list[str] | None, typer.Option(help="Demand a signature by this verifier.")
    ] = None,
) -> None:
    """Decrypt a file to plain safetensors."""
    unlocking = unlocking_from(identity, passphrase_file, trusted or [])
    if unlocking is None:
        raise archive.InvalidKey(
            "expected --identity or --passphrase-file, got neither; name what opens the file"
        )
    archive.decrypt(file, out, identity=unlocking.identity, trusted=unlocking.trusted)
    _message(f"plain file: {out}")


def _message(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
