"""Everything that can go wrong with a sealed file, as one tree under `ArchiveError`.

Each message says what was expected, what came, and what to do next. No message holds a secret.
"""

from secure_cnn.errors import SecureCNNError

__all__ = [
    "ArchiveError",
    "CertificateError",
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
        >>> assert issubclass(Tampered, ArchiveError)
    """


class WrongKey(ArchiveError):
    """No slot of the file opens with the identity given.

    Example:
        >>> assert issubclass(WrongKey, ArchiveError)
    """


class Tampered(ArchiveError):
    """The bytes are not those that were sealed or signed; nothing of them is handed out.

    Example:
        >>> assert issubclass(Tampered, ArchiveError)
    """


class Truncated(ArchiveError):
    """The file is shorter than its own header says.

    Example:
        >>> assert issubclass(Truncated, ArchiveError)
    """


class LimitExceeded(ArchiveError):
    """A length, count or cost is outside the limits of `docs/format.md`; nothing was allocated.

    Example:
        >>> assert issubclass(LimitExceeded, ArchiveError)
    """


class UnsupportedVersion(ArchiveError):
    """The file needs a reader of another version, or of a critical flag unknown to this one.

    Example:
        >>> assert issubclass(UnsupportedVersion, ArchiveError)
    """


class MissingExtra(ArchiveError):
    """A library that only an extra of this package brings is needed for this.

    Example:
        >>> raise MissingExtra("a bill of materials", "bom")
        Traceback (most recent call last):
        secure_cnn.archive.errors.MissingExtra: a bill of materials needs a library ...
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a library that is not installed; run: pip install 'secure-cnn[{extra}]'"
        )


class NotSealed(ArchiveError):
    """The file is not a sealed file; a plain file is never accepted in place of one.

    Example:
        >>> assert issubclass(NotSealed, ArchiveError)
    """


class UntrustedSigner(ArchiveError):
    """The file is not signed, or by a signer who is not among those trusted.

    Example:
        >>> assert issubclass(UntrustedSigner, ArchiveError)
    """


class ClaimMismatch(ArchiveError):
    """A claim of the file is missing or is not the one expected.

    Example:
        >>> assert issubclass(ClaimMismatch, ArchiveError)
    """


class StateError(ArchiveError):
    """A state or a claim holds something that a sealed file cannot hold; the message has its path.

    Example:
        >>> assert issubclass(StateError, ArchiveError)
    """


class CertificateError(ArchiveError):
    """A certificate says what cannot be, or what cannot be true together with the rest of it.

    Example:
        >>> assert issubclass(CertificateError, ArchiveError)
    """


class InvalidKey(ArchiveError):
    """The text of a key cannot be read, or a set of keys cannot be used together.

    Example:
        >>> assert issubclass(InvalidKey, ArchiveError)
    """


class KeyFileError(ArchiveError):
    """A key file is missing, readable by others, already there, or holds no key.

    Example:
        >>> assert issubclass(KeyFileError, ArchiveError)
    """


class SecretKeptError(ArchiveError, TypeError):
    """Something that holds a secret was to be copied or pickled.

    Example:
        >>> assert issubclass(SecretKeptError, TypeError)
    """


class KeyServiceError(ArchiveError):
    """A key service, keyring or command did not give the key; nothing weaker was used instead.

    Example:
        >>> assert issubclass(KeyServiceError, ArchiveError)
    """


class RolledBack(ArchiveError):
    """An older or another file stands in the place of the one that was expected.

    Example:
        >>> assert issubclass(RolledBack, ArchiveError)
    """


class StorageError(ArchiveError):
    """The operating system refused to read or write, or a file is already there.

    Example:
        >>> assert issubclass(StorageError, ArchiveError)
    """
