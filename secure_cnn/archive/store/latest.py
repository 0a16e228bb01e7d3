"""Which checkpoint of a sequence is the newest: a signed statement, and what was seen before.

`Latest` vouches for the newest file and for the whole log before it. That it is not an *older*
statement it cannot tell of itself: that is what a `HighWaterMark` remembers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast, final

from secure_cnn.archive.errors import RolledBack, Tampered, UntrustedSigner
from secure_cnn.archive.format.claims import JSON, canonical_json, parse_json
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.storage import read_small, write_file

__all__ = ["HighWaterMark", "Latest"]

_TYPE = "application/vnd.secure-cnn.latest.v1"
_MAX_LENGTH = 1 << 20


@final
@dataclass(frozen=True, kw_only=True)
class Latest:
    """The newest checkpoint of a run, and where the log of the run ends.

    `signer` is the text of the verifier of who says so. Of the log, the first `log_length` bytes
    count, and `log_head` is the hash of the last line in them.
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
        """The statement in bytes made by `to_bytes`, after its signature held."""
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


@final
@dataclass(frozen=True, kw_only=True)
class HighWaterMark:
    """What was seen of one run.

    The mark of a signer counts as long as that signer is trusted: if a key is stolen and signs a
    generation far ahead, taking the key off the trusted ones takes its mark off too.

    Attributes:
        run: Which run; empty if nothing was seen yet.
        seen: Highest generation and its core hash, by the text of the signer's verifier.
    """

    run: str = ""
    seen: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def check(self, latest: Latest | None, trusted: Sequence[Verifier]) -> None:
        """Passes if `latest` is as new as anything that was seen."""
        texts = [it.to_text() for it in trusted]
        seen = max((self.seen[text] for text in texts if text in self.seen), default=None)
        if seen is None:
            return
        if latest is None or (latest.run == self.run and latest.generation < seen[0]):
            now = f"the newest is {latest.generation}" if latest else "there is none"
            raise RolledBack(
                f"generation {seen[0]} was seen here before, now {now}; the folder was put back "
                "to an earlier state: get the newer one"
            )
        if latest.run != self.run:
            raise Tampered(
                f"expected run {self.run}, the folder holds run {latest.run}; "
                "it was exchanged, or this mark belongs to another folder"
            )
        if latest.generation == seen[0] and latest.core_hash != seen[1]:
            raise Tampered(
                f"generation {seen[0]} is not the one seen before; two writers had the same key, "
                "or an old copy of the folder was written on"
            )

    def raised_to(self, latest: Latest) -> Self:
        """The mark after `latest` was seen; lower than before it never is."""
        before = self.seen.get(latest.signer, (0, ""))
        now = max(before, (latest.generation, latest.core_hash))
        return type(self)(run=latest.run, seen={**self.seen, latest.signer: now})

    @classmethod
    def read(cls, path: Path) -> Self:
        """The mark in a file; one that saw nothing if there is no file."""
        raw = read_small(path, _MAX_LENGTH)
        return cls() if raw is None else cls(**_parsed(raw, path))

    def write(self, path: Path) -> None:
        """Puts the mark into a file."""
        seen = {signer: list(mark) for signer, mark in self.seen.items()}
        write_file(
            path, canonical_json({"run": self.run, "seen": seen}, "mark") + b"\n", overwrite=True
        )


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    """The fields of a mark, after all of its types were checked."""
    value = parse_json(raw, f"{path}")
    if isinstance(value, dict) and value.keys() == {"run", "seen"}:
        run, seen = value["run"], value["seen"]
        if type(run) is str and isinstance(seen, dict) and all(map(_is_mark, seen.values())):
            return {"run": run, "seen": {who: tuple(cast(Any, it)) for who, it in seen.items()}}
    raise Tampered(f"{path}: is no high-water mark; put back the file that was there")


def _is_mark(value: JSON) -> bool:
    """Whether a value is a generation and a hash."""
    return isinstance(value, list) and [type(item) for item in value] == [int, str]
