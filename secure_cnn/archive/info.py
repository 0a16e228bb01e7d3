"""What a sealed file says in clear, as a value to print or to read, and whether it was verified."""

import json
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.core import Lineage
from secure_cnn.archive.format.header import VERSION, Header
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.printable import printable

__all__ = ["ArchiveInfo", "SlotInfo", "describe"]


@final
@dataclass(frozen=True, kw_only=True)
class SlotInfo:
    """Who can open a file, as far as everybody can see.

    Attributes:
        kind: ``hybrid``, ``x25519``, ``argon2id``, ``kek``, ``service``, or a number.
        key_id: 32 hexadecimal digits; the `key_id` of a recipient, or a passphrase's salt.
        sealed_for: Whether the core names it: False for a passphrase, and for who was added later.

    Example:
        >>> print(SlotInfo(kind="hybrid", key_id="00" * 16, sealed_for=False))
        hybrid 00000000000000000000000000000000 (added later)
    """

    kind: str
    key_id: str
    sealed_for: bool

    def __str__(self) -> str:
        later = " (added later)" if not self.sealed_for and self.kind != "argon2id" else ""
        return f"{self.kind} {self.key_id}{later}"


@final
@dataclass(frozen=True, kw_only=True)
class ArchiveInfo:
    """What a sealed file says in clear.

    Attributes:
        verified: True only from `verify`: the signature of a trusted signer holds over all else
            here but `slots`. From `inspect` it is False, and anyone may have written any of this.
        version: Format version.
        core_hash: What names the file: 64 hexadecimal digits; `load` can demand it.
        file_id: 64 hexadecimal digits.
        name: Logical name.
        lineage: Where it stands in a sequence; None if in none.
        created: UTC time, ISO 8601.
        claims: The public claims.
        signer: The verifier of the signer; None if unsigned.
        slots: Who can open it, in file order; not covered by the signature.
        plaintext_length: Bytes of the safetensors file inside.
        segment_length: Bytes of a whole segment.
        file_length: Bytes of the sealed file.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {}, recipients=[me.recipient])
        ...     print(archive.inspect(f"{folder}/m"))
        UNVERIFIED: ...
    """

    verified: bool
    version: int
    core_hash: str
    file_id: str
    name: str
    lineage: Lineage | None
    created: str
    claims: dict[str, JSON]
    signer: Verifier | None
    slots: tuple[SlotInfo, ...]
    plaintext_length: int
    segment_length: int
    file_length: int

    def __str__(self) -> str:
        # Texts come from the file: JSON escapes whatever a terminal would obey.
        state = f"VERIFIED, signed by {self.signer!r}"
        if not self.verified:
            state = "UNVERIFIED: anyone may have written this; verify() checks the signature"
        lines = [
            state,
            f"name     {json.dumps(self.name)}",
            f"created  {json.dumps(self.created)}",
            f"file id  {self.file_id}",
            f"core     {self.core_hash}",
            f"signer   {self.signer!r}" if self.signer else "signer   none",
            *self._lineage_lines(),
            *(f"slot     {slot}" for slot in self.slots),
            f"size     {self.file_length} bytes, {self.plaintext_length} inside",
            *(
                f"claim    {json.dumps(key)} = {json.dumps(value)}"
                for key, value in self.claims.items()
            ),
        ]
        return printable("\n".join(lines), layout=True)

    def _lineage_lines(self) -> list[str]:
        """The place in a sequence, in words."""
        if self.lineage is None:
            return []
        place = self.lineage
        return [
            f"run      {json.dumps(place.run)}, step {place.step}, generation {place.generation}",
            f"previous {place.previous or 'none: the first'}",
        ]


def describe(header: Header, signer: Verifier | None, size: int, *, verified: bool) -> ArchiveInfo:
    """The public facts of a header, for a file of `size` bytes."""
    core = header.core
    return ArchiveInfo(
        verified=verified,
        version=VERSION,
        core_hash=header.core_hash.hex(),
        file_id=core.file_id,
        name=core.name,
        lineage=core.lineage,
        created=core.created,
        claims=core.claims,
        signer=signer,
        slots=tuple(
            SlotInfo(
                kind=slot.name,
                key_id=slot.key_id.hex(),
                sealed_for=slot.key_id.hex() in core.audience,
            )
            for slot in header.copies[0].slots
        ),
        plaintext_length=core.plaintext_length,
        segment_length=core.segment_length,
        file_length=size,
    )
