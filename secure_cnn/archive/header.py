"""The head of a sealed file as a value: core, slots and MAC; pure bytes <-> values.

The core is authenticated as the raw bytes that were read: nothing is re-serialised before it is
checked. Slots may be exchanged later without touching the rest. `docs/format.md` has the byte
tables. No keys and no files here.
"""

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_cnn.archive.claims import JSON, canonical_json, parse_json
from secure_cnn.archive.errors import (
    LimitExceeded,
    NotSealed,
    Tampered,
    Truncated,
    UnsupportedVersion,
)
from secure_cnn.archive.slots import (
    MAX_SLOTS,
    Slot,
    SlotKind,
    pack_slots,
    parse_slots,
    slots_length,
)

__all__ = [
    "FIXED_LENGTH",
    "MAGIC",
    "MAX_HEADER",
    "PAGE",
    "VERSION",
    "Core",
    "Header",
    "derive_key",
    "hash_core",
    "header_length",
    "parse_header",
    "read_lengths",
    "seal_header",
]

MAGIC = b"\x93SCNN\r\n\x00"
VERSION = 0
FIXED_LENGTH = 20
MAX_HEADER = 1 << 20
PAGE = 4096

_MAC_LENGTH = 32
_MAX_PLAINTEXT = 1 << 48
_MAX_SEGMENTS = 1 << 19
_MIN_SEGMENT, _MAX_SEGMENT = 4 << 10, 64 << 20
_SUITE = "FLOE-AES-256-GCM-HKDF-SHA-384/HMAC-SHA-256/Ed25519"
_PREFIX = struct.Struct(">8sHHI")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """What a sealed file says about itself, in clear, for ever: everything else binds it.

    Attributes:
        file_id: 64 hexadecimal digits, random.
        created: UTC time, ISO 8601.
        name: A logical name, or "".
        claims: A JSON object.
        plaintext_length: Bytes of the plaintext, up to 2^48.
        segment_length: Bytes of a whole encrypted segment, 4 KiB to 64 MiB.
        payload_offset: Where the payload starts: a multiple of 4096, up to 1 MiB. Slots may grow up
            to it.
        signer: The Ed25519 public key of the signer, 64 hexadecimal digits; None if unsigned.

    Raises:
        LimitExceeded: A number is outside its range.
        Tampered: A field has another type or form.

    Example:
        >>> Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...      segment_length=1 << 20, payload_offset=4096, signer=None).segments
        1
    """

    file_id: str
    created: str
    name: str
    claims: dict[str, JSON]
    plaintext_length: int
    segment_length: int
    payload_offset: int
    signer: str | None

    def __post_init__(self) -> None:
        _check_types(self)
        for field, low, high in (
            ("plaintext_length", 0, _MAX_PLAINTEXT),
            ("segment_length", _MIN_SEGMENT, _MAX_SEGMENT),
            ("payload_offset", PAGE, MAX_HEADER),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise LimitExceeded(f"{field}: expected {low} to {high}, got {value}")
        if self.payload_offset % PAGE:
            raise Tampered(
                f"payload_offset: expected a multiple of {PAGE}, got {self.payload_offset}"
            )
        if self.segments > _MAX_SEGMENTS:
            raise LimitExceeded(
                f"expected at most {_MAX_SEGMENTS} segments, got {self.segments}; use longer ones"
            )

    @property
    def segments(self) -> int:
        """How many segments the payload has; at least one."""
        return max(1, -(-self.plaintext_length // (self.segment_length - 32)))

    def to_bytes(self) -> bytes:
        """The canonical JSON of the core.

        Raises:
            StateError: A value is no JSON.

        Example:
            >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
            ...             segment_length=4096, payload_offset=4096, signer=None)
            >>> Core.from_bytes(core.to_bytes()) == core
            True
        """
        return canonical_json({**asdict(self), "suite": _SUITE}, "core")

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Core":
        """The core in raw bytes, which are not trusted yet.

        Raises:
            Tampered: The bytes are no JSON object, a key stands twice, or fields are missing or
                unknown.
            UnsupportedVersion: The suite is another.
            LimitExceeded: A number is outside its range.

        Example:
            >>> Core.from_bytes(b"{}")
            Traceback (most recent call last):
            ...
            secure_cnn.archive.errors.Tampered: the core has other fields than version 0; ...
        """
        fields = parse_json(raw, "the core")
        if not isinstance(fields, dict) or fields.keys() != {*cls.__dataclass_fields__, "suite"}:
            raise Tampered("the core has other fields than version 0; get the file again")
        if fields.pop("suite") != _SUITE:
            raise UnsupportedVersion(
                "the file uses another cipher suite; open it with a newer secure-cnn"
            )
        values: dict[str, Any] = fields
        return cls(**values)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The head of a file as it was read, not authenticated until `check_mac` passes.

    Attributes:
        core: The parsed core.
        core_hash: SHA-256 over magic, version, flags, length and raw core: what everything else
            binds.
        slots: The wrapped file keys, in file order.
        maced: The raw bytes under the MAC.
        mac: The 32-byte MAC that stands behind them.

    Example:
        >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...             segment_length=4096, payload_offset=4096, signer=None)
        >>> header = parse_header(seal_header(core, [], bytes(32)))
        >>> header.check_mac(bytes(32))
        >>> header.check_mac(b"x" * 32)
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.Tampered: the header was changed after it was sealed; ...
    """

    core: Core
    core_hash: bytes
    slots: tuple[Slot, ...]
    maced: bytes
    mac: bytes

    def check_mac(self, file_key: bytes) -> None:
        """Passes if the header is what the holder of the file key wrote.

        Raises:
            Tampered: It is not.

        Example:
            See `Header`.
        """
        if not hmac.compare_digest(self.mac, _mac(file_key, self.maced)):
            raise Tampered("the header was changed after it was sealed; get the file again")


def derive_key(file_key: bytes, purpose: bytes) -> bytes:
    """The 32-byte key of one purpose: HKDF-SHA-256 of the file key.

    Args:
        file_key: 32 bytes.
        purpose: ``b"header"`` or ``b"payload"``.

    Example:
        >>> derive_key(bytes(32), b"header") != derive_key(bytes(32), b"payload")
        True
    """
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"secure-cnn/sealed/v0/" + purpose).derive(
        file_key
    )


def hash_core(core: bytes) -> bytes:
    """SHA-256 over magic, version, flags, length and raw core: what everything else binds.

    Example:
        >>> len(hash_core(b"{}"))
        32
    """
    return hashlib.sha256(_PREFIX.pack(MAGIC, VERSION, 0, len(core)) + core).digest()


def header_length(core_length: int, kinds: Sequence[SlotKind]) -> int:
    """Bytes up to the payload for these slots, with room for one more recipient, in whole pages.

    Raises:
        LimitExceeded: There are no slots or more than 256, or the head would pass 1 MiB.

    Example:
        >>> header_length(500, [SlotKind.HYBRID])
        4096
    """
    if not 1 <= len(kinds) <= MAX_SLOTS:
        raise LimitExceeded(f"expected 1 to {MAX_SLOTS} recipients, got {len(kinds)}")
    slots = slots_length([*kinds, SlotKind.HYBRID])
    length = FIXED_LENGTH + core_length + slots + _MAC_LENGTH
    if length > MAX_HEADER:
        raise LimitExceeded(
            f"expected a head of at most {MAX_HEADER} bytes, got {length}: use fewer claims"
        )
    return -(-length // PAGE) * PAGE


def seal_header(core: Core, slots: Sequence[Slot], file_key: bytes) -> bytes:
    """The bytes of the head, zero-padded up to the payload.

    Example:
        >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...             segment_length=4096, payload_offset=4096, signer=None)
        >>> len(seal_header(core, [], bytes(32)))
        4096
    """
    raw = core.to_bytes()
    packed = pack_slots(slots)
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(raw)) + struct.pack(">I", len(packed))
    maced = prefix + raw + packed
    return (maced + _mac(file_key, maced)).ljust(core.payload_offset, b"\0")


def read_lengths(fixed: bytes) -> tuple[int, int]:
    """The lengths of core and slots in the first 20 bytes of a file.

    Raises:
        NotSealed: The file does not start with the magic.
        Truncated: The file ends within the 20 bytes.
        UnsupportedVersion: Version or critical flags are not those of version 0.
        LimitExceeded: Together the parts pass 1 MiB.

    Example:
        >>> read_lengths(b'{"weights": 1}      ')
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.NotSealed: expected a sealed file, got another kind; ...
    """
    if fixed[: len(MAGIC)] != MAGIC[: len(fixed)] or not fixed:
        raise NotSealed(
            "expected a sealed file, got another kind; plain files are refused, seal it first"
        )
    if len(fixed) < FIXED_LENGTH:
        raise Truncated("the file ends within its first 20 bytes; get it again")
    _, version, flags, core_length = _PREFIX.unpack_from(fixed)
    slots_size = int.from_bytes(fixed[_PREFIX.size : FIXED_LENGTH], "big")
    if version != VERSION:
        raise UnsupportedVersion(
            f"expected format version {VERSION}, got {version}; use the secure-cnn that wrote it"
        )
    if flags:
        raise UnsupportedVersion(f"critical flags {flags:#06x} are unknown; use a newer secure-cnn")
    total = FIXED_LENGTH + core_length + slots_size + _MAC_LENGTH
    if total > MAX_HEADER:
        raise LimitExceeded(f"expected a head of at most {MAX_HEADER} bytes, got {total}")
    return core_length, slots_size


def parse_header(raw: bytes) -> Header:
    """The head of a file in the first bytes of a file; not authenticated yet.

    Args:
        raw: The first bytes of the file: up to the payload, or up to 1 MiB.

    Raises:
        ArchiveError: As `read_lengths`; `Truncated` when bytes are missing; `Tampered` when parts
            disagree.

    Example:
        >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...             segment_length=4096, payload_offset=4096, signer=None)
        >>> parse_header(seal_header(core, [], bytes(32))).core == core
        True
    """
    core_length, slots_size = read_lengths(raw[:FIXED_LENGTH])
    slots_start = FIXED_LENGTH + core_length
    mac_start = slots_start + slots_size
    end = mac_start + _MAC_LENGTH
    if len(raw) < end:
        raise Truncated(f"the file ends within its head of {end} bytes; get it again")
    core_bytes = raw[FIXED_LENGTH:slots_start]
    core = Core.from_bytes(core_bytes)
    if core.payload_offset < end:
        raise Tampered("the head runs into the payload; get the file again")
    if len(raw) < core.payload_offset:
        raise Truncated("the file ends before its payload; get it again")
    if any(raw[end : core.payload_offset]):
        raise Tampered("expected zeros between head and payload; get the file again")
    return Header(
        core=core,
        core_hash=hash_core(core_bytes),
        slots=parse_slots(raw[slots_start:mac_start]),
        maced=raw[:mac_start],
        mac=raw[mac_start:end],
    )


def _mac(file_key: bytes, data: bytes) -> bytes:
    """HMAC-SHA-256 under the header key."""
    return hmac.digest(derive_key(file_key, b"header"), data, "sha256")


def _check_types(core: Core) -> None:
    """Refuses a core whose fields are not of the type and form that they are declared with."""
    texts = (core.file_id, core.created, core.name)
    numbers = (core.plaintext_length, core.segment_length, core.payload_offset)
    valid = (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and isinstance(core.claims, dict)
        and _is_hex32(core.file_id)
        and (core.signer is None or _is_hex32(core.signer))
    )
    if not valid:
        raise Tampered(
            "a field of the core has another type or form than version 0; get the file again"
        )


def _is_hex32(value: object) -> bool:
    """Whether a value is 32 bytes in lower-case hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
