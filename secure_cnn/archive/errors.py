"""Everything that can go wrong with a sealed file, as one tree under `ArchiveError`.

Each message says what was expected, what came, and what to do next. No message holds a secret.
"""

from secure_cnn.errors import SecureCNNError

__all__ = [
    "ArchiveError",
    "ClaimMismatch",
    "InvalidKey",
    "KeyFileError",
    "KeyServiceError",
    "LimitExceeded",
    "MissingExtra",
    "NotSealed",
    "RolledBack",
    "SecretKeptError",
    "StateError",
    "StorageError",
    "Tampered",
    "Truncated",
    "UnsupportedVersion",
    "UntrustedSigner",
    "WrongKey",
]


class ArchiveError(SecureCNNError):
    """Every error of this room; never raised itself.

    Example:
        >>> issubclass(Tampered, ArchiveError)
        True
    """


class WrongKey(ArchiveError):
    """No slot of the file opens with the identity given.

    Example:
        >>> issubclass(WrongKey, ArchiveError)
        True
    """


class Tampered(ArchiveError):
    """The bytes are not those that were sealed or signed; nothing of them is handed out.

    Example:
        >>> issubclass(Tampered, ArchiveError)
        True
    """


class Truncated(ArchiveError):
    """The file is shorter than its own header says.

    Example:
        >>> issubclass(Truncated, ArchiveError)
        True
    """


class LimitExceeded(ArchiveError):
    """A length, count or cost is outside the limits of `docs/format.md`; nothing was allocated.

    Example:
        >>> issubclass(LimitExceeded, ArchiveError)
        True
    """


class UnsupportedVersion(ArchiveError):
    """The file needs a reader of another version, or of a critical flag unknown to this one.

    Example:
        >>> issubclass(UnsupportedVersion, ArchiveError)
        True
    """


class MissingExtra(ArchiveError):
    """A library that is not installed with the package itself is needed for this.

    Args:
        what: What needs it.
        extra: The extra of this package that brings it.

    Example:
        >>> raise MissingExtra("a bill of materials", "bom")
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.MissingExtra: a bill of materials needs a library that is not
        installed; run: pip install 'secure-cnn[bom]'
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a library that is not installed; run: pip install 'secure-cnn[{extra}]'"
        )


class NotSealed(ArchiveError):
    """The file is not a sealed file; a plain file is never accepted in place of one.

    Example:
        >>> issubclass(NotSealed, ArchiveError)
        True
    """


class UntrustedSigner(ArchiveError):
    """The file is not signed, or by a signer who is not among those trusted.

    Example:
        >>> issubclass(UntrustedSigner, ArchiveError)
        True
    """


class ClaimMismatch(ArchiveError):
    """A claim of the file is missing or is not the one expected.

    Example:
        >>> issubclass(ClaimMismatch, ArchiveError)
        True
    """


class StateError(ArchiveError):
    """A state or a claim holds something that a sealed file cannot hold; the message has its path.

    Example:
        >>> issubclass(StateError, ArchiveError)
        True
    """


class InvalidKey(ArchiveError):
    """The text of a key cannot be read, or a set of keys cannot be used together.

    Example:
        >>> issubclass(InvalidKey, ArchiveError)
        True
    """


class KeyFileError(ArchiveError):
    """A key file is missing, readable by others, already there, or holds no key.

    Example:
        >>> issubclass(KeyFileError, ArchiveError)
        True
    """


class SecretKeptError(ArchiveError, TypeError):
    """Something that holds a secret was to be copied or pickled.

    Example:
        >>> issubclass(SecretKeptError, TypeError)
        True
    """


class KeyServiceError(ArchiveError):
    """A key service, keyring or command did not give the key; nothing weaker was used instead.

    Example:
        >>> issubclass(KeyServiceError, ArchiveError)
        True
    """


class RolledBack(ArchiveError):
    """An older or another file stands in the place of the one that was expected.

    Example:
        >>> issubclass(RolledBack, ArchiveError)
        True
    """


class StorageError(ArchiveError):
    """The operating system refused to read or write, or a file is already there.

    Example:
        >>> issubclass(StorageError, ArchiveError)
        True
    """
