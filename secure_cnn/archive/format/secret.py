"""Secrets: objects that are neither copied nor pickled, and how one secret wraps the file key.

A trainer that pickles its settings, or a worker process that they are sent to, would carry a key
along unseen. A secret leaves by `write_key`, or by `to_text`, which says so.
"""

import hmac
from typing import NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_cnn.archive.errors import SecretKeptError

__all__ = ["WRAP_LENGTH", "Secret", "hkdf", "unwrap_key", "wrap_key"]

WRAP_LENGTH = 80


class Secret:
    """A class whose objects hold a secret: they are neither copied nor pickled."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise SecretKeptError(
            f"a {type(self).__name__} is neither copied nor pickled, since its secret would go "
            "along; hand over the object itself, or write_key and the path of the file"
        )

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)


def hkdf(secret: bytes, info: bytes, *, length: int = 32, salt: bytes | None = None) -> bytes:
    """HKDF-SHA-256: as many bytes of a secret as are wanted for one purpose, which `info` names."""
    return HKDF(hashes.SHA256(), length, salt=salt, info=info).derive(secret)


def wrap_key(secret: bytes, salt: bytes | None, info: bytes, file_key: bytes) -> bytes:
    """The 80 bytes that give the file key back to whoever has the secret.

    The secret has 32 bytes that cannot be guessed cheaply, and wraps under `info`, what the wrap
    belongs to. `salt` is fresh for each wrap where secret and info may be used again.
    """
    # The nonce is zero, since `key` is of this wrap alone. The commitment keeps one slot from being
    # made to open under many secrets (Len, Grubbs and Ristenpart, 2021).
    key, commitment = _derive(secret, salt, info)
    return commitment + AESGCM(key).encrypt(bytes(12), file_key, None)


def unwrap_key(secret: bytes, salt: bytes | None, info: bytes, wrapped: bytes) -> bytes | None:
    """The file key; None if secret, salt, info or wrap are not those it was wrapped with."""
    key, commitment = _derive(secret, salt, info)
    if not hmac.compare_digest(commitment, wrapped[:32]):
        return None
    try:
        return AESGCM(key).decrypt(bytes(12), wrapped[32:], None)
    except InvalidTag:
        return None


def _derive(secret: bytes, salt: bytes | None, info: bytes) -> tuple[bytes, bytes]:
    """The wrapping key, and the commitment to it."""
    both = hkdf(secret, info, length=64, salt=salt)
    return both[:32], both[32:]
