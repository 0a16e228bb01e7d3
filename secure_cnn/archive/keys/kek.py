"""A key that some place other than the file keeps: 32 bytes there, or a service that wraps.

A key service wraps and unwraps and never shows its own key: the seam for cloud key management,
hardware modules and attestation brokers. A file never says where a service is to be found; that is
the caller's to know. Nothing here falls back to anything weaker.
"""

import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol, final

from secure_cnn.archive.errors import InvalidKey, KeyServiceError
from secure_cnn.archive.format.slots import (
    WRAP_LENGTH,
    Secret,
    Slot,
    SlotKind,
    hkdf,
    register,
    slot_info,
    unwrap_key,
    unwrap_own,
    wrap_key,
)
from secure_cnn.archive.keys.keyfile import decode_key, encode_key, read_key

__all__ = [
    "KEK",
    "SERVICE",
    "KeyEncryptionKey",
    "KeyService",
    "ServiceKey",
    "generate_kek",
    "kek_from_command",
    "kek_from_environment",
    "kek_from_keyring",
    "read_kek",
]

_SALT_LENGTH = 16
_MAX_WRAPPED = 1024  # by a service
KEK = register(
    SlotKind(
        number=4,
        name="KEK",
        body_lengths=range(_SALT_LENGTH + WRAP_LENGTH, _SALT_LENGTH + WRAP_LENGTH + 1),
    )
)
SERVICE = register(
    SlotKind(
        number=5,
        name="SERVICE",
        body_lengths=range(WRAP_LENGTH + 1, WRAP_LENGTH + _MAX_WRAPPED + 1),
    )
)

_PREFIX = "secure-cnn-kek-secret-1"
_COMMAND_SECONDS = 60
_CURE = "a key that it was sealed for"


@final
class KeyEncryptionKey(Secret):
    """A shared secret key of 32 random bytes, as recipient and as identity; its repr hides it.

    For something that people can remember, see `Passphrase`.

    Example:
        >>> kek = generate_kek()
        >>> kek.unwrap([kek.wrap(bytes(32), b"c" * 32)], b"c" * 32) == bytes(32)
        True
    """

    __slots__ = ("_secret", "key_id")
    kind = KEK

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise InvalidKey(f"expected a key-encryption key of 32 bytes, got {len(secret)}")
        self._secret = secret
        self.key_id = hkdf(secret, b"secure-cnn/sealed/v1/kek-id", length=16)

    @property
    def comments(self) -> tuple[str, ...]:
        """What a key file says of it."""
        return (
            "secure-cnn key-encryption key: keep it secret, keep a copy elsewhere",
            f"id: {self.key_id.hex()}",
        )

    def to_text(self) -> str:
        """The secret, one line: whoever reads it can open the files. Prefer `write_key`."""
        return encode_key(_PREFIX, 1, self._secret)

    @classmethod
    def from_text(cls, text: str) -> "KeyEncryptionKey":
        """The key of a line made by `to_text`."""
        kind, secret = decode_key(_PREFIX, text)
        if kind != 1:
            raise InvalidKey(f"a key {_PREFIX}-… of kind {kind} is unknown; use a newer version")
        return cls(secret)

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that opens with this key."""
        salt = os.urandom(_SALT_LENGTH)
        wrapped = wrap_key(self._secret, salt, slot_info(self.kind, core_hash), file_key)
        return Slot(kind=self.kind.number, key_id=self.key_id, body=salt + wrapped)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the slot with this key's id."""
        info = slot_info(self.kind, core_hash)

        def open_body(body: bytes) -> bytes | None:
            return unwrap_key(self._secret, body[:_SALT_LENGTH], info, body[_SALT_LENGTH:])

        return unwrap_own(slots, self, open_body, cure=_CURE)

    def __repr__(self) -> str:
        return f"KeyEncryptionKey({self.key_id.hex()})"


def generate_kek() -> KeyEncryptionKey:
    """A fresh key-encryption key from the operating system's generator.

    Example:
        >>> generate_kek().key_id != generate_kek().key_id
        True
    """
    return KeyEncryptionKey(os.urandom(32))


def read_kek(path: str | os.PathLike[str]) -> KeyEncryptionKey:
    """The key in a file made by `write_key`, which its owner alone may reach.

    Example:
        >>> read_kek("no-such-file")
        Traceback (most recent call last):
        secure_cnn.archive.errors.KeyFileError: no-such-file: cannot read the key file: ...
    """
    return read_key(path, KeyEncryptionKey.from_text)


def kek_from_environment(
    environment: Mapping[str, str], name: str = "SECURE_CNN_KEK"
) -> KeyEncryptionKey:
    """The key whose text a variable of the environment, such as ``os.environ``, holds.

    Example:
        >>> kek = generate_kek()
        >>> kek_from_environment({"SECURE_CNN_KEK": kek.to_text()}).key_id == kek.key_id
        True
    """
    text = environment.get(name)
    if not text:
        raise KeyServiceError(f"expected a key in the variable {name}, got none; set it")
    return KeyEncryptionKey.from_text(text)


