"""A key service: something that wraps and unwraps a key and never shows its own.

The seam for cloud key management, hardware modules and attestation brokers: two methods. The file
is bound here, whether the service honours its context or not. A file never says where a service is
to be found; that is the caller's to know.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol, final

from secure_cnn.archive.errors import (
    ArchiveError,
    InvalidKey,
    KeyServiceError,
    Tampered,
    WrongKey,
)
from secure_cnn.archive.format.secret import Secret
from secure_cnn.archive.format.slots import Slot, SlotKind, slot_info
from secure_cnn.archive.keys.wrap import WRAP_LENGTH, unwrap_key, wrap_key

__all__ = ["KeyService", "ServiceKey"]

_MAX_WRAPPED = SlotKind.SERVICE.body_lengths[-1] - WRAP_LENGTH


class KeyService(Protocol):
    """What a plug-in has to do. Any exception of its own means that it did not.

    Example:
        >>> class Reversing:  # protects nothing
        ...     def wrap(self, key, context):
        ...         return key[::-1]
        ...     def unwrap(self, wrapped, context):
        ...         return wrapped[::-1]
        >>> plugin: KeyService = Reversing()
    """

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The 32-byte key, wrapped: 1 to 1024 bytes. The context should be bound, if it can be."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The 32-byte key that was wrapped with this context."""


@final
class ServiceKey(Secret):
    """A key that a service keeps, as recipient and as identity.

    Args:
        service: What wraps and unwraps.
        name: What the key is called there; 16 bytes of its hash stand in the files.

    Raises:
        InvalidKey: The name is empty or no text that UTF-8 can hold.

    Example:
        >>> class Reversing:  # protects nothing
        ...     def wrap(self, key, context):
        ...         return key[::-1]
        ...     def unwrap(self, wrapped, context):
        ...         return wrapped[::-1]
        >>> key = ServiceKey(Reversing(), "projects/example/keys/1")
        >>> key.unwrap([key.wrap(bytes(32), b"c" * 32)], b"c" * 32) == bytes(32)
        True
    """

    __slots__ = ("_name", "_service", "key_id")
    kind = SlotKind.SERVICE

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
        """A slot that opens with the service's help.

        Args:
            file_key: 32 bytes.
            core_hash: 32 bytes, the core hash of the file.

        Raises:
            KeyServiceError: The service fails, or gives back something of another length.
        """
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
        return Slot(kind=self.kind, key_id=self.key_id, body=body)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the slot with this key's id.

        Raises:
            WrongKey: No slot has this key's id.
            KeyServiceError: The service fails.
            Tampered: What it gives does not open the slot: it or the core was changed.
        """
        found = [slot for slot in slots if (slot.kind, slot.key_id) == (self.kind, self.key_id)]
        if not found:
            raise WrongKey(f"not sealed for {self!r}; open it with a key that it was sealed for")
        info = slot_info(self.kind, core_hash)
        for slot in found:
            try:
                once = bytes(self._service.unwrap(slot.body[WRAP_LENGTH:], info))
            except Exception as error:
                raise self._failure(error) from error
            file_key = unwrap_key(once, None, info, slot.body[:WRAP_LENGTH])
            if file_key is not None:
                return file_key
        raise Tampered(
            f"the slot of {self!r} does not open: the header was changed; get the file again"
        )

    def _failure(self, error: Exception) -> ArchiveError:
        """The service's own error as one of ours."""
        return KeyServiceError(
            f"{self!r}: the service failed ({type(error).__name__}); see what it says"
        )

    def __repr__(self) -> str:
        return f"ServiceKey({self._name!r} {self.key_id.hex()})"
