"""Who can open a sealed file: key pairs, and how they wrap the file key into a slot.

A wrap is bound to the file: SHA-256 of the core goes into HPKE `info`, so a slot moved to another
file, or a changed core, does not open. Passphrases are in `passphrase`, shared keys in `kek`.
Recipients give secrecy only: who *made* a file is the business of `signatures`. Public halves are
anonymous to outsiders save for their 16-byte id in the slot.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from secure_cnn.archive.errors import InvalidKey, Tampered, WrongKey
from secure_cnn.archive.format.secret import Secret
from secure_cnn.archive.format.slots import Slot, SlotKind, slot_info
from secure_cnn.archive.keys.keyfile import decode_key, encode_key, fingerprint, read_key

__all__ = ["Identity", "Recipient", "generate_identity", "read_identity"]

_RECIPIENT_PREFIX = "secure-cnn-recipient-1"
_IDENTITY_PREFIX = "secure-cnn-identity-secret-1"


@final
@dataclass(frozen=True, slots=True)
class Recipient:
    """The public half of an identity: whoever has it can seal for its owner, and read nothing.

    Attributes:
        kind: `SlotKind.HYBRID` (ML-KEM-768 with X25519, 1216 bytes) or `SlotKind.X25519` (32
            bytes).
        public: The raw public key; for hybrid ML-KEM's, then X25519's.

    Example:
        >>> recipient = generate_identity().recipient
        >>> Recipient.from_text(recipient.to_text()) == recipient
        True
    """

    kind: SlotKind
    public: bytes

    def __post_init__(self) -> None:
        _known_kind(self.kind)
        _public_key(self.kind, self.public)

    @property
    def key_id(self) -> bytes:
        """The 16-byte id that stands in this recipient's slots."""
        return fingerprint(self.public)

    def to_text(self) -> str:
        """One line, ``secure-cnn-recipient-1-…``, safe to publish."""
        return encode_key(_RECIPIENT_PREFIX, self.kind, self.public)

    @classmethod
    def from_text(cls, text: str) -> "Recipient":
        """The recipient of a line made by `to_text`."""
        kind, public = decode_key(_RECIPIENT_PREFIX, text)
        return cls(_known_kind(kind), public)

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that only the owner of the identity can open, by HPKE (RFC 9180) in base mode.

        Args:
            file_key: 32 bytes.
            core_hash: 32 bytes, SHA-256 of the core of the file.
        """
        try:
            body = _SUITES[self.kind].encrypt(
                file_key,
                _public_key(self.kind, self.public),
                info=slot_info(self.kind, core_hash),
            )
        except ValueError as error:
            raise InvalidKey(f"{self!r} is not a usable public key; ask its owner again") from error
        return Slot(kind=self.kind, key_id=self.key_id, body=body)

    def __repr__(self) -> str:
        return f"Recipient({self.kind.name.lower()} {self.key_id.hex()})"


@final
class Identity(Secret):
    """The secret half of a key pair: opens what was sealed for its `recipient`.

    Made by `generate_identity` or `read_identity`. The repr shows the public id only.

    Example:
        >>> me = generate_identity()
        >>> me.to_text() in repr(me)
        False
    """

    __slots__ = ("_private", "_seed", "recipient")

    def __init__(self, kind: SlotKind, seed: bytes) -> None:
        if len(seed) != 32:
            raise InvalidKey(f"expected a seed of 32 bytes, got {len(seed)}")
        self._seed = seed
        self._private = _private_key(kind, seed)
        self.recipient = Recipient(kind, _public_bytes(kind, seed))

    @property
    def comments(self) -> tuple[str, ...]:
        """What a key file says of it."""
        return (
            "secure-cnn identity: keep it secret, keep a copy elsewhere",
            f"recipient: {self.recipient.to_text()}",
        )

    def to_text(self) -> str:
        """The secret, one line: whoever reads it can open the files. Prefer `write_key`."""
        return encode_key(_IDENTITY_PREFIX, self.recipient.kind, self._seed)

    @classmethod
    def from_text(cls, text: str) -> "Identity":
        """The identity of a line made by `to_text`."""
        kind, seed = decode_key(_IDENTITY_PREFIX, text)
        return cls(_known_kind(kind), seed)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the slot with this identity's id."""
        mine = self.recipient
        found = [slot for slot in slots if (slot.kind, slot.key_id) == (mine.kind, mine.key_id)]
        if not found:
            raise WrongKey(f"not sealed for {mine!r}; open it with the identity of a recipient")
        info = slot_info(mine.kind, core_hash)
        for slot in found:
            with contextlib.suppress(InvalidTag, ValueError):
                return bytes(_SUITES[mine.kind].decrypt(slot.body, self._private, info=info))
        raise Tampered(
            f"the slot of {mine!r} does not open: the header was changed; get the file again"
        )

    def __repr__(self) -> str:
        return f"Identity({self.recipient!r})"


def generate_identity(*, post_quantum: bool = True) -> Identity:
    """A fresh key pair from the operating system's generator.

    Args:
        post_quantum: ML-KEM-768 with X25519 (the construction X-Wing), which a later quantum
            computer does not open; else X25519 alone, whose text is short.

    Example:
        >>> generate_identity(post_quantum=False).recipient.kind.name
        'X25519'
    """
    return Identity(SlotKind.HYBRID if post_quantum else SlotKind.X25519, os.urandom(32))


def read_identity(path: str | os.PathLike[str]) -> Identity:
    """The identity in a file made by `write_key`.

    Raises:
        KeyFileError: The file is missing, reachable by others than its owner, or holds no identity.

    Example:
        >>> read_identity("no-such-file")
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.KeyFileError: no-such-file: cannot read the key file: ...
    """
    return read_key(path, Identity.from_text)


_SUITES = {
    SlotKind.HYBRID: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    SlotKind.X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
_MLKEM_PUBLIC = 1184


def _known_kind(kind: int) -> SlotKind:
    """The kind in a key's text, if it is one of a key pair."""
    for known in _SUITES:
        if known == kind:
            return known
    raise InvalidKey(
        f"expected a hybrid or X25519 key, got kind {kind}; a newer version may know it"
    )


def _private_key(kind: SlotKind, seed: bytes) -> X25519PrivateKey | MLKEM768X25519PrivateKey:
    """The private key of a seed; the hybrid one is expanded as X-Wing does."""
    if kind == SlotKind.X25519:
        return X25519PrivateKey.from_private_bytes(seed)
    expanded = hashlib.shake_256(seed).digest(96)
    return MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def _public_bytes(kind: SlotKind, seed: bytes) -> bytes:
    """The raw public key of a seed: of the hybrid, both halves."""
    if kind == SlotKind.X25519:
        return X25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    expanded = hashlib.shake_256(seed).digest(96)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64]).public_key()
    x25519 = X25519PrivateKey.from_private_bytes(expanded[64:]).public_key()
    return mlkem.public_bytes_raw() + x25519.public_bytes_raw()


def _public_key(kind: SlotKind, raw: bytes) -> X25519PublicKey | MLKEM768X25519PublicKey:
    """The public key of raw bytes."""
    try:
        if kind == SlotKind.X25519:
            return X25519PublicKey.from_public_bytes(raw)
        return MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC]),
            X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC:]),
        )
    except ValueError as error:
        raise InvalidKey(
            f"a {kind.name.lower()} recipient of {len(raw)} bytes is no public key"
        ) from error
