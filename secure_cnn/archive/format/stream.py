"""FLOE: segments of AES-256-GCM that cannot be cut, swapped or mixed.

Source: C2SP `FLOE.md`; ePrint 2025/2275 (2025). Only the standard's arithmetic is here; `payload`
reads, writes and runs threads. The header tag commits to key and associated data, so a wrong key
shows before any byte is decrypted.
"""

import hmac
import os
import struct
from collections.abc import Sequence
from typing import TypeAlias, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from secure_cnn.archive.errors import LimitExceeded, Tampered, Truncated
from secure_cnn.archive.format.slots import Secret

__all__ = ["HEADER_LENGTH", "OVERHEAD", "Floe", "Layout", "create_stream", "open_stream"]

HEADER_LENGTH = 74
OVERHEAD = 32
_IV_LENGTH = 32
_TAG_LENGTH = 16
_NOT_LAST = 0xFFFFFFFF  # in place of the length, so that a stream that was cut has no last one
_ROTATION_MASK = ~((1 << 20) - 1)  # new keys keep random nonces far from meeting twice
_MAX_SEGMENT = 64 << 20
_SEGMENT_HEAD = struct.Struct(">I12s")
_PARAMETERS = struct.Struct(">HII")

_Bytes: TypeAlias = bytes | bytearray | memoryview


@final
class Floe(Secret):
    """One message: its parameters, header and keys. Safe to share between threads.

    `segment_length` is the length of a whole encrypted segment, and `piece` of the plaintext in it.
    """

    __slots__ = ("_aad", "_cipher", "_iv", "_message_key", "header", "piece", "segment_length")

    def __init__(self, key: bytes, aad: bytes, segment_length: int, iv: bytes) -> None:
        if not OVERHEAD < segment_length <= _MAX_SEGMENT:
            raise LimitExceeded(
                f"segment length: expected 33 to {_MAX_SEGMENT}, got {segment_length}"
            )
        self._aad, self._iv = aad, iv
        self._cipher: tuple[int, bytes, AESGCM] | None = None
        self.segment_length = segment_length
        self.piece = segment_length - OVERHEAD
        self.header = _PARAMETERS.pack(0, segment_length, _IV_LENGTH) + iv
        self._message_key = self._expand(key, b"MESSAGE_KEY:", 48)
        self.header += self._expand(key, b"HEADER_TAG:", 32)

    def _expand(self, key: bytes, purpose: bytes, length: int) -> bytes:
        """FLOE's key derivation: HKDF-Expand-SHA-384 over parameters, IV, purpose and aad."""
        info = self.header[: _PARAMETERS.size] + self._iv + purpose + self._aad
        return HKDFExpand(hashes.SHA384(), length, info).derive(key)

    def _keyed(self, position: int) -> tuple[int, bytes, AESGCM]:
        """Epoch, key and cipher of a segment; they change every 2^20 segments."""
        epoch, keyed = position & _ROTATION_MASK, self._cipher
        if keyed is None or keyed[0] != epoch:
            key = self._expand(self._message_key, b"DEK:" + struct.pack(">Q", epoch), 32)
            self._cipher = keyed = epoch, key, AESGCM(key)
        return keyed

    def encrypt_into(self, position: int, last: bool, plaintext: _Bytes, out: memoryview) -> int:
        """Encrypts one segment, numbered from 0, under a fresh nonce from the operating system.

        All but the last segment hold exactly `piece` bytes. `out` is at least 32 bytes longer than
        the plaintext; returns the length of the segment in it.
        """
        length = len(plaintext) + OVERHEAD
        if length > self.segment_length or (not last and length != self.segment_length):
            raise LimitExceeded(
                f"segment {position}: expected {self.piece} bytes, got {len(plaintext)}"
            )
        nonce = os.urandom(12)
        _SEGMENT_HEAD.pack_into(out, 0, length if last else _NOT_LAST, nonce)
        body = out[_SEGMENT_HEAD.size : length]
        _, _, cipher = self._keyed(position)
        cipher.encrypt_into(nonce, plaintext, _segment_aad(position, last), body)
        return length

    def decrypt_into(
        self, position: int, last: bool, segment: memoryview, outs: Sequence[memoryview]
    ) -> None:
        """Decrypts one segment into buffers that follow one another, in the order given.

        A segment that cannot be the right one leaves them as they are; after any failure beyond
        that, all of them are zero. Together they are exactly 32 bytes shorter than the segment.
        """
        length = len(segment)
        if not OVERHEAD <= length <= self.segment_length or length != OVERHEAD + sum(
            map(len, outs)
        ):
            raise Truncated(f"segment {position} has {length} bytes; get the file again")
        mark, nonce = _SEGMENT_HEAD.unpack_from(segment)
        whole = length == self.segment_length
        if mark != (length if last else _NOT_LAST) or not (whole or last):
            raise Truncated(
                f"segment {position} is not {'' if last else 'before '}the last; get the file again"
            )
        _, key, whole_cipher = self._keyed(position)
        aad, start = _segment_aad(position, last), _SEGMENT_HEAD.size
        used = [out for out in outs if len(out)]
        try:
            if len(used) == 1:
                whole_cipher.decrypt_into(nonce, segment[start:], aad, used[0])
                return
            mode = GCM(nonce, bytes(segment[-_TAG_LENGTH:]))
            cipher = Cipher(AES(key), mode).decryptor()
            cipher.authenticate_additional_data(aad)
            for out in used:
                start += cipher.update_into(segment[start : start + len(out)], out)
            cipher.finalize()
        except BaseException as error:
            # The library leaves unverified plaintext behind, and one of its panics is no Exception.
            for out in outs:
                out[:] = bytes(len(out))
            if isinstance(error, InvalidTag):
                raise Tampered(
                    f"segment {position} was changed or moved; get the file again"
                ) from None
            raise


