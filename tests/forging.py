"""Sealed files taken apart and put together by docs/format.md alone, with nothing of ours.

An oracle for the reader, and the tool of every forger in the tests: outsiders, recipients who have
the file key, and makers who can sign.
"""

import hashlib
import hmac
import json
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

MAGIC = b"\x93SCNN\r\n\x00"
SECTOR = 512
X25519 = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def pad(raw: bytes, length: int | None = None) -> bytes:
    """With zeros up to a length, or to the next sector."""
    return raw.ljust(-(-len(raw) // SECTOR) * SECTOR if length is None else length, b"\0")


def purpose_key(file_key: bytes, purpose: bytes) -> bytes:
    """The key schedule."""
    info = b"secure-cnn/sealed/v1/" + purpose
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(file_key)


def leaf(data: bytes) -> bytes:
    """A leaf of the hash tree."""
    return hashlib.sha256(b"\0" + data).digest()


def root_of(leaves: list[bytes]) -> bytes:
    """The root by the recursion of RFC 6962: the left tree is the largest full one."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    pair = root_of(leaves[:left]) + root_of(leaves[left:])
    return hashlib.sha256(b"\1" + pair).digest()


@dataclass
class Parts:
    """The parts of a file, each to be changed at will."""

    core: bytes
    copy_length: int
    mark: bytes
    copies: list[bytes]
    stream: bytes
    segments: list[bytes]
    footer: bytes
    version: int = 1
    flags: int = 0
    tail: bytes = field(default=b"")

    @classmethod
    def of(cls, raw: bytes) -> "Parts":
        """A file taken apart."""
        magic, version, flags, core_length, copy_length = struct.unpack_from(">8sHHII", raw)
        assert magic == MAGIC
        mark_at = len(pad(raw[: 20 + core_length]))
        core = raw[20 : 20 + core_length]
        first = mark_at + SECTOR
        at = first + 2 * copy_length
        told = json.loads(core)
        stream, at = raw[at : at + 74], at + 74
        segments, left = [], told["plaintext_length"]
        while left or not segments:
            size = min(told["segment_length"] - 32, left)
            segments.append(raw[at : at + size + 32])
            at, left = at + size + 32, left - size
        return cls(
            core=core,
            copy_length=copy_length,
            mark=raw[mark_at : mark_at + 32],
            copies=[raw[first : first + copy_length], raw[first + copy_length :][:copy_length]],
            stream=stream,
            segments=segments,
            footer=raw[at:],
            version=version,
            flags=flags,
        )

    def raw(self) -> bytes:
        """The file put together."""
        head = pad(self.prefix) + pad(self.mark, SECTOR) + b"".join(self.copies)
        return head + self.stream + b"".join(self.segments) + self.footer + self.tail

    @property
    def prefix(self) -> bytes:
        """What never changes."""
        lengths = (self.version, self.flags, len(self.core), self.copy_length)
        return struct.pack(">8sHHII", MAGIC, *lengths) + self.core

    @property
    def core_hash(self) -> bytes:
        """What binds all."""
        return hashlib.sha256(self.prefix).digest()

    @property
    def told(self) -> dict:
        """The core as JSON."""
        return json.loads(self.core)

    def tell(self, **changes) -> None:
        """Changes fields of the core."""
        changed = {**self.told, **changes}
        self.core = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()

    @property
    def slots(self) -> list[tuple[int, bytes, bytes]]:
        """Kind, key id and body of each slot of copy A."""
        (length,) = struct.unpack_from(">I", self.copies[0])
        found, at = [], 4
        while at < 4 + length:
            kind, size, key_id = struct.unpack_from(">HH16s", self.copies[0], at)
            found.append((kind, key_id, self.copies[0][at + 20 : at + 20 + size]))
            at += 20 + size
        return found

    def file_key(self, private) -> bytes:
        """The file key of the first X25519 slot for a private key."""
        key_id = hashlib.sha256(private.public_key().public_bytes_raw()).digest()[:16]
        body = next(body for kind, one, body in self.slots if (kind, one) == (2, key_id))
        return X25519.decrypt(body, private, info=self.slot_info(2))

    def slot_info(self, kind: int) -> bytes:
        """What a wrap binds."""
        return b"secure-cnn/sealed/v1/slot|" + struct.pack(">H", kind) + self.core_hash

    def x25519_slot(self, file_key: bytes, private) -> tuple[int, bytes, bytes]:
        """A slot for a private key, bound to the core as it is now."""
        public = private.public_key()
        key_id = hashlib.sha256(public.public_bytes_raw()).digest()[:16]
        return 2, key_id, X25519.encrypt(file_key, public, info=self.slot_info(2))

    def copy(self, slots: list[tuple[int, bytes, bytes]], file_key: bytes) -> bytes:
        """A copy with these slots and a MAC that fits."""
        packed = b"".join(
            struct.pack(">HH16s", kind, len(body), key_id) + body for kind, key_id, body in slots
        )
        maced = struct.pack(">I", len(packed)) + packed
        mac = hmac.digest(purpose_key(file_key, b"header"), self.prefix + maced, "sha256")
        return pad(maced + mac, self.copy_length)

    def expand(self, key: bytes, purpose: bytes, size: int) -> bytes:
        """FLOE's key derivation."""
        info = self.stream[:42] + purpose + self.core_hash
        return HKDFExpand(hashes.SHA384(), size, info).derive(key)

    def segment_cipher(self, file_key: bytes) -> AESGCM:
        """The cipher of the first 2^20 segments."""
        message_key = self.expand(purpose_key(file_key, b"payload"), b"MESSAGE_KEY:", 48)
        return AESGCM(self.expand(message_key, b"DEK:" + bytes(8), 32))

    def plaintext(self, file_key: bytes) -> bytes:
        """The safetensors file, after header tag and every segment's tag held."""
        tag = self.expand(purpose_key(file_key, b"payload"), b"HEADER_TAG:", 32)
        assert tag == self.stream[42:]
        cipher, plain = self.segment_cipher(file_key), b""
        for position, segment in enumerate(self.segments):
            last = position == len(self.segments) - 1
            assert segment[:4] == (struct.pack(">I", len(segment)) if last else b"\xff" * 4)
            aad = struct.pack(">QB", position, last)
            plain += cipher.decrypt(segment[4:16], segment[16:], aad)
        return plain

    def encrypt(self, file_key: bytes, plaintext: bytes, *, iv: bytes) -> None:
        """Puts another plaintext in, under the core as it is now."""
        told = self.told
        self.stream = struct.pack(">HII", 0, told["segment_length"], 32) + iv
        self.stream += self.expand(purpose_key(file_key, b"payload"), b"HEADER_TAG:", 32)
        cipher, piece = self.segment_cipher(file_key), told["segment_length"] - 32
        starts = range(0, max(1, len(plaintext)), piece)
        self.segments = []
        for position, start in enumerate(starts):
            part, last = plaintext[start : start + piece], position == len(starts) - 1
            nonce = hashlib.sha256(iv + bytes([position])).digest()[:12]
            body = cipher.encrypt(nonce, part, struct.pack(">QB", position, last))
            head = struct.pack(">I", len(part) + 32) if last else b"\xff" * 4
            self.segments.append(head + nonce + body)

    @property
    def leaves(self) -> list[bytes]:
        """The leaves of the payload as it is now."""
        return [leaf(self.stream), *map(leaf, self.segments)]

    @property
    def signed(self) -> bytes:
        """What a signer signs of the file as it is now."""
        kind = b"application/vnd.secure-cnn.sealed.v1"
        return b"DSSEv1 36 " + kind + b" 64 " + self.core_hash + root_of(self.leaves)

    def fit_footer(self) -> None:
        """New leaves and root, and the old key and signature; nothing if the file is unsigned."""
        signer = self.told["signer"]
        if signer is None:
            self.footer = b""
        elif self.footer:
            # Key and signature take 96 bytes, or with ML-DSA-65 5357.
            kept = 96 if signer.startswith("ed25519:") else 1984 + 3373
            self.footer = b"".join(self.leaves) + root_of(self.leaves) + self.footer[-kept:]


def forge(raw: bytes, private, *, plaintext: bytes | None = None, **told) -> Parts:
    """Rewrites a file as a recipient can, who has the file key but not the signing key."""
    parts = Parts.of(raw)
    file_key = parts.file_key(private)
    plain = parts.plaintext(file_key) if plaintext is None else plaintext
    parts.tell(**{"plaintext_length": len(plain), **told})
    parts.copies = [parts.copy([parts.x25519_slot(file_key, private)], file_key)] * 2
    parts.encrypt(file_key, plain, iv=bytes(range(32)))
    parts.fit_footer()
    return parts
