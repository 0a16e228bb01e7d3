"""The text form of a key and the file it lives in.

A key is one line: a prefix that names what it is, then base64url of (kind, key, checksum). Files
that hold a secret are made new, with mode 0600, and refused when others may read them.
"""

import base64
import binascii
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable
from typing import Protocol, TypeVar

from secure_cnn.archive.errors import InvalidKey, KeyFileError
from secure_cnn.files import reading, write_file

__all__ = [
    "SecretKey",
    "check_seed",
    "decode_key",
    "encode_key",
    "fingerprint",
    "read_key",
    "read_private",
    "write_key",
]

_Key = TypeVar("_Key")
_CHECKSUM = 4
# Of a key's text only what it is, in words of its own: what follows may be a secret.
_PREFIX = re.compile(r"secure-cnn-(recipient|verifier|(identity|signer|kek)-secret)-1")
_MAX_FILE = 64 * 1024


def _checksum(prefix: str, body: bytes) -> bytes:
    return hashlib.sha256(prefix.encode() + b"\0" + body).digest()[:_CHECKSUM]


def fingerprint(public: bytes) -> bytes:
    """The first 16 bytes of SHA-256 over a public key: its id in slots, messages and reprs."""
    return hashlib.sha256(public).digest()[:16]


def check_seed(seed: bytes) -> bytes:
    """The seed that a key pair is made of, if it has 32 bytes."""
    if len(seed) != 32:
        raise InvalidKey(f"expected a seed of 32 bytes, got {len(seed)}")
    return seed


def encode_key(prefix: str, kind: int, key: bytes) -> str:
    """The one-line text of a key: `prefix-` and base64url of kind (one byte), key and checksum."""
    body = bytes([kind]) + key
    text = base64.urlsafe_b64encode(body + _checksum(prefix, body)).decode().rstrip("=")
    return f"{prefix}-{text}"


def decode_key(prefix: str, text: str) -> tuple[int, bytes]:
    """The kind and the raw key of a text made by `encode_key`."""
    line = text.strip()
    if not line.startswith(f"{prefix}-"):
        known = _PREFIX.match(line)
        raise InvalidKey(
            f"expected a key that starts with {prefix}-, "
            f"got {f'a {known[0]}' if known else 'another text'}; "
            "the file of a secret key has its public half in a comment"
        )
    encoded = line[len(prefix) + 1 :]
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidKey(f"a key {prefix}-… is not base64url; copy its whole line again") from None
    body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    # Encoded again, since base64 has several texts for the same bytes.
    if (
        len(body) < 2
        or checksum != _checksum(prefix, body)
        or encode_key(prefix, body[0], body[1:]) != line
    ):
        raise InvalidKey(f"a key {prefix}-… has a wrong checksum; copy its whole line again")
    return body[0], body[1:]


class SecretKey(Protocol):
    """A key that is kept in a file of its own: identity, signer or key-encryption key."""

    @property
    def comments(self) -> tuple[str, ...]:
        """Public lines that explain the file, its public half among them."""

    def to_text(self) -> str:
        """The secret, one line."""


def write_key(path: str | os.PathLike[str], key: SecretKey) -> None:
    """Writes a secret key to a new file with mode 0600; never overwrites.

    The folder must exist. The public half of the key becomes a comment.

    Example:
        >>> import secure_cnn.archive as archive
        >>> archive.write_key("me.key", archive.generate_identity())
        >>> archive.read_identity("me.key")
        Identity(Recipient(hybrid ...))
    """
    text = "".join(f"# {comment}\n" for comment in key.comments) + key.to_text() + "\n"
    try:
        write_file(path, text.encode(), overwrite=False, mode=0o600)
    except FileExistsError:
        public, there = key.comments[-1].partition(":")[0], shlex.quote(os.fsdecode(path))
        raise KeyFileError(
            f"{path}: a file is already there; choose another path, keys are never overwritten; if "
            f"it is such a key, sed -n 's/^# {public}: //p' {there} prints its {public}"
        ) from None
    except OSError as error:
        raise KeyFileError(f"{path}: cannot make a key file: {error.strerror}") from error


def read_key(path: str | os.PathLike[str], parse: Callable[[str], _Key]) -> _Key:
    """The key on the one line of a key file; blank lines and lines of `#` are comments."""
    lines = [line.strip() for line in read_private(path).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1:
        raise KeyFileError(
            f"{path}: expected one key, got {len(keys)}; lines of comment start with #"
        )
    try:
        return parse(keys[0])
    except InvalidKey as error:
        raise KeyFileError(f"{path}: {error}") from None


def read_private(path: str | os.PathLike[str]) -> str:
    """The text of a small file, a key's or a passphrase's, that its owner alone may touch."""
    try:
        with reading(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise KeyFileError(
            f"{path}: cannot read the key file: {error.strerror}; give its own file"
        ) from error
    if _is_public(raw):  # first, since such a file may well be open to all
        raise KeyFileError(
            f"{path}: holds the public half of a key; give the file of the secret one"
        )
    if mode & 0o077:
        raise KeyFileError(
            f"{path}: others can reach this secret (mode {mode:04o}); run: chmod 600 {path}"
        )
    if len(raw) > _MAX_FILE:
        raise KeyFileError(
            f"{path}: expected a key file of a few lines, got more than {_MAX_FILE} bytes"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: expected text in UTF-8, got other bytes") from None


def _is_public(raw: bytes) -> bool:
    """Whether the first line that is no comment is what keys are published as."""
    lines = [line.strip() for line in raw.splitlines()]
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    return first.startswith((b"secure-cnn-recipient-1-", b"secure-cnn-verifier-1-"))
