"""The head of a sealed file as a value: core, mark and the two copies of slots and MAC.

Slots may be exchanged later without touching the rest, and a change that was cut off can be told
from damage; who writes in which order is in `recipients`. `docs/format.md` has the byte tables.
"""

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.errors import (
    ArchiveError,
    KeyServiceError,
    LimitExceeded,
    NotSealed,
    Tampered,
    Truncated,
    UnsupportedVersion,
    WrongKey,
)
from secure_cnn.archive.format.core import Core
from secure_cnn.archive.format.slots import (
    AnyIdentity,
    Slot,
    SlotKind,
    check_beside,
    hkdf,
    pack_slots,
    parse_slots,
    slots_length,
)

__all__ = [
    "FIXED_LENGTH",
    "MAGIC",
    "MAX_HEADER",
    "SECTOR",
    "VERSION",
    "Copy",
    "Header",
    "copy_length_for",
    "derive_key",
    "head_length",
    "parse_header",
    "read_lengths",
    "seal_copy",
    "seal_header",
    "seal_prefix",
]

# As in PNG: no text starts so, and a transfer as text, which changes line ends, shows.
MAGIC = b"\x93SCNN\r\n\x00"
VERSION = 1
FIXED_LENGTH = 20
MAX_HEADER = 1 << 20
SECTOR = 512  # a disk writes one whole or not at all, and so the mark
_MAC_LENGTH = 32
_MARK_LENGTH = 32
_FIXED = struct.Struct(">8sHHII")  # magic, version, critical flags, core and copy length
_COPY_OVERHEAD = 4 + _MAC_LENGTH


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One of the two copies of what may change, not authenticated: `mac` is that of `maced`."""

    slots: tuple[Slot, ...]
    maced: bytes
    mac: bytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The head of a file as it was read, not authenticated until `unlock` passes.

    `prefix` are the raw bytes that never change, fixed header and core. `mark` is zeros, or the
    mark of a change under way; then `copies` are the candidates, to be tried in order.
    """

    core: Core
    prefix: bytes
    mark: bytes
    copies: tuple[Copy, ...]
    copy_length: int

    @property
    def core_hash(self) -> bytes:
        """SHA-256 over fixed header and raw core: what everything else binds."""
        return hashlib.sha256(self.prefix).digest()

    @property
    def mark_offset(self) -> int:
        """Where the mark stands; copy A is one sector behind it, copy B behind that."""
        return _round_up(len(self.prefix))

    @property
    def payload_offset(self) -> int:
        """Where the payload starts."""
        return head_length(len(self.prefix) - FIXED_LENGTH, self.copy_length)

    def unlock(self, identity: AnyIdentity) -> tuple[bytes, tuple[Slot, ...]]:
        """The file key, and the slots of the copy that it authenticates."""
        refused: list[ArchiveError] = []
        for copy in self.copies:
            try:
                file_key = identity.unwrap(copy.slots, self.core_hash)
                self._check(copy, file_key)
                return file_key, copy.slots
            except (WrongKey, Tampered, LimitExceeded, KeyServiceError) as error:
                refused.append(error)
        # While a change is under way one copy may be noise, which says nothing of who can open it.
        raise next((error for error in refused if isinstance(error, WrongKey)), refused[0])

    def _check(self, copy: Copy, file_key: bytes) -> None:
        """Passes if a holder of the file key wrote this copy, and the mark if there is one."""
        marked = any(self.mark)
        if not hmac.compare_digest(copy.mac, _mac(file_key, self.prefix + copy.maced)) or (
            marked and not hmac.compare_digest(self.mark, derive_key(file_key, b"mark"))
        ):
            raise Tampered("the header was changed after it was sealed; get the file again")


def derive_key(file_key: bytes, purpose: bytes) -> bytes:
    """The 32-byte key of one purpose: ``b"header"``, ``b"mark"`` or ``b"payload"``."""
    return hkdf(file_key, b"secure-cnn/sealed/v1/" + purpose)


def copy_length_for(kinds: Sequence[SlotKind]) -> int:
    """Bytes of a copy for slots of these kinds, with room for one more of the longest."""
    check_beside(kind.number for kind in kinds)
    longest = max(kinds, key=lambda kind: kind.body_lengths[-1])
    return _round_up(_COPY_OVERHEAD + slots_length([*kinds, longest]))


def seal_prefix(core: Core, copy_length: int) -> bytes:
    """The bytes that never change: fixed header and core. Their SHA-256 is the core hash."""
    raw = core.to_bytes()
    _check_lengths(len(raw), copy_length)
    return _FIXED.pack(MAGIC, VERSION, 0, len(raw), copy_length) + raw


