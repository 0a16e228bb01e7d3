"""Who made a file: Ed25519, or Ed25519 and ML-DSA-65 together, over its core and its ciphertext.

To verify needs no decryption key. Signing the ciphertext's hash, not its authentication tags, means
that someone who can decrypt cannot put other weights under the signature. There are no
certificates.
"""

import hashlib
import os
from dataclasses import dataclass
from typing import final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from secure_cnn.archive.errors import InvalidKey, Tampered
from secure_cnn.archive.format.slots import Secret
from secure_cnn.archive.keys.keyfile import (
    check_seed,
    decode_key,
    encode_key,
    fingerprint,
    read_key,
)

__all__ = ["Signer", "Verifier", "footer_lengths", "generate_signer", "read_signer"]

_VERIFIER_PREFIX = "secure-cnn-verifier-1"
_SIGNER_PREFIX = "secure-cnn-signer-secret-1"
_SEALED = "application/vnd.secure-cnn.sealed.v1"
_ED25519, _HYBRID = 1, 2
_ED25519_PUBLIC, _HYBRID_PUBLIC = 32, 32 + 1952
_ED25519_SIGNATURE, _HYBRID_SIGNATURE = 64, 64 + 3309
# Bytes of public key and signature.
_ALGORITHMS = {
    "ed25519": (_ED25519_PUBLIC, _ED25519_SIGNATURE),
    "ed25519+ml-dsa-65": (_HYBRID_PUBLIC, _HYBRID_SIGNATURE),
}


@final
@dataclass(frozen=True, slots=True)
class Verifier:
    """The public half of a signer: whoever has it can tell what the signer made.

    Attributes:
        public: The raw Ed25519 public key, 32 bytes; with that of ML-DSA-65 behind it, 1984.

    Example:
        >>> verifier = generate_signer().verifier
        >>> Verifier.from_text(verifier.to_text()) == verifier
        True
    """

    public: bytes

    def __post_init__(self) -> None:
        if len(self.public) not in (_ED25519_PUBLIC, _HYBRID_PUBLIC):
            raise InvalidKey(
                f"expected a verifier's public key of 32 or 1984 bytes, got {len(self.public)}"
            )

    @property
    def algorithm(self) -> str:
        """``ed25519``, or ``ed25519+ml-dsa-65``, of which both must hold."""
        return "ed25519" if self._kind == _ED25519 else "ed25519+ml-dsa-65"

    @property
    def signer_id(self) -> str:
        """What stands in the core of a signed file: the algorithm and SHA-256 of the key."""
        return f"{self.algorithm}:{hashlib.sha256(self.public).hexdigest()}"

    @property
    def _kind(self) -> int:
        return _ED25519 if len(self.public) == _ED25519_PUBLIC else _HYBRID

    def to_text(self) -> str:
        """One line, ``secure-cnn-verifier-1-…``, safe to publish."""
        return encode_key(_VERIFIER_PREFIX, self._kind, self.public)

    @classmethod
    def from_text(cls, text: str) -> "Verifier":
        """The verifier of a line made by `to_text`."""
        kind, public = decode_key(_VERIFIER_PREFIX, text)
        verifier = cls(public)
        if _check_kind(kind) != verifier._kind:
            raise InvalidKey(f"a verifier of kind {kind} has {len(public)} bytes; copy it again")
        return verifier

    def check(self, signature: bytes, core_hash: bytes, root: bytes) -> None:
        """Passes if the signer signed this core and the Merkle root of this ciphertext."""
        self.check_statement(signature, _SEALED, core_hash + root)

    def check_statement(self, signature: bytes, payload_type: str, body: bytes) -> None:
        """Passes if the signer signed this body as a statement of this media type.

        A signature for one type holds for no other.
        """
        message = _encoding(payload_type, body)
        try:
            if len(signature) != _ALGORITHMS[self.algorithm][1]:
                raise InvalidSignature
            Ed25519PublicKey.from_public_bytes(self.public[:_ED25519_PUBLIC]).verify(
                signature[:_ED25519_SIGNATURE], message
            )
            if self._kind == _HYBRID:
                MLDSA65PublicKey.from_public_bytes(self.public[_ED25519_PUBLIC:]).verify(
                    signature[_ED25519_SIGNATURE:], message
                )
        except (InvalidSignature, ValueError):
            raise Tampered(
                f"the signature of {self!r} does not hold: the file was changed; get it again"
            ) from None

    def __repr__(self) -> str:
        return f"Verifier({self.algorithm} {fingerprint(self.public).hex()})"


