"""Handing a file to people who use age: its plaintext in the format age v1, for X25519 recipients.

Source: C2SP `age.md` (Valsorda, 2019). Only writing is here. Signature, claims in clear, lineage
and random access, which age does not have, stay behind.
"""

import base64
import hmac
import os
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from secure_cnn.archive.errors import InvalidKey
from secure_cnn.archive.format.payload import Payload, Progress
from secure_cnn.archive.format.slots import AnyIdentity, hkdf
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.opening import unlock
from secure_cnn.archive.storage import Path, new_file, opened
from secure_cnn.files import write_at

__all__ = ["export_age"]

_CHUNK = 64 << 10
_BLOCK = 64
_TAG = 16
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def export_age(
    path: Path,
    out: Path,
    *,
    identity: AnyIdentity,
    recipients: Sequence[str],
    trusted: Sequence[Verifier] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the safetensors file inside a sealed file as an age file, whole or not at all.

    Recipients are one or more of age's X25519 recipients, ``age1…``. No plaintext is written, and
    little of it is in memory at a time. Identity, trusted and what is raised are as for `load`;
    `InvalidKey` where a text is no recipient, and `StorageError` if there is a file at `out`.

    Example:
        >>> import pathlib, secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> archive.save("m", {}, recipients=[me.recipient])
        >>> theirs = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
        >>> archive.export_age("m", "m.age", identity=me, recipients=[theirs])
        >>> pathlib.Path("m.age").read_bytes()[:21]
        b'age-encryption.org/v1'
    """
    if isinstance(recipients, str):
        raise InvalidKey("recipients: expected a list of age1…, got text; put it in a list")
    keys = [_public_key(text) for text in recipients]
    if not keys:
        raise InvalidKey("expected at least one recipient age1…, got none")
    file_key, nonce = os.urandom(16), os.urandom(16)
    head = _header(file_key, keys) + nonce
    key = hkdf(file_key, b"payload", salt=nonce)
    with opened(path) as fd:
        _, payload = unlock(fd, identity=identity, trusted=trusted, expect={}, core_hash=None)
        length = payload.layout.plaintext_length
        total = len(head) + length + _TAG * max(1, -(-length // _CHUNK))
        with new_file(out, length=total, overwrite=overwrite, mode=0o666) as sealed:
            write_at(sealed, memoryview(head), 0)
            at = len(head)
            for number, chunk in enumerate(_chunks(payload, ChaCha20Poly1305(key)), start=1):
                write_at(sealed, memoryview(chunk), at)
                at += len(chunk)
                if progress is not None and (number % _BLOCK == 0 or at == total):
                    progress(min(number * _CHUNK, length), length)


def _header(file_key: bytes, keys: Sequence[bytes]) -> bytes:
    """Version line, a stanza for each recipient, and the MAC over them."""
    lines = b"age-encryption.org/v1\n"
    for public in keys:
        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        try:
            shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise InvalidKey("a recipient age1… is no usable public key; ask again") from error
        wrapping = hkdf(shared, b"age-encryption.org/v1/X25519", salt=share + public)
        body = ChaCha20Poly1305(wrapping).encrypt(bytes(12), file_key, None)
        lines += b"-> X25519 " + _base64(share) + b"\n" + _base64(body) + b"\n"
    lines += b"---"
    mac = hmac.digest(hkdf(file_key, b"header"), lines, "sha256")
    return lines + b" " + _base64(mac) + b"\n"


def _chunks(payload: Payload, cipher: ChaCha20Poly1305) -> Iterator[bytes]:
    """The plaintext in age's STREAM: 64 KiB each, counted, the last one marked."""
    length = payload.layout.plaintext_length
    count = max(1, -(-length // _CHUNK))
    block, first = bytearray(), 0
    for index in range(count):
        start = index * _CHUNK
        stop = min(start + _CHUNK, length)
        if stop > first + len(block) or index == 0:
            # Whole segments at a time: reading by chunk would decrypt each one many times.
            first = start
            block = bytearray(min(length - start, _BLOCK * _CHUNK))
            payload.read_into(memoryview(block), start)
        nonce = index.to_bytes(11, "big") + bytes([index == count - 1])
        yield cipher.encrypt(nonce, bytes(block[start - first : stop - first]), None)


def _base64(raw: bytes) -> bytes:
    return base64.b64encode(raw).rstrip(b"=")


def _public_key(text: str) -> bytes:
    """The 32 bytes of ``age1…``, after its checksum held (Bech32, BIP 173)."""
    given = text.strip()
    if given not in (given.lower(), given.upper()):
        raise InvalidKey(
            "expected a recipient of age in lower case or in upper case, got both mixed: its text "
            "was changed; copy its whole line again"
        )
    prefix, _, coded = given.lower().rpartition("1")
    words = [_BECH32.find(letter) for letter in coded]
    expanded = [*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix)]
    if prefix != "age" or -1 in words or len(words) != 58 or _checksum(expanded + words) != 1:
        raise InvalidKey("expected a recipient of age for X25519, age1…; copy its whole line again")
    number = 0
    for word in words[:-6]:
        number = number << 5 | word
    return (number >> 4).to_bytes(32, "big")  # 52 words of 5 bits hold 4 more than 32 bytes


def _checksum(words: Sequence[int]) -> int:
    check = 1
    for word in words:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ word
        for bit, value in enumerate(_GENERATOR):
            check ^= value if top >> bit & 1 else 0
    return check
