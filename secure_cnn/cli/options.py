"""The options that several commands share, and how these speak to people."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from secure_cnn import archive
from secure_cnn.printable import Terminal
from secure_cnn.recipe import Recipe

__all__ = [
    "File",
    "IdentityFile",
    "Kek",
    "NewFile",
    "PassphraseFile",
    "Recipients",
    "SignerFile",
    "Trusted",
    "given_settings",
    "message",
    "needed",
]

File: TypeAlias = Annotated[Path, typer.Argument(help="A sealed file.")]
NewFile: TypeAlias = Annotated[Path, typer.Argument(help="The file to make; it must not exist.")]
IdentityFile: TypeAlias = Annotated[
    Path | None, typer.Option("--identity", help="The identity that opens it.")
]
PassphraseFile: TypeAlias = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Or a passphrase; - asks.")
]
Kek: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--kek",
        help="Or a key-encryption key: a file, env:NAME, command:PROGRAM or keyring:SERVICE/USER.",
    ),
]
Recipients: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--recipient", help="Who can open it: a public text, or a file of them."),
]
SignerFile: TypeAlias = Annotated[
    Path | None, typer.Option("--signer", help="The signing key that vouches for it.")
]
Trusted: TypeAlias = Annotated[
    list[str] | None, typer.Option("--trusted", help="Demand a signature by this verifier.")
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


def needed(reader: archive.AnyIdentity | None) -> archive.AnyIdentity:
    """What opens a file, which must have been named.

    Raises:
        InvalidKey: It was not.
    """
    if reader is None:
        raise archive.InvalidKey(
            "expected --identity, --passphrase-file or --kek, got none; name what opens the file"
        )
    return reader
