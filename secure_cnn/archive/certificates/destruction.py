"""What a certificate says of a file that was destroyed."""

import json
from dataclasses import asdict, dataclass, fields
from typing import final

from secure_cnn.archive.certificates.statement import BARE_TYPE
from secure_cnn.archive.errors import Tampered
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.core import is_hex

__all__ = ["TYPE", "Certificate"]

TYPE = BARE_TYPE

_UNKNOWN = (
    "copies of the file elsewhere: backups, snapshots, other machines",
    "what a disk, file system or journal keeps of blocks that were overwritten",
    "whether somebody kept the file key, or tensors that they read",
)


@final
@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was done to one file on one machine.

    Attributes:
        destroyed: UTC time, ISO 8601; what the clock here said.
        file: The name of the file, without its folder.
        overwritten: How many of its bytes, all that held the file key, were overwritten and synced.
        other_names: Other names of the same file (hard links) that still exist, now without keys.
        unknown: What cannot be known.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> archive.save("m", {}, recipients=[me.recipient])
        >>> archive.shred("m", certificate="c", signer=signer).unknown[0]
        'copies of the file elsewhere: backups, snapshots, other machines'
    """

    destroyed: str
    file: str
    file_id: str
    core_hash: str
    file_length: int
    overwritten: int
    other_names: int
    unknown: tuple[str, ...] = _UNKNOWN

    def __str__(self) -> str:
        lines = [f"{name:<12} {json.dumps(value)}" for name, value in asdict(self).items()]
        return "\n".join(lines[:-1] + [f"not known    {json.dumps(text)}" for text in self.unknown])

    def to_json(self) -> JSON:
        """As it stands in a statement."""
        plain: dict[str, JSON] = asdict(self)
        return {**plain, "unknown": list(self.unknown)}

    @classmethod
    def from_json(cls, value: JSON) -> "Certificate":
        """That of a statement."""
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise Tampered("the statement has other fields than version 1; use a newer secure-cnn")
        *texts, unknown = (value[name] for name in ("destroyed", "file", "file_id", "unknown"))
        numbers = [value[name] for name in ("file_length", "overwritten", "other_names")]
        if (
            not is_hex(value["core_hash"], 32)
            or not isinstance(unknown, list)
            or not all(type(text) is str for text in [*texts, *unknown])
            or not all(type(number) is int and number >= 0 for number in numbers)
        ):
            raise Tampered("the statement is malformed; ask who made it")
        plain: dict[str, object] = {**value, "unknown": tuple(unknown)}
        return cls(**plain)  # type: ignore[arg-type]  # checked above
