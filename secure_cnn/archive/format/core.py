"""The core of a sealed file: what it says about itself, in clear, for ever; everything binds it.

The core is authenticated as the raw bytes that were read: nothing is serialised again before.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, final

from secure_cnn.archive.errors import LimitExceeded, StateError, Tampered, UnsupportedVersion
from secure_cnn.archive.format.claims import JSON, canonical_json, parse_json

__all__ = ["LATEST_FILE", "Core", "Lineage", "is_hex", "timestamp"]

LATEST_FILE = "latest.json"
"""Beside the files of a checkpoint store: what names the newest, and binds all by their hashes."""


_MAX_PLAINTEXT = 1 << 48
_MAX_SEGMENTS = 1 << 19
_MIN_SEGMENT, _MAX_SEGMENT = 4 << 10, 64 << 20
_MAX_COUNT = (1 << 63) - 1
_SUITE = "FLOE-AES-256-GCM-HKDF-SHA-384/HMAC-SHA-256/SHA-256"
_ALGORITHMS = ("ed25519", "ed25519+ml-dsa-65")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a file stands in a sequence of files; signed with the core.

    Attributes:
        run: What the sequence is called.
        generation: Its number in the sequence, 0 to 2^63 - 1.
        previous: The core hash of the file before it, 64 hexadecimal digits; None for the first.

    Example:
        >>> Lineage(run="digits", step=100, generation=1, previous=None).generation
        1
    """

    run: str
    step: int
    generation: int
    previous: str | None

    def __post_init__(self) -> None:
        if type(self.run) is not str:
            raise StateError(f"lineage.run: expected text, got {type(self.run).__name__}")
        for name in ("step", "generation"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MAX_COUNT:
                raise StateError(f"lineage.{name}: expected 0 to {_MAX_COUNT}, got {value!r}")
        if self.previous is not None and not is_hex(self.previous, 32):
            raise StateError(
                "lineage.previous: expected a core hash of 64 hexadecimal digits or None, "
                f"got {self.previous!r}"
            )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """What a sealed file says about itself.

    `file_id` is random, 64 hexadecimal digits: two files of one content differ. `audience` has the
    key ids of those it was sealed for, 32 hexadecimal digits each, sorted. `segment_length` counts
    a whole encrypted segment. `signer` is algorithm and hash of the signer's public key; None if
    unsigned.
    """

    file_id: str
    created: str
    name: str
    lineage: Lineage | None
    audience: tuple[str, ...]
    claims: dict[str, JSON]
    plaintext_length: int
    segment_length: int
    signer: str | None

    def __post_init__(self) -> None:
        if not _well_formed(self):
            raise Tampered(
                "a field of the core has another type or form than version 1; get the file again"
            )
        for field, low, high in (
            ("plaintext_length", 0, _MAX_PLAINTEXT),
            ("segment_length", _MIN_SEGMENT, _MAX_SEGMENT),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise LimitExceeded(f"{field}: expected {low} to {high}, got {value}")
        if self.segments > _MAX_SEGMENTS:
            raise LimitExceeded(
                f"expected at most {_MAX_SEGMENTS} segments, got {self.segments}; use longer ones"
            )

    @property
    def segments(self) -> int:
        """How many segments the payload has; at least one."""
        return max(1, -(-self.plaintext_length // (self.segment_length - 32)))

    def to_bytes(self) -> bytes:
        """The canonical JSON of the core."""
        return canonical_json({**asdict(self), "suite": _SUITE}, "core")

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Core":
        """The core in raw bytes, which are not trusted yet."""
        fields = parse_json(raw, "the core")
        if not isinstance(fields, dict) or fields.keys() != {*cls.__dataclass_fields__, "suite"}:
            raise Tampered("the core has other fields than version 1; get the file again")
        if fields.pop("suite") != _SUITE:
            raise UnsupportedVersion(
                "the file uses another cipher suite; open it with a newer secure-cnn"
            )
        values: dict[str, Any] = fields
        if isinstance(values["audience"], list):
            values["audience"] = tuple(values["audience"])
        return cls(**{**values, "lineage": _lineage(values["lineage"])})


def timestamp(moment: datetime) -> str:
    """A UTC time to the second, ISO 8601, as all texts of the archive have it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def is_hex(value: object, size: int) -> bool:
    """Whether a value is so many bytes in lower-case hexadecimal."""
    return type(value) is str and len(value) == 2 * size and set(value) <= set("0123456789abcdef")


def _lineage(value: Any) -> Lineage | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != set(Lineage.__dataclass_fields__):
        raise Tampered("the lineage has other fields than version 1; get the file again")
    try:
        return Lineage(**value)
    except StateError as error:
        raise Tampered(f"{error}; get the file again") from None


def _well_formed(core: Core) -> bool:
    """Whether each field is of the type and form that it is declared with."""
    texts = (core.file_id, core.created, core.name)
    numbers = (core.plaintext_length, core.segment_length)
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in numbers)
        and isinstance(core.claims, dict)
        and is_hex(core.file_id, 32)
        and isinstance(core.audience, tuple)
        and all(is_hex(key_id, 16) for key_id in core.audience)
        and (core.signer is None or (type(core.signer) is str and _names_key(core.signer)))
    )


def _names_key(signer: str) -> bool:
    algorithm, _, digest = signer.partition(":")
    return algorithm in _ALGORITHMS and is_hex(digest, 32)
