"""Slots: the wrapped copies of the file key, one for each recipient, and what every wrap shares.

They stand outside core and signature, so that they can be exchanged while the payload stays. Each
module of `keys` makes the `SlotKind` of its slots, and wraps behind the two protocols here.
"""

import hmac
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, SupportsIndex, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, SecretKeptError, Tampered, WrongKey

__all__ = [
    "MAX_SLOTS",
    "NO_KEY_ID",
    "WRAP_LENGTH",
    "AnyIdentity",
    "AnyRecipient",
    "Secret",
    "Slot",
    "SlotKind",
    "check_beside",
    "check_key_id",
    "check_kind",
    "check_together",
    "hkdf",
    "known_kinds",
    "pack_slots",
    "parse_slots",
    "register",
    "slot_info",
    "slots_length",
    "unwrap_key",
    "unwrap_own",
    "wrap_each",
    "wrap_key",
]

MAX_SLOTS = 256
NO_KEY_ID = bytes(16)
WRAP_LENGTH = 80
_SLOT_HEAD = struct.Struct(">HH16s")
_TWO_BYTES = range(1 << 16)  # what number and body length can be


class Secret:
    """A class whose objects hold a secret: they are neither copied nor pickled.

    A trainer that pickles its settings, or sends them to a worker process, would carry a key along
    unseen. A secret leaves by `write_key`, or by `to_text`, which says so.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise SecretKeptError(
            f"a {type(self).__name__} is neither copied nor pickled, since its secret would go "
            "along; hand over the object itself, or write_key and the path of the file"
        )

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)


def hkdf(secret: bytes, info: bytes, *, length: int = 32, salt: bytes | None = None) -> bytes:
    """HKDF-SHA-256: as many bytes of a secret as are wanted for one purpose, which `info` names."""
    return HKDF(hashes.SHA256(), length, salt=salt, info=info).derive(secret)


def wrap_key(secret: bytes, salt: bytes | None, info: bytes, file_key: bytes) -> bytes:
    """The 80 bytes that give the file key back to whoever has the secret.

    The secret has 32 bytes that cannot be guessed cheaply, and wraps under `info`, what the wrap
    belongs to. `salt` is fresh for each wrap where secret and info may be used again.
    """
    # The nonce is zero, since `key` is of this wrap alone. The commitment keeps one slot from being
    # made to open under many secrets (Len, Grubbs and Ristenpart, 2021).
    key, commitment = _derive(secret, salt, info)
    return commitment + AESGCM(key).encrypt(bytes(12), file_key, None)


def unwrap_key(secret: bytes, salt: bytes | None, info: bytes, wrapped: bytes) -> bytes | None:
    """The file key; None if secret, salt, info or wrap are not those it was wrapped with."""
    key, commitment = _derive(secret, salt, info)
    if not hmac.compare_digest(commitment, wrapped[:32]):
        return None
    try:
        return AESGCM(key).decrypt(bytes(12), wrapped[32:], None)
    except InvalidTag:
        return None


def _derive(secret: bytes, salt: bytes | None, info: bytes) -> tuple[bytes, bytes]:
    both = hkdf(secret, info, length=64, salt=salt)
    return both[:32], both[32:]


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

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        # A copied or pickled recipient has the registered kind itself, which alone is accepted.
        if _registered(self):
            return _kind_numbered, (self.number,)
        return object.__reduce_ex__(self, protocol)


# Filled by the modules in `keys`, all of which the package imports: readers refuse a known kind
# whose body has another length, and pass over an unknown one.
_KINDS: dict[int, SlotKind] = {}


def register(kind: SlotKind) -> SlotKind:
    """Makes a kind known to readers and writers; gives it back.

    A number that is taken keeps its kind: another one in its place could drop the label that keeps
    weaker recipients out of a file.
    """
    number, lengths = kind.number, kind.body_lengths
    fits = isinstance(number, int) and number in _TWO_BYTES
    if not (fits and lengths and lengths[0] in _TWO_BYTES and lengths[-1] in _TWO_BYTES):
        raise InvalidKey(
            f"expected a kind whose number and body lengths are 0 to {_TWO_BYTES[-1]}, "
            f"got {number!r} and {lengths!r}; choose others"
        )
    known = _KINDS.setdefault(number, kind)
    if known is not kind:
        raise InvalidKey(
            f"expected a number that no kind of slot has yet, got {number}, which is {known.name}; "
            "choose another"
        )
    return kind


def _registered(kind: object) -> bool:
    """Whether this very object was registered; kinds of one number are equal, whatever they say."""
    return any(kind is known for known in _KINDS.values())


def _kind_numbered(number: int) -> SlotKind:
    """The registered kind that was pickled."""
    if number not in _KINDS:
        raise InvalidKey(
            f"expected the number of a registered SlotKind, got {number}; "
            "import the module that registers it"
        )
    return _KINDS[number]


def known_kinds() -> tuple[SlotKind, ...]:
    """All kinds, by number."""
    return tuple(_KINDS[number] for number in sorted(_KINDS))


class AnyRecipient(Protocol):
    """Whoever can be given the file key.

    Example:
        >>> assert {"kind", "key_id", "wrap"} <= set(dir(AnyRecipient))
    """

    @property
    def kind(self) -> SlotKind:
        """The kind of slot that `wrap` makes, as it was given to `register`."""

    @property
    def key_id(self) -> bytes:
        """The 16 bytes of this recipient's slots; `NO_KEY_ID` if its kind is not `named`."""

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that holds the 32-byte file key, bound to the 32-byte hash of the core."""


class AnyIdentity(Protocol):
    """Whoever can take the file key out of a slot.

    Example:
        >>> assert "unwrap" in dir(AnyIdentity)
    """

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The 32-byte file key; raises `WrongKey` when no slot is ours."""


