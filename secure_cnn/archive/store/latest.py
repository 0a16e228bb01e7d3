"""Which checkpoint of a sequence is the newest: a small signed statement, and nothing else.

It vouches for the newest file and for the whole log before it. That a signed statement is not an
*older* one it cannot tell of itself: that is what `mark` remembers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self, final

from secure_cnn.archive.errors import Tampered, UntrustedSigner
from secure_cnn.archive.format.claims import canonical_json, parse_json
from secure_cnn.archive.keys.signatures import Signer, Verifier

__all__ = ["Latest"]

_TYPE = "application/vnd.secure-cnn.latest.v1"


@final
@dataclass(frozen=True, kw_only=True)
class Latest:
    """The newest checkpoint of a run, and where the log of the run ends.

    Attributes:
        run: Which run, 32 hexadecimal digits.
        signer: Who says so: the text of a `Verifier`.
        generation: Of the newest checkpoint.
        core_hash: Which file it is.
        log_length: Bytes of the log that count.
        log_head: Hash of the last line that counts.
    """

    run: str
    signer: str
    generation: int
    core_hash: str
    log_length: int
    log_head: str

    def to_bytes(self, signer: Signer) -> bytes:
        """Two lines: the statement as JSON, and the signature over the bytes of the first."""
        body = canonical_json(asdict(self), "latest")
        return body + b"\n" + signer.sign_statement(_TYPE, body).hex().encode() + b"\n"

    @classmethod
    def from_bytes(cls, raw: bytes, trusted: Sequence[Verifier]) -> Self:
        """The statement in bytes made by `to_bytes`, after its signature held.

        Raises:
            UntrustedSigner: It is signed by somebody who is not among the trusted.
            Tampered: The signature does not hold, or the bytes are no statement.
        """
        body, _, rest = raw.partition(b"\n")
        value = parse_json(body, "latest")
        types = {name: kind for name, kind in cls.__annotations__.items()}
        if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != types:
            raise Tampered("latest is no statement with a signature; get the folder again")
        latest = cls(**value)  # type: ignore[arg-type]
        signer = next((it for it in trusted if it.to_text() == latest.signer), None)
        if signer is None:
            raise UntrustedSigner(
                f"latest is signed by somebody who is not among the {len(trusted)} trusted; "
                "add that verifier only if you know whose it is"
            )
        try:
            signature = bytes.fromhex(rest.decode("ascii"))
        except ValueError:
            signature = b""
        if rest != signature.hex().encode() + b"\n":
            raise Tampered("the signature of latest is no text of ours; get the folder again")
        signer.check_statement(signature, _TYPE, body)
        return latest