@final
class Signer(Secret):
    """The secret half of a signing key pair. The repr shows the public id only.

    Made by `generate_signer` or `read_signer`.

    Example:
        >>> signer = generate_signer()
        >>> signer.to_text() in repr(signer)
        False
    """

    __slots__ = ("_ed25519", "_kind", "_mldsa", "_seed", "verifier")

    def __init__(self, seed: bytes, *, post_quantum: bool = False) -> None:
        self._seed, self._kind = check_seed(seed), _HYBRID if post_quantum else _ED25519
        halves = hashlib.shake_256(seed).digest(64) if post_quantum else seed
        self._ed25519 = Ed25519PrivateKey.from_private_bytes(halves[:32])
        self._mldsa = MLDSA65PrivateKey.from_seed_bytes(halves[32:]) if post_quantum else None
        public = self._ed25519.public_key().public_bytes_raw()
        if self._mldsa is not None:
            public += self._mldsa.public_key().public_bytes_raw()
        self.verifier = Verifier(public)

    @property
    def comments(self) -> tuple[str, ...]:
        """What a key file says of it."""
        return ("secure-cnn signer: keep it secret", f"verifier: {self.verifier.to_text()}")

    def to_text(self) -> str:
        """The secret, one line: whoever reads it can sign as you. Prefer `write_key`."""
        return encode_key(_SIGNER_PREFIX, self._kind, self._seed)

    @classmethod
    def from_text(cls, text: str) -> "Signer":
        """The signer of a line made by `to_text`."""
        kind, seed = decode_key(_SIGNER_PREFIX, text)
        return cls(seed, post_quantum=_check_kind(kind) == _HYBRID)

    def sign(self, core_hash: bytes, root: bytes) -> bytes:
        """The signature over a core and a ciphertext: 64 bytes, 3373 with ML-DSA-65."""
        return self.sign_statement(_SEALED, core_hash + root)

    def sign_statement(self, payload_type: str, body: bytes) -> bytes:
        """The signature over a body that is a statement of this type."""
        message = _encoding(payload_type, body)
        signature = self._ed25519.sign(message)
        return signature if self._mldsa is None else signature + self._mldsa.sign(message)

    def __repr__(self) -> str:
        return f"Signer({self.verifier!r})"


def generate_signer(*, post_quantum: bool = False) -> Signer:
    """A fresh signing key from the operating system's generator.

    Args:
        post_quantum: Ed25519 with ML-DSA-65, so that both must hold, for signatures that have to
            count when there are quantum computers; 5 KB more a file. Else Ed25519 alone.

    Example:
        >>> generate_signer(post_quantum=True).verifier.algorithm
        'ed25519+ml-dsa-65'
    """
    return Signer(os.urandom(32), post_quantum=post_quantum)


def read_signer(path: str | os.PathLike[str]) -> Signer:
    """The signer in a file made by `write_key`, which its owner alone may reach.

    Example:
        >>> read_signer("no-such-file")
        Traceback (most recent call last):
        secure_cnn.archive.errors.KeyFileError: no-such-file: cannot read the key file: ...
    """
    return read_key(path, Signer.from_text)


def footer_lengths(signer_id: str) -> tuple[int, int]:
    """Bytes of public key and signature in a file whose core names this signer."""
    return _ALGORITHMS[signer_id.partition(":")[0]]


def _encoding(payload_type: str, body: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of type and body."""
    # With lengths, so that no two pairs of type and body give the same bytes.
    name = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(body), body)


def _check_kind(kind: int) -> int:
    if kind not in (_ED25519, _HYBRID):
        raise InvalidKey(f"expected an Ed25519 key, got kind {kind}; a newer version may know it")
    return kind
