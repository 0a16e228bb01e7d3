"""Slots: the wrapped copies of the file key, one for each recipient; pure bytes <-> values.

They stand outside core and signature, so that they can be exchanged while the payload stays. What
wraps and unwraps is in the package `keys`, behind the two protocols here.
"""

import enum
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, Tampered

__all__ = [
    "MAX_PASSPHRASE_SLOTS",
    "MAX_SLOTS",
    "NO_KEY_ID",
    "Slot",
    "SlotKind",
    "SlotReader",
    "SlotWriter",
    "check_mix",
    "pack_slots",
    "parse_slots",
    "slot_info",
    "slots_length",
]

MAX_SLOTS = 256
MAX_PASSPHRASE_SLOTS = 8
NO_KEY_ID = bytes(16)

_SLOT_HEAD = struct.Struct(">HH16s")


class SlotKind(enum.IntEnum):
    """How a slot wraps the file key."""

    HYBRID = 1
    X25519 = 2
    ARGON2ID = 3
    KEK = 4
    SERVICE = 5

    @property
    def body_lengths(self) -> range:
        """The lengths that a body of this kind may have, in bytes; one for all but a service."""
        shortest, longest = _BODY_LENGTHS[self]
        return range(shortest, longest + 1)


_BODY_LENGTHS = {
    SlotKind.HYBRID: (1168, 1168),
    SlotKind.X25519: (80, 80),
    SlotKind.ARGON2ID: (92, 92),
    SlotKind.KEK: (96, 96),
    SlotKind.SERVICE: (81, 1104),
}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One wrapped copy of the file key.

    Attributes:
        kind: A `SlotKind`, or the number of a kind unknown to this version, which readers pass
            over.
        key_id: 16 bytes that say for whom it is; for a passphrase, its salt.
        body: The wrapped key.
    """

    kind: int
    key_id: bytes
    body: bytes

    @property
    def name(self) -> str:
        """The kind in words."""
        return (
            SlotKind(self.kind).name.lower() if self.kind in list(SlotKind) else f"kind {self.kind}"
        )


class SlotWriter(Protocol):
    """Whoever can be given the file key.

    Example:
        >>> from secure_cnn.archive.keys.identity import generate_identity
        >>> generate_identity().recipient.kind.name
        'HYBRID'
    """

    @property
    def kind(self) -> SlotKind:
        """The kind of slot that `wrap` makes."""

    @property
    def key_id(self) -> bytes:
        """The 16 bytes that stand for this recipient in every file; `NO_KEY_ID` if none do."""

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that holds the 32-byte file key, bound to the 32-byte hash of the core."""


class SlotReader(Protocol):
    """Whoever can take the file key out of a slot.

    Example:
        >>> from secure_cnn.archive.keys.identity import generate_identity
        >>> me = generate_identity()
        >>> me.unwrap([me.recipient.wrap(bytes(32), b"c" * 32)], b"c" * 32) == bytes(32)
        True
    """

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The 32-byte file key; raises `WrongKey` when no slot is ours."""


def slot_info(kind: SlotKind, core_hash: bytes) -> bytes:
    r"""What every wrap binds: the kind of slot and the file."""
    return b"secure-cnn/sealed/v1/slot|" + struct.pack(">H", kind) + core_hash


def check_mix(kinds: Iterable[int]) -> None:
    """Passes if a file may have slots of all these kinds."""
    kinds = list(kinds)
    if not kinds:
        raise InvalidKey("expected at least one recipient, got none; nobody could open the file")
    if len(kinds) > MAX_SLOTS:
        raise LimitExceeded(f"expected 1 to {MAX_SLOTS} recipients, got {len(kinds)}")
    if kinds.count(SlotKind.ARGON2ID) > MAX_PASSPHRASE_SLOTS:
        raise LimitExceeded(
            f"expected at most {MAX_PASSPHRASE_SLOTS} passphrases, which is what readers try, got "
            f"{kinds.count(SlotKind.ARGON2ID)}"
        )
    if {SlotKind.HYBRID, SlotKind.X25519} <= set(kinds):
        raise InvalidKey(
            "expected recipients that are all hybrid or all X25519, got both: the file would be no "
            "stronger than X25519; make a hybrid identity for everyone"
        )


def slots_length(kinds: Iterable[SlotKind]) -> int:
    """Bytes that slots of these kinds take at most when packed."""
    return sum(_SLOT_HEAD.size + kind.body_lengths[-1] for kind in kinds)


def pack_slots(slots: Sequence[Slot]) -> bytes:
    """The bytes of slots, one behind the other."""
    return b"".join(
        _SLOT_HEAD.pack(slot.kind, len(slot.body), slot.key_id) + slot.body for slot in slots
    )


def parse_slots(raw: bytes) -> tuple[Slot, ...]:
    """The slots in bytes made by `pack_slots`, which are not trusted yet."""
    slots: list[Slot] = []
    at = 0
    while at < len(raw):
        if len(slots) == MAX_SLOTS:
            raise LimitExceeded(f"expected at most {MAX_SLOTS} slots, got more")
        head = raw[at : at + _SLOT_HEAD.size].ljust(_SLOT_HEAD.size, b"\0")
        kind, length, key_id = _SLOT_HEAD.unpack(head)
        at += _SLOT_HEAD.size + length
        known = kind in list(SlotKind)
        if at > len(raw) or (known and length not in SlotKind(kind).body_lengths):
            raise Tampered(f"slot {len(slots)} has a wrong length; get the file again")
        slots.append(Slot(kind=kind, key_id=key_id, body=raw[at - length : at]))
    return tuple(slots)
