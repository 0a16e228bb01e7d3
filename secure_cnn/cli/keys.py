"""Keys as the command line takes them: files and public texts, never a secret as an argument."""

import getpass
import os
from collections.abc import Sequence
from pathlib import Path

from secure_cnn import archive
from secure_cnn.checkpoint import Sealing, Unlocking

__all__ = ["passphrase_from", "sealing_from", "signer_from", "unlocking_from", "verifiers_from"]

_ENVIRONMENT = "SECURE_CNN_PASSPHRASE"


def sealing_from(
    recipients: Sequence[str], passphrase_file: Path | None, signer: Path | None
) -> Sealing | None:
    """To whom checkpoints are sealed; None where nobody was named.

    Args:
        recipients: Public texts, or files that hold one a line.
        passphrase_file: A file whose first line is a passphrase; `-` asks for it.
        signer: A signer's file.

    Raises:
        ArchiveError: A key cannot be read.

    Example:
        >>> sealing_from([], None, None) is None
        True
    """
    who: list[archive.SlotWriter] = [
        archive.Recipient.from_text(text) for given in recipients for text in _texts(given)
    ]
    if passphrase_file is not None:
        who.append(passphrase_from(passphrase_file))
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

    Example:
        >>> unlocking_from(None, None, []) is None
        True
    """
    reader: archive.SlotReader | None = None
    if identity is not None:
        reader = archive.read_identity(identity)
    elif passphrase_file is not None:
        reader = passphrase_from(passphrase_file)
    if reader is None:
        if trusted:
            raise archive.InvalidKey(
                "--trusted: expected --identity or --passphrase-file with it, got neither: a plain "
                "file carries no signature; archive verify checks a sealed one without a key"
            )
        return None
    return Unlocking(identity=reader, trusted=verifiers_from(trusted) if trusted else None)


def verifiers_from(trusted: Sequence[str]) -> list[archive.Verifier]:
    """Verifiers from public texts, or from files that hold one a line.

    Raises:
        ArchiveError: A text is not one.

    Example:
        >>> verifiers_from([])
        []
    """
    return [archive.Verifier.from_text(text) for given in trusted for text in _texts(given)]


def signer_from(path: Path | None) -> archive.Signer | None:
    """The signer in a file, where one was named.

    Raises:
        ArchiveError: The file cannot be read, or others can read it.

    Example:
        >>> signer_from(None) is None
        True
    """
    return None if path is None else archive.read_signer(path)


def passphrase_from(path: Path) -> archive.Passphrase:
    """A passphrase from a file's first line, or, for `-`, from the environment or a prompt.

    Raises:
        ArchiveError: There is none, or it is not usable.

    Example:
        >>> passphrase_from(Path("nowhere"))
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.KeyFileError: nowhere: expected a file with a passphrase: ...
    """
    if str(path) == "-":
        return archive.Passphrase(os.environ.get(_ENVIRONMENT) or getpass.getpass("Passphrase: "))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise archive.KeyFileError(f"{path}: expected a file with a passphrase: {error}") from error
    return archive.Passphrase(lines[0] if lines else "")


def _texts(given: str) -> list[str]:
    """The public texts in a file, or the text itself."""
    path = Path(given)
    try:
        if not path.is_file():
            return [given]
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise archive.KeyFileError(f"{given}: expected a file of public keys: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
