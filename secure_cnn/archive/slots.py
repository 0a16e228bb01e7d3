"""Slots: the wrapped copies of the file key, one for each recipient; pure bytes <-> values.

They stand outside core and signature, so that they can be exchanged while the payload stays. What
wraps and unwraps is in `keys` and `passphrase`.
"""

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.errors import LimitExceeded, Tampered

__all__ = [
    "MAX_SLOTS",
    "NO_KEY_ID",
    "SLOT_INFO",
    "Slot",
    "SlotKind",
    "pack_slots",
    "parse_slots",
    "slots_length",
]

MAX_SLOTS = 256
NO_KEY_ID = bytes(16)
SLOT_INFO = b"secure-cnn/sealed/v0/slot|"

_SLOT_HEAD = struct.Struct(">HH16s")


class SlotKind(enum.IntEnum):
    """How a slot wraps the file key; each kind has a body of one length.

    Example:
        >>> SlotKind.HYBRID.body_length
        1168
    """

    HYBRID = 1
    X25519 = 2
    ARGON2ID = 3

    @property
    def body_length(self) -> int:
        """The length of the body in bytes."""
        return {SlotKind.HYBRID: 1168, SlotKind.X25519: 80, SlotKind.ARGON2ID: 108}[self]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One wrapped copy of the file key.

    Attributes:
        kind: A `SlotKind`, or the number of a kind unknown to this version, which readers pass
            over.
        key_id: 16 bytes, `NO_KEY_ID` where the kind has none.
        body: The wrapped key.

    Example:
        >>> Slot(kind=SlotKind.X25519, key_id=NO_KEY_ID, body=bytes(80)).name
        'x25519'
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


def slots_length(kinds: Sequence[SlotKind]) -> int:
    """Bytes that slots of these kinds take when packed.

    Example:
        >>> slots_length([SlotKind.X25519])
        100
    """
    return sum(_SLOT_HEAD.size + kind.body_length for kind in kinds)


def pack_slots(slots: Sequence[Slot]) -> bytes:
    """The bytes of slots, one behind the other.

    Example:
        >>> slot = Slot(kind=SlotKind.X25519, key_id=NO_KEY_ID, body=bytes(80))
        >>> parse_slots(pack_slots([slot])) == (slot,)
        True
    """
    return b"".join(
        _SLOT_HEAD.pack(slot.kind, len(slot.body), slot.key_id) + slot.body for slot in slots
    )


def parse_slots(raw: bytes) -> tuple[Slot, ...]:
    """The slots in bytes made by `pack_slots`, which are not trusted yet.

    Raises:
        LimitExceeded: There are more than 256.
        Tampered: A length does not fit.

    Example:
        >>> parse_slots(b"")
        ()
    """
    slots: list[Slot] = []
    at = 0
    while at < len(raw):
        if len(slots) == MAX_SLOTS:
            raise LimitExceeded(f"expected at most {MAX_SLOTS} slots, got more")
        head = raw[at : at + _SLOT_HEAD.size]
        kind, length, key_id = _SLOT_HEAD.unpack(head.ljust(_SLOT_HEAD.size, b"\0"))
        at += _SLOT_HEAD.size + length
        if at > len(raw) or (kind in list(SlotKind) and length != SlotKind(kind).body_length):
            raise Tampered(f"slot {len(slots)} has a wrong length; get the file again")
        slots.append(Slot(kind=kind, key_id=key_id, body=raw[at - length : at]))
    return tuple(slots)
