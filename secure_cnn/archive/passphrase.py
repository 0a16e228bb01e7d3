"""A passphrase as recipient and as identity: Argon2id, with its cost capped before it is paid.

The wrapping key is bound to the file through HKDF `info`, and comes with a commitment, so that one
slot cannot be made to open under many passphrases.
"""

import contextlib
import hmac
import os
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, WrongKey
from secure_cnn.archive.slots import NO_KEY_ID, SLOT_INFO, Slot, SlotKind

__all__ = ["INSECURE_TEST_COST", "Argon2Cost", "Passphrase"]

_MAX_PASSPHRASE_SLOTS = 8
_COST = struct.Struct(">III")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Argon2Cost:
    """What one guess at a passphrase costs (Argon2id, RFC 9106).

    Attributes:
        memory_kib: Memory in KiB, from 8 per lane to 2^20 (1 GiB).
        iterations: Passes, 1 to 16.
        lanes: Parallel lanes, 1 to 16.

    Raises:
        LimitExceeded: A number is outside its range.

    Example:
        >>> Argon2Cost(memory_kib=2**32 - 1)
        Traceback (most recent call last):
        ...
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


@final
class Passphrase:
    """A passphrase, as recipient and as identity; its repr hides it.

    The text is put into Unicode form NFC, so that keyboards agree. Each file gets a salt of its
    own.

    Args:
        text: The passphrase, not empty.
        cost: What a guess costs. When opening, the cost comes from the file, within the limits of
            `Argon2Cost`.

    Raises:
        InvalidKey: The passphrase is empty or is not text that UTF-8 can hold.

    Example:
        >>> Passphrase("correct horse battery staple")
        Passphrase(…)
    """

    __slots__ = ("_cost", "_secret")
    kind = SlotKind.ARGON2ID

    def __init__(self, text: str, *, cost: Argon2Cost | None = None) -> None:
        if not text:
            raise InvalidKey("expected a passphrase, got an empty text")
        try:
            self._secret = unicodedata.normalize("NFC", text).encode()
        except UnicodeEncodeError:
            raise InvalidKey("expected a passphrase that UTF-8 can hold") from None
        self._cost = cost if cost is not None else Argon2Cost()

    def wrap(self, file_key: bytes, core_hash: bytes) -> Slot:
        """A slot that opens with this passphrase.

        Args:
            file_key: 32 bytes.
            core_hash: 32 bytes, SHA-256 of the core of the file.

        Example:
            >>> secret = Passphrase("example", cost=INSECURE_TEST_COST)
            >>> secret.unwrap([secret.wrap(bytes(32), bytes(32))], bytes(32)) == bytes(32)
            True
        """
        salt = os.urandom(16)
        key, commitment = self._derive(self._cost, salt, core_hash)
        cost = _COST.pack(self._cost.memory_kib, self._cost.iterations, self._cost.lanes)
        sealed = AESGCM(key).encrypt(bytes(12), file_key, None)
        return Slot(kind=self.kind, key_id=NO_KEY_ID, body=salt + cost + commitment + sealed)

    def unwrap(self, slots: Sequence[Slot], core_hash: bytes) -> bytes:
        """The file key out of the first slot that opens; all costs are checked before one is paid.

        Raises:
            WrongKey: No passphrase slot opens. A changed header looks the same.
            LimitExceeded: A slot asks for more than `Argon2Cost` allows, or there are more than 8.

        Example:
            >>> Passphrase("example").unwrap([], bytes(32))
            Traceback (most recent call last):
            ...
            secure_cnn.archive.errors.WrongKey: the passphrase opens none of 0 passphrase slots: ...
        """
        bodies = [slot.body for slot in slots if slot.kind == self.kind]
        if len(bodies) > _MAX_PASSPHRASE_SLOTS:
            raise LimitExceeded(
                f"expected at most {_MAX_PASSPHRASE_SLOTS} passphrase slots, got {len(bodies)}"
            )
        costs = [_read_cost(body) for body in bodies]
        for cost, body in zip(costs, bodies, strict=True):
            key, commitment = self._derive(cost, body[:16], core_hash)
            if hmac.compare_digest(commitment, body[28:60]):
                with contextlib.suppress(InvalidTag):
                    return AESGCM(key).decrypt(bytes(12), body[60:], None)
        raise WrongKey(
            f"the passphrase opens none of {len(bodies)} passphrase slots: "
            "it is wrong, or the header was changed"
        )

    def _derive(self, cost: Argon2Cost, salt: bytes, core_hash: bytes) -> tuple[bytes, bytes]:
        """The wrapping key, and a commitment to it: no partitioning oracles (Len et al., 2021)."""
        slow = Argon2id(
            salt=salt,
            length=32,
            iterations=cost.iterations,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        ).derive(self._secret)
        both = HKDF(hashes.SHA256(), 64, salt=None, info=SLOT_INFO + core_hash).derive(slow)
        return both[:32], both[32:]

    def __repr__(self) -> str:
        return "Passphrase(…)"


def _read_cost(body: bytes) -> Argon2Cost:
    """The cost a slot asks for, within the limits."""
    memory_kib, iterations, lanes = _COST.unpack_from(body, 16)
    return Argon2Cost(memory_kib=memory_kib, iterations=iterations, lanes=lanes)