def seal_copy(prefix: bytes, slots: Sequence[Slot], file_key: bytes, copy_length: int) -> bytes:
    """The bytes of one copy, padded with zeros to its length."""
    packed = pack_slots(slots)
    if len(packed) + _COPY_OVERHEAD > copy_length:
        raise LimitExceeded(
            f"expected slots of at most {copy_length - _COPY_OVERHEAD} bytes, got {len(packed)}: "
            "this file has no room for them; rotate it to its new recipients"
        )
    maced = struct.pack(">I", len(packed)) + packed
    return (maced + _mac(file_key, prefix + maced)).ljust(copy_length, b"\0")


def seal_header(core: Core, slots: Sequence[Slot], file_key: bytes, copy_length: int) -> bytes:
    """The bytes of the whole head, up to the payload."""
    prefix = seal_prefix(core, copy_length)
    copy = seal_copy(prefix, slots, file_key, copy_length)
    return prefix.ljust(_round_up(len(prefix)), b"\0") + bytes(SECTOR) + copy + copy


def head_length(core_length: int, copy_length: int) -> int:
    """Bytes of everything before the payload."""
    return _round_up(FIXED_LENGTH + core_length) + SECTOR + 2 * copy_length


def read_lengths(fixed: bytes) -> tuple[int, int]:
    """The lengths of core and copies in the first 20 bytes of a file."""
    if fixed[: len(MAGIC)] != MAGIC[: len(fixed)] or not fixed:
        raise NotSealed(
            "expected a sealed file, got another kind; plain files are refused, seal it first"
        )
    if len(fixed) < FIXED_LENGTH:
        raise Truncated("the file ends within its first 20 bytes; get it again")
    _, version, flags, core_length, copy_length = _FIXED.unpack(fixed)
    if version != VERSION:
        raise UnsupportedVersion(
            f"expected format version {VERSION}, got {version}; use the secure-cnn that wrote it"
        )
    if flags:
        raise UnsupportedVersion(f"critical flags {flags:#06x} are unknown; use a newer secure-cnn")
    _check_lengths(core_length, copy_length)
    return core_length, copy_length


def parse_header(raw: bytes) -> Header:
    """The head in the first bytes of a file, at least up to the payload; not authenticated yet."""
    core_length, copy_length = read_lengths(raw[:FIXED_LENGTH])
    core_end = FIXED_LENGTH + core_length
    mark_at = _round_up(core_end)
    first = mark_at + SECTOR
    if len(raw) < first + 2 * copy_length:
        raise Truncated("the file ends before its payload; get it again")
    core = Core.from_bytes(raw[FIXED_LENGTH:core_end])
    mark_end = mark_at + _MARK_LENGTH
    if any(raw[core_end:mark_at]) or any(raw[mark_end:first]):
        raise Tampered("expected zeros between the parts of the head; get the file again")
    mark = raw[mark_at:mark_end]
    second = first + copy_length
    copies = (raw[first:second], raw[second : second + copy_length])
    return Header(
        core=core,
        prefix=raw[:core_end],
        mark=mark,
        copies=_candidates(copies) if any(mark) else (_only(copies),),
        copy_length=copy_length,
    )


def _only(copies: tuple[bytes, bytes]) -> Copy:
    """The copy of a file at rest."""
    if copies[0] != copies[1]:
        raise Tampered("the two copies of the slots differ; get the file again")
    return _parse_copy(copies[0])


def _candidates(copies: tuple[bytes, bytes]) -> tuple[Copy, ...]:
    """The copies that can be read while a change is under way."""
    found, refused = [], None
    for raw in copies:
        try:
            found.append(_parse_copy(raw))
        except (Tampered, LimitExceeded) as error:
            refused = refused or error
    if refused is not None and not found:
        raise refused
    return tuple(found)


def _parse_copy(raw: bytes) -> Copy:
    """One copy in its bytes, which are not trusted yet."""
    end = 4 + int.from_bytes(raw[:4], "big")
    if end + _MAC_LENGTH > len(raw):
        raise Tampered("the slots run into the payload; get the file again")
    if any(raw[end + _MAC_LENGTH :]):
        raise Tampered("expected zeros behind the slots; get the file again")
    return Copy(slots=parse_slots(raw[4:end]), maced=raw[:end], mac=raw[end : end + _MAC_LENGTH])


def _check_lengths(core_length: int, copy_length: int) -> None:
    total = head_length(core_length, copy_length)
    if total > MAX_HEADER:
        raise LimitExceeded(
            f"expected a head of at most {MAX_HEADER} bytes, got {total}: use fewer claims"
        )
    if copy_length % SECTOR or not copy_length:
        raise Tampered(
            f"expected copies of a multiple of {SECTOR} bytes, got {copy_length}; "
            "get the file again"
        )


def _round_up(length: int) -> int:
    return -(-length // SECTOR) * SECTOR


def _mac(file_key: bytes, data: bytes) -> bytes:
    return hmac.digest(derive_key(file_key, b"header"), data, "sha256")
