"""Slots: the wrapped copies of the file key, one for each recipient; pure bytes <-> values.

They stand outside core and signature, so that they can be exchanged while the payload stays. What
wraps and unwraps is in the package `keys`, behind the two protocols here. Each of its modules makes
the `SlotKind` of its slots: a new kind touches that module, the door in `keys` and the command.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, Tampered, WrongKey

__all__ = [
    "MAX_SLOTS",
    "NO_KEY_ID",
    "AnyIdentity",
    "AnyRecipient",
    "Slot",
    "SlotKind",
    "check_beside",
    "check_together",
    "known_kinds",
    "pack_slots",
    "parse_slots",
    "register",
    "slot_info",
    "slots_length",
    "unwrap_own",
]

MAX_SLOTS = 256
NO_KEY_ID = bytes(16)
_SLOT_HEAD = struct.Struct(">HH16s")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One wrapped copy of the file key.

    `kind` is the number of a `SlotKind`, or of one unknown to this version, which readers pass
    over. `key_id` is 16 bytes that say for whom the slot is; for a passphrase, its salt.
    """

    kind: int
    key_id: bytes
    body: bytes

    @property
    def name(self) -> str:
        """The kind in words."""
        return _KINDS[self.kind].name.lower() if self.kind in _KINDS else f"kind {self.kind}"


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SlotKind:
    """How slots of one number wrap the file key, and what they may stand beside in one file.

    Attributes:
        number: What stands in the file, for ever.
        body_lengths: The lengths that a body may have, in bytes.
        label: As in age, recipients of two different labels are refused in one file; a kind
            without a label stands beside all.
        alone: Why a file with another label beside this one is refused, and the cure.
        most: How many slots of this kind one file may have.
        what: What these are called when there are too many.
        named: Whether a recipient's key id is the same in every file, so that the core names it.
        together: Refuses slots of this kind that must not be in one file together.
    """

    number: int
    name: str = field(compare=False)
    body_lengths: range = field(compare=False)
    label: str = field(default="", compare=False)
    alone: str = field(default="", compare=False)
    most: int = field(default=MAX_SLOTS, compare=False)
    what: str = field(default="recipients", compare=False)
    named: bool = field(default=True, compare=False)
    together: Callable[[Sequence[Slot]], None] | None = field(default=None, compare=False)


# Filled by the modules in `keys`, all of which the package imports: readers refuse a known kind
# whose body has another length, and pass over an unknown one.
_KINDS: dict[int, SlotKind] = {}


def register(kind: SlotKind) -> SlotKind:
    """Makes a kind known to readers; gives it back."""
    assert kind.number not in _KINDS, f"two kinds of slot have the number {kind.number}"
    _KINDS[kind.number] = kind
    return kind


def known_kinds() -> tuple[SlotKind, ...]:
    """All kinds, by number."""
    return tuple(_KINDS[number] for number in sorted(_KINDS))


class AnyRecipient(Protocol):
    """Whoever can be given the file key.

    Example:
        >>> from secure_cnn.archive import generate_identity
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


class AnyIdentity(Protocol):
    """Whoever can take the file key out of a slot.

    Example:
        >>> from secure_cnn.archive import generate_identity
        >>> me = generate_identity()
        >>> me.unwrap([me.recipient.wrap(bytes(32), b"c" * 32)], b"c" * 32) == bytes(32)
        True
    """

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The 32-byte file key; raises `WrongKey` when no slot is ours."""


def slot_info(kind: SlotKind, core_hash: bytes) -> bytes:
    """What every wrap binds, so that a slot moved to another file or kind does not open."""
    return b"secure-cnn/sealed/v1/slot|" + struct.pack(">H", kind.number) + core_hash


def unwrap_own(
    slots: Sequence[Slot], who: AnyRecipient, unwrap: Callable[[bytes], bytes | None], *, cure: str
) -> bytes:
    """The file key out of the first of a recipient's own slots whose body `unwrap` can open.

    `cure` says with what a file opens that has no such slot.
    """
    found = [slot for slot in slots if (slot.kind, slot.key_id) == (who.kind.number, who.key_id)]
    if not found:
        raise WrongKey(f"not sealed for {who!r}; open it with {cure}")
    for slot in found:
        if (file_key := unwrap(slot.body)) is not None:
            return file_key
    raise Tampered(f"the slot of {who!r} does not open: the header was changed; get the file again")


def check_beside(numbers: Iterable[int]) -> None:
    """Passes if one file may have slots of all these kinds, as each declares."""
    counts = Counter(numbers)
    if not counts:
        raise InvalidKey("expected at least one recipient, got none; nobody could open the file")
    if counts.total() > MAX_SLOTS:
        raise LimitExceeded(f"expected 1 to {MAX_SLOTS} recipients, got {counts.total()}")
    kinds = [kind for kind in known_kinds() if counts[kind.number]]
    for kind in kinds:
        if counts[kind.number] > kind.most:
            raise LimitExceeded(
                f"expected at most {kind.most} {kind.what}, which is what readers try, "
                f"got {counts[kind.number]}"
            )
    labels = {kind.label: kind.alone for kind in kinds if kind.label}
    if len(labels) > 1:
        raise InvalidKey(
            f"expected recipients that are all {' or all '.join(labels)}, got both: "
            f"{''.join(labels.values()) or 'make two files'}"
        )


def check_together(slots: Sequence[Slot]) -> None:
    """Passes if these slots may be in one file, as far as only their bodies tell."""
    for kind in known_kinds():
        if kind.together is not None:
            kind.together([slot for slot in slots if slot.kind == kind.number])


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
        number, length, key_id = _SLOT_HEAD.unpack(head)
        at += _SLOT_HEAD.size + length
        kind = _KINDS.get(number)
        if at > len(raw) or (kind is not None and length not in kind.body_lengths):
            raise Tampered(f"slot {len(slots)} has a wrong length; get the file again")
        slots.append(Slot(kind=number, key_id=key_id, body=raw[at - length : at]))
    return tuple(slots)
