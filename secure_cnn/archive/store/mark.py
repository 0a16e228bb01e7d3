"""The highest generation seen of a run, for each signer: what an old folder is compared with.

Kept outside of the folder, on another disk or machine, it shows that the whole folder was put back
to an earlier state, and that a reader was shown less than before. Kept inside, it goes back with
the folder, and shows only that a part of the folder was put back. The file is not signed: who can
write it can make it forget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast, final

from secure_cnn.archive.errors import RolledBack, Tampered
from secure_cnn.archive.format.claims import JSON, canonical_json, parse_json
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.store.latest import Latest
from secure_cnn.archive.store.smallfile import read_small, replace_small

__all__ = ["HighWaterMark"]

_MAX_LENGTH = 1 << 20


@final
@dataclass(frozen=True, kw_only=True)
class HighWaterMark:
    """What was seen of one run.

    The mark of a signer counts as long as that signer is trusted: if a key is stolen and signs a
    generation far ahead, taking the key off the trusted ones takes its mark off too.

    Attributes:
        run: Which run; empty if nothing was seen yet.
        seen: Highest generation and the hash of its core, by the text of the signer's verifier.
    """

    run: str = ""
    seen: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def check(self, latest: Latest | None, trusted: Sequence[Verifier]) -> None:
        """Passes if `latest` is as new as anything that was seen.

        Raises:
            RolledBack: It is older, or there is none although something was seen.
            Tampered: It is of another run, or another file of the same generation.
        """
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
        """The mark in a file; one that saw nothing if there is no file.

        Raises:
            Tampered: The file is no mark.
            StorageError: It cannot be read.
        """
        raw = read_small(path, _MAX_LENGTH)
        return cls() if raw is None else cls(**_parsed(raw, path))

    def write(self, path: Path) -> None:
        """Puts the mark into a file.

        Raises:
            StorageError: It cannot be written.
        """
        seen = {signer: list(mark) for signer, mark in self.seen.items()}
        replace_small(path, canonical_json({"run": self.run, "seen": seen}, "mark") + b"\n")


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
