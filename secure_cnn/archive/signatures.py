"""Who made a file: Ed25519 over its core and the Merkle root of its ciphertext.

To verify needs no decryption key. Signing the ciphertext's hash, not its authentication tags, means
that someone who can decrypt cannot put other weights under the signature. Leaves and nodes are
hashed apart, as in RFC 6962. Trust is the caller's list of verifiers; there are no certificates.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secure_cnn.archive.errors import InvalidKey, KeyFileError, Tampered
from secure_cnn.archive.keyfile import (
    decode_key,
    encode_key,
    fingerprint,
    read_secret,
    write_secret,
)

__all__ = [
    "SIGNATURE_LENGTH",
    "Signer",
    "Verifier",
    "generate_signer",
    "leaf_hash",
    "merkle_root",
    "read_signer",
    "write_signer",
]

SIGNATURE_LENGTH = 64

_VERIFIER_PREFIX = "secure-cnn-verifier-1"
_SIGNER_PREFIX = "secure-cnn-signer-secret-1"
_ED25519 = 1
_TYPE = b"application/vnd.secure-cnn.sealed.v0"


@final
@dataclass(frozen=True, slots=True)
class Verifier:
    """The public half of a signer: whoever has it can tell what the signer made.

    Attributes:
        public: The raw Ed25519 public key, 32 bytes.

    Example:
        >>> verifier = generate_signer().verifier
        >>> Verifier.from_text(verifier.to_text()) == verifier
        True
    """

    public: bytes

    def __post_init__(self) -> None:
        if len(self.public) != 32:
            raise InvalidKey(f"expected an Ed25519 public key of 32 bytes, got {len(self.public)}")

    def to_text(self) -> str:
        """One line, ``secure-cnn-verifier-1-…``, safe to publish.

        Example:
            >>> generate_signer().verifier.to_text()[:22]
            'secure-cnn-verifier-1-'
        """
        return encode_key(_VERIFIER_PREFIX, _ED25519, self.public)

    @classmethod
    def from_text(cls, text: str) -> "Verifier":
        """The verifier of a line made by `to_text`.

        Raises:
            InvalidKey: The line is no verifier, or was copied wrongly.

        Example:
            >>> Verifier.from_text("hello")
            Traceback (most recent call last):
            ...
            secure_cnn.archive.errors.InvalidKey: expected a key that starts with ...
        """
        return cls(_ed25519(decode_key(_VERIFIER_PREFIX, text)))

    def check(self, signature: bytes, core_hash: bytes, root: bytes) -> None:
        """Passes if the signer signed this core and this ciphertext.

        Args:
            signature: 64 bytes.
            core_hash: 32 bytes, SHA-256 of the core.
            root: 32 bytes, the Merkle root of the ciphertext.

        Raises:
            Tampered: The signature does not hold.

        Example:
            >>> signer = generate_signer()
            >>> signer.verifier.check(signer.sign(bytes(32), bytes(32)), bytes(32), bytes(32))
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(
                signature, _message(core_hash, root)
            )
        except (InvalidSignature, ValueError):
            raise Tampered(
                f"the signature of {self!r} does not hold: the file was changed; get it again"
            ) from None

    def __repr__(self) -> str:
        return f"Verifier(ed25519 {fingerprint(self.public).hex()})"


@final
class Signer:
    """The secret half of a signing key pair. The repr shows the public id only.

    Made by `generate_signer` or `read_signer`.

    Example:
        >>> signer = generate_signer()
        >>> signer.to_text() in repr(signer)
        False
    """

    __slots__ = ("_private", "verifier")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise InvalidKey(f"expected a seed of 32 bytes, got {len(seed)}")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.verifier = Verifier(self._private.public_key().public_bytes_raw())

    def to_text(self) -> str:
        """The secret, one line: whoever reads it can sign as you. Prefer `write_signer`.

        Example:
            >>> generate_signer().to_text()[:27]
            'secure-cnn-signer-secret-1-'
        """
        return encode_key(_SIGNER_PREFIX, _ED25519, self._private.private_bytes_raw())

    @classmethod
    def from_text(cls, text: str) -> "Signer":
        """The signer of a line made by `to_text`.

        Raises:
            InvalidKey: The line is no signer, or was copied wrongly.

        Example:
            >>> signer = generate_signer()
            >>> Signer.from_text(signer.to_text()).verifier == signer.verifier
            True
        """
        return cls(_ed25519(decode_key(_SIGNER_PREFIX, text)))

    def sign(self, core_hash: bytes, root: bytes) -> bytes:
        """The 64-byte signature over a core and a ciphertext.

        Example:
            See `Verifier.check`.
        """
        return self._private.sign(_message(core_hash, root))

    def __repr__(self) -> str:
        return f"Signer({self.verifier!r})"


def generate_signer() -> Signer:
    """A fresh Ed25519 signing key from the operating system's generator.

    Example:
        >>> generate_signer().verifier != generate_signer().verifier
        True
    """
    return Signer(os.urandom(32))


def write_signer(path: str | os.PathLike[str], signer: Signer) -> None:
    """Writes a secret key to a new file with mode 0600, with its verifier as a comment.

    Raises:
        KeyFileError: The file exists, or cannot be written.

    Example:
        >>> import tempfile
        >>> signer = generate_signer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_signer(f"{folder}/sign.key", signer)
        ...     read_signer(f"{folder}/sign.key").verifier == signer.verifier
        True
    """
    comments = (
        "secure-cnn signer: keep it secret",
        f"verifier: {signer.verifier.to_text()}",
    )
    write_secret(path, comments, signer.to_text())


def read_signer(path: str | os.PathLike[str]) -> Signer:
    """The signer in a file made by `write_signer`.

    Raises:
        KeyFileError: The file is missing, reachable by others than its owner, or holds no signer.

    Example:
        >>> read_signer("no-such-file")
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.KeyFileError: no-such-file: cannot read the key file: ...
    """
    try:
        return Signer.from_text(read_secret(path))
    except InvalidKey as error:
        raise KeyFileError(f"{path}: {error}") from None


def leaf_hash(data: bytes | memoryview) -> bytes:
    """SHA-256 over a zero byte and the data: a leaf of the Merkle tree.

    Example:
        >>> leaf_hash(b"") == hashlib.sha256(bytes(1)).digest()
        True
    """
    digest = hashlib.sha256(b"\0")
    digest.update(data)
    return digest.digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes: nodes are SHA-256(1, left, right), an odd last one moves up.

    Args:
        leaves: At least one 32-byte hash.

    Example:
        >>> left, right = leaf_hash(b"a"), leaf_hash(b"b")
        >>> merkle_root([left, right]) == hashlib.sha256(bytes([1]) + left + right).digest()
        True
    """
    level = list(leaves)
    while len(level) > 1:
        odd = level[len(level) & ~1 :]
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs] + odd
    return level[0]


def _message(core_hash: bytes, root: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of type and body."""
    body = core_hash + root
    return b"DSSEv1 %d %s %d %s" % (len(_TYPE), _TYPE, len(body), body)


def _ed25519(key: tuple[int, bytes]) -> bytes:
    """The raw key, if it is one of Ed25519."""
    kind, raw = key
    if kind != _ED25519:
        raise InvalidKey(f"expected an Ed25519 key, got kind {kind}; a newer version may know it")
    return raw
