"""Keys as the command line takes them: files and public texts, never a secret as an argument."""

import getpass
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from secure_cnn import archive
from secure_cnn.archive.keys.keyfile import read_private
from secure_cnn.checkpoint import Sealing, Unlocking
from secure_cnn.files import reading

__all__ = [
    "kek_from",
    "passphrase_from",
    "reader_from",
    "sealing_from",
    "signer_from",
    "unlocking_from",
    "verifiers_from",
    "writers_from",
]

_MAX_TEXTS = 1 << 20
_ENVIRONMENT = "SECURE_CNN_PASSPHRASE"


def sealing_from(
    recipients: Sequence[str], passphrase_file: Path | None, signer: Path | None
) -> Sealing | None:
    """To whom checkpoints are sealed; None where nobody was named.

    Args:
        recipients: Public texts, or files that hold one a line.
        passphrase_file: A file whose first line is a passphrase; `-` asks for it.

    Raises:
        ArchiveError: A key cannot be read.
    """
    who = writers_from(recipients, passphrase_file, None)
    if not who:
        if signer is not None:
            raise archive.InvalidKey(
                "expected a recipient for the signed checkpoint, got none; name one with "
                "--recipient"
            )
        return None
    return Sealing(recipients=tuple(who), signer=signer_from(signer))


def unlocking_from(
    identity: Path | None, passphrase_file: Path | None, trusted: Sequence[str]
) -> Unlocking | None:
    """What opens a sealed file; None where nothing was given.

    Raises:
        ArchiveError: A key cannot be read, or a signature is demanded of a plain file.
    """
    reader = reader_from(identity, passphrase_file, None)
    if reader is None:
        if trusted:
            raise archive.InvalidKey(
                "--trusted: expected --identity or --passphrase-file with it, got neither: a plain "
                "file carries no signature; archive verify checks a sealed one without a key"
            )
        return None
    return Unlocking(identity=reader, trusted=verifiers_from(trusted) if trusted else None)


def writers_from(
    recipients: Sequence[str], passphrase_file: Path | None, kek: str | None
) -> list[archive.AnyRecipient]:
    """Everyone who is to open a file; nobody where nobody was named.

    Args:
        recipients: Public texts, or files that hold one a line.
        passphrase_file: As for `passphrase_from`; a prompt asks twice.
        kek: As for `kek_from`.

    Raises:
        ArchiveError: A key cannot be read.
    """
    who: list[archive.AnyRecipient] = [
        archive.Recipient.from_text(text) for given in recipients for text in _texts(given)
    ]
    if passphrase_file is not None:
        who.append(passphrase_from(passphrase_file, twice=True))
    if kek is not None:
        who.append(kek_from(kek))
    return who


def reader_from(
    identity: Path | None, passphrase_file: Path | None, kek: str | None
) -> archive.AnyIdentity | None:
    """What opens a file, which one of these names; None where none does.

    Raises:
        ArchiveError: A key cannot be read, or more than one is named.
    """
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


def kek_from(source: str) -> archive.KeyEncryptionKey:
    """A key-encryption key from where it is kept; never the key itself as an argument.

    Args:
        source: The path of a key file, ``env:NAME``, ``command:PROGRAM ARGUMENTS`` (no shell) or
            ``keyring:SERVICE/USER``.

    Raises:
        ArchiveError: There is no key, or it cannot be read.
    """
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
    """Verifiers from public texts, or from files that hold one a line.

    Raises:
        ArchiveError: A text is not one.
    """
    return [archive.Verifier.from_text(text) for given in trusted for text in _texts(given)]


def signer_from(path: Path | None) -> archive.Signer | None:
    """The signer in a file, where one was named.

    Raises:
        ArchiveError: The file cannot be read, or others can read it.
    """
    return None if path is None else archive.read_signer(path)


def passphrase_from(path: Path, *, twice: bool = False) -> archive.Passphrase:
    """A passphrase from a file's first line, or, for `-`, from the environment or a prompt.

    Args:
        path: The file, which its owner alone may touch, as a key file; or `-`.
        twice: Whether a prompt asks again, since a typing error would shut everybody out.

    Raises:
        ArchiveError: There is none, or it is not usable.
    """
    if str(path) == "-":
        text = os.environ.get(_ENVIRONMENT)
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
    """The public texts in a file, or the text itself."""
    if secret := _secret_kind(given):
        raise archive.InvalidKey(
            f"expected a public key, got a {secret}, which others may now have read; make a new "
            "pair, and give its public half"
        )
    if given.startswith("secure-cnn-"):  # a hybrid key is longer than a file's name may be
        return [given]
    try:
        with reading(given) as file:
            lines = file.read(_MAX_TEXTS).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise archive.KeyFileError(
            f"{given}: expected a public key or a file of them, found no such file; "
            "archive keygen prints the public key of a new pair"
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
    return found


def _secret_kind(line: str) -> str:
    """What kind of secret key a text is; empty if it is none."""
    kind, found, _ = line.partition("-secret-1-")
    return f"{kind}{found[:-1]}" if found and kind.startswith("secure-cnn-") else ""


def _reason(error: OSError | UnicodeDecodeError) -> str:
    """Why a text file could not be read, without its path."""
    return error.strerror or "unknown" if isinstance(error, OSError) else "it is no UTF-8 text"
