"""A passphrase as recipient and as identity: Argon2id, with its cost capped before it is paid."""

import os
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, WrongKey
from secure_cnn.archive.format.slots import (
    NO_KEY_ID,
    WRAP_LENGTH,
    Secret,
    Slot,
    SlotKind,
    register,
    slot_info,
    unwrap_key,
    wrap_key,
)

__all__ = ["ARGON2ID", "INSECURE_TEST_COST", "Argon2Cost", "Passphrase"]

_COST = struct.Struct(">III")
_MAX_SLOTS = 8
_MAX_TOTAL = (1 << 20) * 16  # of all slots together: memory in KiB times iterations


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Argon2Cost:
    """What one guess at a passphrase costs (Argon2id, RFC 9106).

    Attributes:
        memory_kib: From 8 per lane to 2^20 (1 GiB).
        iterations: Passes, 1 to 16.
        lanes: Parallel lanes, 1 to 16.

    Example:
        >>> Argon2Cost(memory_kib=2**32 - 1)
        Traceback (most recent call last):
        secure_cnn.archive.errors.LimitExceeded: Argon2id memory_kib: expected 32 to ...
    """

    memory_kib: int = 262_144
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("lanes", 1, 16),
            ("iterations", 1, 16),
            ("memory_kib", 8 * self.lanes, 1 << 20),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise LimitExceeded(f"Argon2id {name}: expected {low} to {high}, got {value}")


INSECURE_TEST_COST = Argon2Cost(memory_kib=8, iterations=1, lanes=1)


def _check_costs(slots: Sequence[Slot]) -> None:
    costs = [_read_cost(slot.body) for slot in slots]
    total = sum(cost.memory_kib * cost.iterations for cost in costs)
    if total > _MAX_TOTAL:
        raise LimitExceeded(
            f"expected passphrases that together cost at most {_MAX_TOTAL} KiB times iterations "
            f"to try, got {len(costs)} of {total}: whoever has the wrong one would pay for all; "
            "use cheaper ones, or fewer"
        )


ARGON2ID = register(
    SlotKind(
        number=3,
        name="ARGON2ID",
        body_lengths=range(_COST.size + WRAP_LENGTH, _COST.size + WRAP_LENGTH + 1),
        most=_MAX_SLOTS,
        what="passphrases",
        named=False,  # the key id of a slot is its salt
        together=_check_costs,
    )
)


@final
class Passphrase(Secret):
    """A passphrase, as recipient and as identity; its repr hides it.

    The text, not empty, is put into Unicode form NFC, so that keyboards agree. Each file gets a
    salt of its own. When opening, the cost comes from the file, within the limits of `Argon2Cost`.

    Example:
        >>> Passphrase("correct horse battery staple")
        Passphrase(…)
    """

    __slots__ = ("_cost", "_secret")
    kind = ARGON2ID
    key_id = NO_KEY_ID

    def __init__(self, text: str, *, cost: Argon2Cost | None = None) -> None:
        if not text:
            raise InvalidKey("expected a passphrase, got an empty text")
        try:
            self._secret = unicodedata.normalize("NFC", text).encode()
        except UnicodeEncodeError:
            raise InvalidKey("expected a passphrase that UTF-8 can hold") from None
        self._cost = cost if cost is not None else Argon2Cost()

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that opens with this passphrase."""
        salt = os.urandom(16)
        cost = _COST.pack(self._cost.memory_kib, self._cost.iterations, self._cost.lanes)
        slow = self._derive(self._cost, salt)
        # Without a salt of its own: `slow` is new for each slot already.
        wrapped = wrap_key(slow, None, slot_info(self.kind, core_hash), file_key)
        return Slot(kind=self.kind.number, key_id=salt, body=cost + wrapped)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key of the first slot that opens; all costs are checked before one is paid.

        Where none opens, a changed header looks the same as a wrong passphrase: `WrongKey`.
        """
        found = [slot for slot in slots if slot.kind == self.kind.number]
        if not found:
            raise WrongKey(
                "expected a file sealed with a passphrase, got one that no passphrase opens; "
                "inspect it to see what does"
            )
        if len(found) > _MAX_SLOTS:
            raise LimitExceeded(f"expected at most {_MAX_SLOTS} passphrase slots, got {len(found)}")
        _check_costs(found)
        info = slot_info(self.kind, core_hash)
        for slot in found:
            slow = self._derive(_read_cost(slot.body), slot.key_id)
            file_key = unwrap_key(slow, None, info, slot.body[_COST.size :])
            if file_key is not None:
                return file_key
        raise WrongKey(
            f"the passphrase opens none of {len(found)} passphrase slots: "
            "it is wrong, or the header was changed; try again"
        )

    def _derive(self, cost: Argon2Cost, salt: bytes) -> bytes:
        return Argon2id(
            salt=salt,
            length=32,
            iterations=cost.iterations,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        ).derive(self._secret)

    def __repr__(self) -> str:
        return "Passphrase(…)"


def _read_cost(body: bytes) -> Argon2Cost:
    memory_kib, iterations, lanes = _COST.unpack_from(body)
    return Argon2Cost(memory_kib=memory_kib, iterations=iterations, lanes=lanes)