def check_kind(kind: object, name: str) -> SlotKind:
    """A recipient's kind, if it is registered: `check_beside` compares the labels of no others."""
    if not isinstance(kind, SlotKind):
        raise InvalidKey(
            f"{name}: expected a registered SlotKind, got {type(kind).__name__}; "
            "make a SlotKind, and register(kind) first"
        )
    if _registered(kind):
        return kind
    known = next((each for each in known_kinds() if each.number == kind.number), None)
    if known is None:
        got, cure = f"number {kind.number!r}, which is not", "register(kind) first"
    else:
        got = f"another of number {kind.number} than {known.name}"
        cure = "give the registered one, or register(kind) first, with a number of its own"
    raise InvalidKey(f"{name}: expected a registered SlotKind, got {got}; {cure}")


def wrap_each(recipients: Sequence[AnyRecipient], file_key: bytes, core_hash: bytes) -> list[Slot]:
    """A slot for each recipient, of the kind, key id and length that it declares."""
    return [_declared(who, who.wrap(file_key, core_hash)) for who in recipients]


def _declared(who: AnyRecipient, slot: object) -> Slot:
    """A slot, if it is of the kind, key id and length that the recipient who made it declares."""
    # No message shows the bytes of a slot, since they may hold the file key.
    kind, name = check_kind(who.kind, f"{type(who).__name__}.kind"), f"{type(who).__name__}.wrap"
    if type(slot) is not Slot:
        raise InvalidKey(
            f"{name}: expected a Slot, got {type(slot).__name__}; return Slot(kind=..., ...)"
        )
    if type(slot.kind) is not int or slot.kind != kind.number:
        got = slot.kind if isinstance(slot.kind, int) else type(slot.kind).__name__
        raise InvalidKey(
            f"{name}: expected a slot of kind {kind.number}, got {got}; "
            "wrap as the recipient's own kind says"
        )
    if check_key_id(slot.key_id, f"{name}: slot") != who.key_id and kind.named:
        raise InvalidKey(
            f"{name}: expected a slot with the recipient's key_id, got another; wrap under key_id"
        )
    if not isinstance(slot.body, bytes) or len(slot.body) not in kind.body_lengths:
        low, high = kind.body_lengths[0], kind.body_lengths[-1]
        raise InvalidKey(
            f"{name}: expected a body of {f'{low} to {high}' if low < high else low} bytes, "
            f"got {_size(slot.body)}; make it as long as its kind says"
        )
    return slot


def check_key_id(key_id: object, name: str) -> bytes:
    """The key id of a recipient or a slot, which has 16 bytes."""
    if isinstance(key_id, bytes) and len(key_id) == len(NO_KEY_ID):
        return key_id
    raise InvalidKey(
        f"{name}.key_id: expected {len(NO_KEY_ID)} bytes, got {_size(key_id)}; "
        "give the id that stands in the slots"
    )


def _size(value: object) -> int | str:
    """What there is of bytes, without showing them."""
    return len(value) if isinstance(value, bytes) else type(value).__name__


def slot_info(kind: SlotKind, core_hash: bytes) -> bytes:
    """What every wrap binds, so that a slot moved to another file or kind does not open."""
    return b"secure-cnn/sealed/v1/slot|" + struct.pack(">H", kind.number) + core_hash


def unwrap_own(
    slots: Sequence[Slot], who: AnyRecipient, unwrap: Callable[[bytes], bytes | None], *, cure: str
) -> bytes:
    """The file key of the first slot of `who` that `unwrap` opens; `cure` is what opens others."""
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
    labels = Counter[str]()
    for kind in kinds:
        labels[kind.label] += counts[kind.number]
    del labels[""]
    if len(labels) > 1:
        *others, last = (f"{count} {label}" for label, count in labels.items())
        cures = [kind.alone for kind in kinds if kind.label and kind.alone]
        raise InvalidKey(
            f"expected recipients that are all {' or all '.join(labels)}, "
            f"got {', '.join(others)} and {last}: "
            f"{'; '.join(cures) or 'make a file for the recipients of each'}"
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
