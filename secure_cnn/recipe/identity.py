"""What makes a run this run, and its data these data: bound into every state of its training.

A digest of the data is exact, so it tells two data sets apart that differ in one example, which no
epsilon covers. That of a private run is therefore keyed with a secret of the run: nobody without
the key can try data sets out. Deliberately not here: who may read the key.
"""

import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from secure_cnn.data import ImageData
from secure_cnn.errors import RunError

__all__ = ["KEYED", "RunIdentity", "keyed_fingerprint"]

KEYED = "hmac-sha256:"
"""How a fingerprint begins that only holders of its key can compute."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """A run's number, and the key of its data's fingerprint.

    Attributes:
        id: 32 hexadecimal digits, drawn when the run begins.
        key: 64 hexadecimal digits, secret; empty where the fingerprint is no secret.

    Raises:
        RunError: One of them is something else.
    """

    id: str
    key: str = field(repr=False, default="")

    def __post_init__(self) -> None:
        if not _is_hex(self.id, 32) or not (self.key == "" or _is_hex(self.key, 64)):
            raise RunError(
                "checkpoint: expected the number of its run, got none: an earlier version wrote "
                "it; finish the run with that version, or start it anew with --force"
            )

    @classmethod
    def draw(cls, *, private: bool) -> "RunIdentity":
        """That of a run that begins; a key is drawn for a private one."""
        return cls(id=secrets.token_hex(16), key=secrets.token_hex(32) if private else "")

    def fingerprint(self, data: ImageData) -> str:
        """The data's digest as everybody may see it."""
        return keyed_fingerprint(data, self.key) if self.key else data.fingerprint

    def to_dict(self) -> dict[str, Any]:
        """As plain values, the key among them."""
        return {"id": self.id, "key": self.key}

    @classmethod
    def from_dict(cls, values: object) -> "RunIdentity":
        """What `to_dict` gave.

        Raises:
            RunError: It is something else.
        """
        found: dict[str, Any] = values if isinstance(values, dict) else {}
        return cls(id=found.get("id", ""), key=found.get("key", "none"))


def keyed_fingerprint(data: ImageData, key: str) -> str:
    """The data's digest under a key, as the claims of a private model have it.

    Args:
        key: 64 hexadecimal digits; among the private claims of the model's sealed file.

    Raises:
        RunError: The key is none.
    """
    if not _is_hex(key, 64):
        raise RunError("data_fingerprint_key: expected 64 hexadecimal digits")
    return KEYED + hmac.digest(bytes.fromhex(key), data.fingerprint.encode(), "sha256").hex()


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None
