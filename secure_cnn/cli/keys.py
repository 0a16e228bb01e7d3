"""Keys as the command line takes them: options that name files and public texts, never a secret."""

import getpass
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from secure_cnn import archive
from secure_cnn.archive.keys.keyfile import read_private
from secure_cnn.checkpoint import Sealing, Unlocking
from secure_cnn.files import reading

__all__ = [
    "ENVIRONMENT",
    "IdentityFile",
    "Kek",
    "PassphraseFile",
    "Recipients",
    "SignerFile",
    "Trusted",
    "Verifiers",
    "identity_from",
    "kek_from",
    "needed",
    "passphrase_from",
    "recipients_from",
    "sealing_from",
    "signer_from",
    "somebody",
    "trusted_from",
    "unlocking_from",
    "verifiers_from",
]

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
Verifiers: TypeAlias = Annotated[
    list[str],
    typer.Option("--trusted", help="A verifier's public text, or a file of them."),
]

_MAX_TEXTS = 1 << 20
ENVIRONMENT = "SECURE_CNN_PASSPHRASE"


def sealing_from(
    recipients: Sequence[str],
    passphrase_file: Path | None,
    kek: str | None,
    signer: Path | None,
) -> Sealing | None:
    """To whom checkpoints are sealed; None where nobody was named, which is asked of the options.

    Not of what was found by them: a named file in which nobody is must not leave a plain model.
    """
    if not recipients and passphrase_file is None and kek is None:
        if signer is not None:
            raise archive.InvalidKey(
                "expected a recipient for the signed checkpoint, got none; name one with "
                "--recipient"
            )
        return None
    who = recipients_from(recipients, passphrase_file, kek)
    return Sealing(recipients=tuple(who), signer=signer_from(signer))


def unlocking_from(
    identity: Path | None, passphrase_file: Path | None, kek: str | None, trusted: Sequence[str]
) -> Unlocking | None:
    """What opens a sealed file; None where nothing was given, and then no signature either."""
    opens = identity_from(identity, passphrase_file, kek)
    if opens is None:
        if trusted:
            raise archive.InvalidKey(
                "--trusted: expected --identity, --passphrase-file or --kek with it, got none: a "
                "plain file carries no signature; archive verify checks a sealed one without a key"
            )
        return None
    return Unlocking(identity=opens, trusted=trusted_from(trusted))


def recipients_from(
    recipients: Sequence[str], passphrase_file: Path | None, kek: str | None
) -> list[archive.AnyRecipient]:
    """Everyone who is to open a file, if anybody; a prompt for the passphrase asks twice."""
    who: list[archive.AnyRecipient] = [
        archive.Recipient.from_text(text) for given in recipients for text in _texts(given)
    ]
    if passphrase_file is not None:
        who.append(passphrase_from(passphrase_file, twice=True))
    if kek is not None:
        who.append(kek_from(kek))
    return who


def somebody(who: list[archive.AnyRecipient], prefix: str) -> list[archive.AnyRecipient]:
    """Who can open a file, if that is anybody; the options for others begin with `prefix`."""
    if who:
        return who
    raise archive.InvalidKey(
        "expected somebody who can open the file, got nobody; name one with --recipient, "
        f"{prefix}passphrase-file or {prefix}kek"
    )


def identity_from(
    identity: Path | None, passphrase_file: Path | None, kek: str | None
) -> archive.AnyIdentity | None:
    """What opens a file, which at most one of these names; None where none does."""
    named = sum(given is not None for given in (identity, passphrase_file, kek))
    if named > 1:
        raise archive.InvalidKey(
            f"expected one of --identity, --passphrase-file and --kek, got {named}; one opens it"
        )
    if identity is not None:
        return archive.read_identity(identity)
    if passphrase_file is not None:
        return passphrase_from(passphrase_file)
    return None if kek is None else kek_from(kek)


def needed(
    identity: Path | None, passphrase_file: Path | None, kek: str | None
) -> archive.AnyIdentity:
    """What opens a file, which exactly one of these names."""
    found = identity_from(identity, passphrase_file, kek)
    if found is None:
        raise archive.InvalidKey(
            "expected --identity, --passphrase-file or --kek, got none; name what opens the file"
        )
    return found


