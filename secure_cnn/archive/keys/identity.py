"""Who can open a sealed file: key pairs, and how they wrap the file key into a slot.

A wrap is bound to the file: SHA-256 of the core goes into HPKE `info`, so a slot moved to another
file, or a changed core, does not open. Recipients give secrecy only: who *made* a file is the
business of `signatures`. To outsiders a public half is its 16-byte id in the slot, and no more.
"""

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

from secure_cnn.archive.errors import InvalidKey
from secure_cnn.archive.format.slots import Secret, Slot, SlotKind, register, slot_info, unwrap_own
from secure_cnn.archive.keys.keyfile import (
    check_seed,
    decode_key,
    encode_key,
    fingerprint,
    read_key,
)

__all__ = ["HYBRID", "X25519", "Identity", "Recipient", "generate_identity", "read_identity"]

# A file that a classical recipient opens too is no safer from a quantum computer than that one.
HYBRID = register(SlotKind(number=1, name="HYBRID", body_lengths=range(1168, 1169), label="hybrid"))
X25519 = register(
    SlotKind(
        number=2,
        name="X25519",
        body_lengths=range(80, 81),
        label="X25519",
        alone="the file would be no stronger than X25519; make a hybrid identity for everyone",
    )
)

_RECIPIENT_PREFIX = "secure-cnn-recipient-1"
_IDENTITY_PREFIX = "secure-cnn-identity-secret-1"
_SUITES = {
    HYBRID: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
_MLKEM_PUBLIC = 1184


@final
@dataclass(frozen=True, slots=True)
class Recipient:
    """The public half of an identity: whoever has it can seal for its owner, and read nothing.

    Attributes:
        kind: Named ``HYBRID`` (ML-KEM-768 with X25519, 1216 bytes) or ``X25519`` (32 bytes).
        public: The raw public key; for hybrid ML-KEM's, then X25519's.

    Example:
        >>> recipient = generate_identity().recipient
        >>> Recipient.from_text(recipient.to_text()) == recipient
        True
    """

    kind: SlotKind
    public: bytes

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        _public_key(self.kind, self.public)

    @property
    def key_id(self) -> bytes:
        """The 16-byte id that stands in this recipient's slots."""
        return fingerprint(self.public)

    def to_text(self) -> str:
        """One line, ``secure-cnn-recipient-1-…``, safe to publish."""
        return encode_key(_RECIPIENT_PREFIX, self.kind.number, self.public)

    @classmethod
    def from_text(cls, text: str) -> "Recipient":
        """The recipient of a line made by `to_text`."""
        number, public = decode_key(_RECIPIENT_PREFIX, text)
        return cls(_kind_of(number), public)

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that only the owner of the identity can open, by HPKE (RFC 9180) in base mode."""
        info = slot_info(self.kind, core_hash)
        try:
            body = _SUITES[self.kind].encrypt(
                file_key, _public_key(self.kind, self.public), info=info
            )
        except ValueError as error:  # a point that agrees on nothing
            raise InvalidKey(f"{self!r} is not a usable public key; ask its owner again") from error
        return Slot(kind=self.kind.number, key_id=self.key_id, body=body)

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
        self._seed = check_seed(seed)
        self._private, public = _key_pair(kind, seed)
        self.recipient = Recipient(kind, public)

    @property
    def comments(self) -> tuple[str, ...]:
        """What a key file says of it."""
        return (
            "secure-cnn identity: keep it secret, keep a copy elsewhere",
            f"recipient: {self.recipient.to_text()}",
        )

    def to_text(self) -> str:
        """The secret, one line: whoever reads it can open the files. Prefer `write_key`."""
        return encode_key(_IDENTITY_PREFIX, self.recipient.kind.number, self._seed)

    @classmethod
    def from_text(cls, text: str) -> "Identity":
        """The identity of a line made by `to_text`."""
        number, seed = decode_key(_IDENTITY_PREFIX, text)
        return cls(_kind_of(number), seed)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the slot with this identity's id."""
        kind = self.recipient.kind
        info = slot_info(kind, core_hash)

        def decrypt(body: bytes) -> bytes | None:
            try:
                return bytes(_SUITES[kind].decrypt(body, self._private, info=info))
            except (InvalidTag, ValueError):
                return None

        return unwrap_own(slots, self.recipient, decrypt, cure="the identity of a recipient")

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
    return Identity(HYBRID if post_quantum else X25519, os.urandom(32))


def read_identity(path: str | os.PathLike[str]) -> Identity:
    """The identity in a file made by `write_key`, which its owner alone may reach.

    Example:
        >>> read_identity("no-such-file")
        Traceback (most recent call last):
        secure_cnn.archive.errors.KeyFileError: no-such-file: cannot read the key file: ...
    """
    return read_key(path, Identity.from_text)


def _kind_of(number: int) -> SlotKind:
    return _check_kind(next((kind for kind in _SUITES if kind.number == number), number))


def _check_kind(kind: SlotKind | int) -> SlotKind:
    if isinstance(kind, SlotKind) and kind in _SUITES:
        return kind
    raise InvalidKey(
        f"expected a hybrid or X25519 key, got kind {getattr(kind, 'number', kind)}; "
        "a newer version may know it"
    )


def _key_pair(
    kind: SlotKind, seed: bytes
) -> tuple[X25519PrivateKey | MLKEM768X25519PrivateKey, bytes]:
    """The private key of a seed and the raw public one; the hybrid is expanded as X-Wing does."""
    if _check_kind(kind) == X25519:
        private = X25519PrivateKey.from_private_bytes(seed)
        return private, private.public_key().public_bytes_raw()
    expanded = hashlib.shake_256(seed).digest(96)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
    public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    return MLKEM768X25519PrivateKey(mlkem, x25519), public


def _public_key(kind: SlotKind, raw: bytes) -> X25519PublicKey | MLKEM768X25519PublicKey:
    try:
        if kind == X25519:
            return X25519PublicKey.from_public_bytes(raw)
        return MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC]),
            X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC:]),
        )
    except ValueError as error:
        raise InvalidKey(
            f"a {kind.name.lower()} recipient of {len(raw)} bytes is no public key"
        ) from error
