"""The file key under another secret of 32 bytes: HKDF, a commitment, AES-256-GCM.

The wrapping key is bound to kind and file through HKDF `info`, and comes with a commitment, so that
one slot cannot be made to open under many secrets (Len, Grubbs and Ristenpart, 2021). Shared by
passphrases, key-encryption keys and key services.
"""

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["WRAP_LENGTH", "unwrap_key", "wrap_key"]

WRAP_LENGTH = 80


def wrap_key(secret: bytes, salt: bytes | None, info: bytes, file_key: bytes) -> bytes:
    """The 80 bytes that give the file key back to whoever has the secret.

    Args:
        secret: 32 bytes that cannot be guessed cheaply.
        salt: Fresh for each wrap where `secret` and `info` may be used again.
        info: What the wrap belongs to; see `slot_info`.
        file_key: 32 bytes.
    """
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
    both = HKDF(hashes.SHA256(), 64, salt=salt, info=info).derive(secret)
    return both[:32], both[32:]