def create_stream(key: bytes, aad: bytes, segment_length: int) -> Floe:
    """A new stream with a fresh IV, under a key of 32 bytes."""
    return Floe(key, aad, segment_length, os.urandom(_IV_LENGTH))


def open_stream(key: bytes, aad: bytes, header: bytes) -> Floe:
    """The stream that a header belongs to, after its tag was compared in constant time."""
    if len(header) != HEADER_LENGTH:
        raise Truncated(f"expected a stream header of {HEADER_LENGTH} bytes, got {len(header)}")
    suite, segment_length, iv_length = _PARAMETERS.unpack_from(header)
    if suite != 0 or iv_length != _IV_LENGTH:
        raise Tampered("the payload has unknown FLOE parameters; get the file again")
    iv = header[_PARAMETERS.size : _PARAMETERS.size + _IV_LENGTH]
    floe = Floe(key, aad, segment_length, iv)
    if not hmac.compare_digest(floe.header, header):
        raise Tampered("the payload does not belong to this header and key; get the file again")
    return floe


def _segment_aad(position: int, last: bool) -> bytes:
    return struct.pack(">QB", position, last)


@final
class Layout:
    """Where the segments of a payload lie in the file."""

    __slots__ = ("_piece", "offset", "plaintext_length", "segment_length", "segments")

    def __init__(self, *, offset: int, segment_length: int, plaintext_length: int) -> None:
        self.offset, self.segment_length = offset, segment_length
        self.plaintext_length = plaintext_length
        self._piece = segment_length - OVERHEAD
        self.segments = max(1, -(-plaintext_length // self._piece))

    @property
    def longest(self) -> int:
        """Bytes of the longest segment there is."""
        return min(self.segment_length, self.plaintext_length + OVERHEAD)

    @property
    def end(self) -> int:
        """The offset behind the last segment."""
        return self.offset + HEADER_LENGTH + self.plaintext_length + self.segments * OVERHEAD

    def plaintext(self, index: int) -> tuple[int, int]:
        """Start and length of a segment's plaintext."""
        start = index * self._piece
        return start, min(self._piece, self.plaintext_length - start)

    def ciphertext(self, index: int) -> tuple[int, int]:
        """Offset in the file and length of a segment."""
        start = self.offset + HEADER_LENGTH + index * self.segment_length
        return start, self.plaintext(index)[1] + OVERHEAD

    def covering(self, start: int, stop: int) -> range:
        """The segments that hold a range of the plaintext, at least one."""
        first = start // self._piece
        return range(first, max(first + 1, -(-stop // self._piece)))

    def is_last(self, index: int) -> bool:
        """Whether this is the last segment."""
        return index == self.segments - 1
