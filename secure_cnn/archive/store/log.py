"""What happened in a sequence of checkpoints, and which is the newest: signed, and remembered.

The log is a chain of lines, each holding the hash of the last: whoever knows that of the last line
knows that none before it was changed, left out or moved. `Latest` signs it; lines behind it were
never committed and count for nothing. That it is not an *older* statement it cannot tell of itself:
that is what a `HighWaterMark` remembers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, SupportsFloat, TypeAlias, cast, final

from secure_cnn.archive.errors import RolledBack, StateError, Tampered, UntrustedSigner
from secure_cnn.archive.format.claims import JSON, canonical_json, parse_json
from secure_cnn.archive.format.core import Lineage, is_hex
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.storage import read_small, write_file

__all__ = [
    "Checkpoint",
    "HighWaterMark",
    "Latest",
    "Log",
    "Retention",
    "Which",
    "as_metric",
    "choose",
]

Which: TypeAlias = Literal["latest", "best"] | int
"""Which checkpoint: the newest, the one with the largest metric, or a generation."""

_CHAIN = b"secure-cnn/store/v1/log|"
_TYPE = "application/vnd.secure-cnn.latest.v1"
_MAX_LENGTH = 1 << 20


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved checkpoint, as the log has it; everyone who reads the folder can read this.

    Attributes:
        generation: Its number in the sequence, from 1 and without gaps.
        metric: How good it was, larger is better; None if nobody said.
        created: UTC time, ISO 8601; what the writer's clock said. Nothing is decided by it.
        core_hash: Hash of the file's core, 64 hexadecimal digits: which file it is.

    Example:
        >>> Checkpoint(generation=12, step=400, metric=0.9, created="", core_hash="00" * 32).name
        'checkpoint-00000012.sealed'
    """

    generation: int
    step: int
    metric: float | None
    created: str
    core_hash: str

    def __post_init__(self) -> None:
        for name, least in (("generation", 1), ("step", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 1 << 63:
                raise StateError(f"{name}: expected a whole number from {least}, got {value!r}")
        if self.metric is not None and (
            type(self.metric) is not float or not math.isfinite(self.metric)
        ):
            raise StateError(f"metric: expected a finite float, got {self.metric!r}")
        if type(self.created) is not str or not is_hex(self.core_hash, 32):
            raise StateError("a checkpoint needs its time as text and the 64 digits of its hash")

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"checkpoint-{self.generation:08}.sealed"

    @property
    def pending(self) -> str:
        """The name of its file until it is committed."""
        return f"{self.name}.pending"


@final
@dataclass(frozen=True, kw_only=True)
class Log:
    """A log and where it ends. Made by `empty` and `replay`.

    `head` is the hash of the last line, or of the run if there is none; `length` counts bytes. In
    `history` the checkpoint of generation g stands at g - 1; `gone` are those that were pruned.
    """

    run: str
    head: str
    length: int = 0
    history: tuple[Checkpoint, ...] = ()
    gone: frozenset[int] = frozenset()

    @classmethod
    def empty(cls, run: str) -> Self:
        """The log of a run that saved nothing yet."""
        return cls(run=run, head=hashlib.sha256(_CHAIN + run.encode()).hexdigest())

    @classmethod
    def replay(cls, run: str, raw: bytes) -> Self:
        """The log that these lines describe."""
        head = cls.empty(run).head
        history: list[Checkpoint] = []
        gone: set[int] = set()
        for number, line in enumerate(raw.splitlines(keepends=True), 1):
            entry = parse_json(line, f"line {number} of the log")
            if not isinstance(entry, dict) or entry.get("previous") != head:
                raise Tampered(
                    f"line {number} of the log does not follow the one before; "
                    "get the folder again from where it is whole"
                )
            try:
                _take(entry, history, gone)
            except (StateError, TypeError, ValueError) as error:
                raise Tampered(f"line {number} of the log cannot be: {error}") from None
            head = hashlib.sha256(line).hexdigest()
        return cls(
            run=run, head=head, length=len(raw), history=tuple(history), gone=frozenset(gone)
        )

    @property
    def _start(self) -> str:
        return type(self).empty(self.run).head

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The checkpoints whose files must be there, oldest first."""
        return tuple(it for it in self.history if it.generation not in self.gone)

    @property
    def newest(self) -> Checkpoint | None:
        """The last checkpoint saved; None before the first."""
        return self.history[-1] if self.history else None

    def lineage(self, checkpoint: Checkpoint) -> Lineage:
        """Where the file of the next checkpoint says that it stands."""
        return Lineage(
            run=self.run,
            step=checkpoint.step,
            generation=checkpoint.generation,
            previous=self.newest.core_hash if self.newest else None,
        )

    def saved(self, checkpoint: Checkpoint) -> tuple[bytes, Self]:
        """The line that tells of one more checkpoint, and the log with it."""
        line = self._line({"saved": asdict(checkpoint)})
        return line, self._after(line, history=(*self.history, checkpoint), gone=self.gone)

    def pruned(self, checkpoints: Sequence[Checkpoint]) -> tuple[bytes, Self]:
        """The line that tells that some checkpoints are no longer kept, and the log with it."""
        generations = [it.generation for it in checkpoints]
        line = self._line({"pruned": generations})
        return line, self._after(line, history=self.history, gone=self.gone | set(generations))

    def announced(self, tail: bytes) -> Checkpoint | None:
        """The checkpoint that the first line behind the end of this log announces, if any.

        Such a line was written and never committed, or what committed it was taken away since. What
        a crash left half-written tells nothing.
        """
        line, ended, _ = tail.partition(b"\n")
        try:
            entry = parse_json(line + ended, "the log")
            # Before the first checkpoint nobody but its line tells which run it is.
            follows = isinstance(entry, dict) and self.head in (entry.get("previous"), self._start)
            if ended and isinstance(entry, dict) and follows:
                told: list[Checkpoint] = list(self.history)
                _take(entry, told, set(self.gone))
                return told[-1] if len(told) > len(self.history) else None
        except (Tampered, StateError, TypeError, ValueError):
            pass
        return None

    def _line(self, entry: Mapping[str, object]) -> bytes:
        return canonical_json({**entry, "previous": self.head}, "log") + b"\n"

    def _after(self, line: bytes, *, history: tuple[Checkpoint, ...], gone: frozenset[int]) -> Self:
        return replace(
            self,
            head=hashlib.sha256(line).hexdigest(),
            length=self.length + len(line),
            history=history,
            gone=gone,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Retention:
    """A checkpoint stays if any of the three rules wants it; without a rule all stay.

    The newest one always stays. Among those with an equal metric, `keep_best` wants the newer;
    `every` wants each whose generation is a multiple of it.
    """

    keep_last: int | None = None
    keep_best: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best", "every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise StateError(f"{name}: expected a whole number of at least 1, got {value!r}")

    def superfluous(self, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """Those that no rule wants."""
        if self.keep_last is self.keep_best is self.every is None:
            return ()
        measured = sorted(
            (it for it in checkpoints if it.metric is not None),
            key=lambda it: (it.metric, it.generation),
            reverse=True,
        )
        wanted = {it.generation for it in checkpoints[-(self.keep_last or 1) :]}
        wanted |= {it.generation for it in measured[: self.keep_best or 0]}
        if self.every is not None:
            wanted |= {it.generation for it in checkpoints if it.generation % self.every == 0}
        return tuple(it for it in checkpoints if it.generation not in wanted)


def as_metric(value: object) -> float | None:
    """The metric of a checkpoint, from any number: a tensor's or numpy's too; None stays None."""
    if value is None:
        return None
    try:
        if isinstance(value, SupportsFloat) and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise StateError(f"metric: expected a number, got {_shown(value)}")


def choose(checkpoints: Sequence[Checkpoint], which: Which) -> Checkpoint | None:
    """The checkpoint that is meant, of equally good ones the newer; None if it is not there."""
    # True and 1.0 are equal to 1 and no generation.
    if type(which) not in (int, str):
        raise StateError(
            "which: expected 'latest', 'best' or a generation, which is an int, "
            f"got {_shown(which)}"
        )
    if which == "latest":
        return checkpoints[-1] if checkpoints else None
    if which == "best":
        measured = [(it.metric, it.generation, it) for it in checkpoints if it.metric is not None]
        return max(measured)[2] if measured else None
    return next((it for it in checkpoints if it.generation == which), None)


def _take(entry: Mapping[str, Any], history: list[Checkpoint], gone: set[int]) -> None:
    """Adds what a line says; refuses what cannot have happened."""
    if entry.keys() == {"saved", "previous"}:
        checkpoint = Checkpoint(**entry["saved"])
        if checkpoint.generation != len(history) + 1:
            raise ValueError(f"generation {checkpoint.generation} after {len(history)}")
        history.append(checkpoint)
    elif entry.keys() == {"pruned", "previous"}:
        known = {it.generation for it in history[:-1]} - gone
        if not isinstance(entry["pruned"], list) or not known.issuperset(entry["pruned"]):
            raise ValueError(f"pruned {json.dumps(entry['pruned'])[:80]}")
        gone.update(entry["pruned"])
    else:
        raise ValueError("it is of an unknown kind; a newer version may know it")


def _shown(value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:80]}"


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
    """What was seen of one run: the highest generation and its core hash, by the signer's verifier.

    The mark of a signer counts as long as that signer is trusted: if a key is stolen and signs a
    generation far ahead, taking the key off the trusted ones takes its mark off too. `run` is empty
    if nothing was seen yet.
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
    return isinstance(value, list) and [type(item) for item in value] == [int, str]