def kek_from_command(command: Sequence[str]) -> KeyEncryptionKey:
    """The key that a command prints within a minute, such as a password manager; no shell.

    Example:
        >>> kek = generate_kek()
        >>> kek_from_command(["echo", kek.to_text()]).key_id == kek.key_id
        True
    """
    if not command:
        raise KeyServiceError("expected a command that prints a key, got none")
    try:
        done = subprocess.run(  # noqa: S603 - the caller's own command, and no shell
            list(command),
            stdin=subprocess.DEVNULL,  # ours may hold the file that the key opens
            capture_output=True,
            check=False,
            timeout=_COMMAND_SECONDS,
            text=True,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise KeyServiceError(
            f"the command {command[0]} gave no key ({type(error).__name__}); run it by hand"
        ) from None
    if done.returncode != 0:
        raise KeyServiceError(
            f"the command {command[0]} ended with {done.returncode}; run it by hand"
        )
    return KeyEncryptionKey.from_text(done.stdout)


def kek_from_keyring(service: str, user: str) -> KeyEncryptionKey:
    """The key in the keyring of the operating system; needs the package `keyring`.

    Raises:
        KeyServiceError: The package is missing, there is no keyring, it is one that keeps keys
            unprotected, or it has no entry for this service and user.

    Example:
        >>> kek_from_keyring("secure-cnn", "nobody")
        Traceback (most recent call last):
        secure_cnn.archive.errors.KeyServiceError: ...
    """
    try:
        import keyring  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise KeyServiceError(
            "expected the package keyring, which is not installed; run: pip install keyring"
        ) from None
    backend = type(keyring.get_keyring()).__module__
    if backend.startswith(("keyring.backends.fail", "keyring.backends.null", "keyrings.alt")):
        raise KeyServiceError(
            f"the keyring here ({backend}) protects nothing; use a key file of mode 0600 instead"
        )
    try:
        text = keyring.get_password(service, user)
    except Exception as error:
        raise KeyServiceError(
            f"the keyring gave no key ({type(error).__name__}); unlock it and try again"
        ) from None
    if not text:
        raise KeyServiceError(f"the keyring has no key for {service!r}, {user!r}; store it there")
    return KeyEncryptionKey.from_text(text)


class KeyService(Protocol):
    """What a plug-in has to do. Any exception of its own means that it did not.

    Example:
        >>> class Masking:  # protects nothing: a real one asks its server
        ...     wrap = unwrap = lambda self, key, context: bytes(byte ^ 7 for byte in key)
        >>> service: KeyService = Masking()
        >>> service.unwrap(service.wrap(b"k" * 32, b"file"), b"file") == b"k" * 32
        True
    """

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The 32-byte key, wrapped: 1 to 1024 bytes. The context should be bound, if it can be."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The 32-byte key that was wrapped with this context."""


@final
class ServiceKey(Secret):
    """A key that a service keeps, as recipient and as identity.

    The service wraps a key of one use, and that one the file key: so the file is bound whether the
    service honours its context or not. `name` is what the key is called there; 16 bytes of its hash
    stand in the files.

    Example:
        >>> class Reversing:  # protects nothing
        ...     wrap = unwrap = staticmethod(lambda key, context: key[::-1])
        >>> key = ServiceKey(Reversing(), "projects/example/keys/1")
        >>> key.unwrap([key.wrap(bytes(32), b"c" * 32)], b"c" * 32) == bytes(32)
        True
    """

    __slots__ = ("_name", "_service", "key_id")
    kind = SERVICE

    def __init__(self, service: KeyService, name: str) -> None:
        if not name:
            raise InvalidKey("expected the name of a key in the service, got an empty text")
        try:
            named = b"secure-cnn/sealed/v1/service|" + name.encode()
        except UnicodeEncodeError:
            raise InvalidKey("expected the name of a key that UTF-8 can hold") from None
        self._service, self._name = service, name
        self.key_id = hashlib.sha256(named).digest()[:16]

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that opens with the service's help."""
        once, info = os.urandom(32), slot_info(self.kind, core_hash)
        try:
            wrapped = bytes(self._service.wrap(once, info))
        except Exception as error:
            raise self._failure(error) from error
        if not 1 <= len(wrapped) <= _MAX_WRAPPED or once in wrapped:
            raise KeyServiceError(
                f"{self!r}: expected a wrapped key of 1 to {_MAX_WRAPPED} bytes that hides the "
                f"key, got {len(wrapped)}; is this the right service?"
            )
        body = wrap_key(once, None, info, file_key) + wrapped
        return Slot(kind=self.kind.number, key_id=self.key_id, body=body)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the slot with this key's id."""
        info = slot_info(self.kind, core_hash)

        def open_body(body: bytes) -> bytes | None:
            try:
                once = bytes(self._service.unwrap(body[WRAP_LENGTH:], info))
            except Exception as error:
                raise self._failure(error) from error
            return unwrap_key(once, None, info, body[:WRAP_LENGTH])

        return unwrap_own(slots, self, open_body, cure=_CURE)

    def _failure(self, error: Exception) -> KeyServiceError:
        return KeyServiceError(
            f"{self!r}: the service failed ({type(error).__name__}); see what it says"
        )

    def __repr__(self) -> str:
        return f"ServiceKey({self._name!r} {self.key_id.hex()})"