def kek_from(source: str) -> archive.KeyEncryptionKey:
    """A key-encryption key from its file, or by ``env:``, ``command:`` or ``keyring:``."""
    kind, _, rest = source.partition(":")
    if kind == "env":
        return archive.kek_from_environment(os.environ, rest)
    if kind == "command":
        try:
            return archive.kek_from_command(shlex.split(rest))
        except ValueError as error:
            raise archive.KeyServiceError(f"--kek: cannot read the command: {error}") from None
    if kind == "keyring":
        service, _, user = rest.rpartition("/")
        return archive.kek_from_keyring(service, user)
    return archive.read_kek(source)


def verifiers_from(trusted: Sequence[str]) -> list[archive.Verifier]:
    """Verifiers from public texts, or from files that hold one a line."""
    return [archive.Verifier.from_text(text) for given in trusted for text in _texts(given)]


def trusted_from(trusted: Sequence[str] | None) -> list[archive.Verifier] | None:
    """Whose signatures are demanded; None where nobody was named, and none is."""
    return verifiers_from(trusted) if trusted else None


def signer_from(path: Path | None) -> archive.Signer | None:
    """The signer in a file, where one was named."""
    return None if path is None else archive.read_signer(path)


def passphrase_from(path: Path, *, twice: bool = False) -> archive.Passphrase:
    """A passphrase: the first line of a private file, or, for `-`, of environment or prompt."""
    if str(path) == "-":
        text = os.environ.get(ENVIRONMENT)
        if not text:
            text = getpass.getpass("Passphrase: ")
            if twice and getpass.getpass("Again: ") != text:
                raise archive.InvalidKey("expected the same passphrase twice, got two; try again")
        return archive.Passphrase(text)
    lines = read_private(path).splitlines()
    if not any(lines[:1]):
        raise archive.KeyFileError(
            f"{path}: expected a passphrase, got an empty line; put it on the first line"
        )
    return archive.Passphrase(lines[0])


def _texts(given: str) -> list[str]:
    """The public texts in a file, at least one, or the text itself."""
    if secret := _secret_kind(given):
        raise archive.InvalidKey(
            f"expected a public key, got a {secret}, which others may now have read; make a new "
            "pair, and give its public half"
        )
    if given.startswith("secure-cnn-"):  # a hybrid key is longer than a file's name may be
        return [given]
    try:
        with reading(given) as file:
            raw = file.read(_MAX_TEXTS + 1)
        if len(raw) > _MAX_TEXTS:  # never cut: those at its end would be left out without a word
            raise archive.KeyFileError(
                f"{given}: expected a file of public keys, one a line, got more than {_MAX_TEXTS} "
                "bytes; give several files"
            )
        lines = raw.decode("utf-8").splitlines()
    except FileNotFoundError:
        cure = "archive keygen prints the public key of a new pair"
        if given.lower().startswith("age1"):
            cure = "age's keys open files of age's own: secure-cnn archive export --age"
        raise archive.KeyFileError(
            f"{given}: expected a public key or a file of them, found no such file; {cure}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise archive.KeyFileError(
            f"{given}: expected a file of public keys: {_reason(error)}; one a line"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if secret := next(filter(None, map(_secret_kind, found)), ""):
        raise archive.InvalidKey(
            f"{given}: expected public keys, got a {secret}, which is a secret one; give the .pub "
            "file with the text that archive keygen printed"
        )
    if not found:
        raise archive.KeyFileError(
            f"{given}: expected a public key, found none; put the text in it that archive keygen "
            "printed, which is also a comment in the file of the secret key"
        )
    return found


def _secret_kind(line: str) -> str:
    """What kind of secret key a text is; empty if it is none."""
    kind, found, _ = line.partition("-secret-1-")
    return f"{kind}{found[:-1]}" if found and kind.startswith("secure-cnn-") else ""


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or "unknown" if isinstance(error, OSError) else "it is no UTF-8 text"
