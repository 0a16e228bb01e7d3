"""What a sealed file says in clear, as a value to print or to read, and whether it was verified."""

import json
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.claims import JSON
from secure_cnn.archive.header import VERSION, Header
from secure_cnn.archive.signatures import Verifier

__all__ = ["ArchiveInfo", "describe"]


@final
@dataclass(frozen=True, kw_only=True)
class ArchiveInfo:
    """What a sealed file says in clear.

    Attributes:
        verified: True only from `verify`: the signature of a trusted signer holds over all else
            here but `slots`. From `inspect` it is False, and anyone may have written any of this.
        version: Format version.
        file_id: 64 hexadecimal digits.
        name: Logical name.
        created: UTC time, ISO 8601.
        claims: The public claims.
        signer: The verifier of the signer; None if unsigned.
        slots: Kind and key id of each slot, in file order; not covered by the signature.
        plaintext_length: Bytes of the safetensors file inside.
        segment_length: Bytes of a whole segment.
        file_length: Bytes of the sealed file.

    Example:
        >>> from secure_cnn.archive.header import Core, parse_header, seal_header
        >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...             segment_length=4096, payload_offset=4096, signer=None)
        >>> info = describe(parse_header(seal_header(core, [], bytes(32))), 4202, verified=False)
        >>> print(info)
        UNVERIFIED: ...
    """

    verified: bool
    version: int
    file_id: str
    name: str
    created: str
    claims: dict[str, JSON]
    signer: Verifier | None
    slots: tuple[str, ...]
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
            f"signer   {self.signer!r}" if self.signer else "signer   none",
            f"slots    {', '.join(self.slots)}",
            f"size     {self.file_length} bytes, {self.plaintext_length} inside",
            *(
                f"claim    {json.dumps(key)} = {json.dumps(value)}"
                for key, value in self.claims.items()
            ),
        ]
        return "\n".join(lines)


def describe(header: Header, size: int, *, verified: bool) -> ArchiveInfo:
    """The public facts of a header, for a file of `size` bytes.

    Example:
        >>> from secure_cnn.archive.header import Core, parse_header, seal_header
        >>> core = Core(file_id="00" * 32, created="", name="", claims={}, plaintext_length=0,
        ...             segment_length=4096, payload_offset=4096, signer=None)
        >>> info = describe(parse_header(seal_header(core, [], bytes(32))), 4202, verified=False)
        >>> info.segment_length
        4096
    """
    core = header.core
    return ArchiveInfo(
        verified=verified,
        version=VERSION,
        file_id=core.file_id,
        name=core.name,
        created=core.created,
        claims=core.claims,
        signer=Verifier(bytes.fromhex(core.signer)) if core.signer else None,
        slots=tuple(f"{slot.name} {slot.key_id.hex()}" for slot in header.slots),
        plaintext_length=core.plaintext_length,
        segment_length=core.segment_length,
        file_length=size,
    )
