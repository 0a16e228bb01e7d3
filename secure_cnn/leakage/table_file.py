"""What models said of examples, kept in a folder as they are trained: an interrupted run goes on.

table.json     who was trained on what, and how: a digest of each
signals.npz    an array for each model and question, and a MAC over them all
exposed.key    by which that is made, and the digests of the most exposed examples; for the owner
"""

import hashlib
import hmac
import io
import json
import os
import secrets
import shlex
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import ClassVar, NoReturn, final

import numpy as np

from privacy.leakage import ShadowDesign
from privacy.statistics import Numbers
from secure_cnn.data.npz_array import array_header, exactly, opened_npz
from secure_cnn.errors import DataError, RunError
from secure_cnn.files import IrregularFileError, check_target, locked_folder, reading, write_file
from secure_cnn.record.document import Document

__all__ = ["TableFolder", "TableRecord", "alone_in", "design_digest", "exposed_key"]

_KEY_BYTES = 32
_MARK, _MAC = "table", "mac"
_WRITTEN = ("leakage.json", "leakage.html")
"""What a measurement's record and its page are called, beside the folder of the table."""
_NAMES = {"design": "pool or seed", "questions": "set of attacks"}
"""What options say of it, in the place of a digest."""
_PRIVATE = 0o600
"""What models say of the people in their data is for nobody else."""


@final
@dataclass(frozen=True, kw_only=True)
class TableRecord(Document):
    """What a table is of: another of any of it is another table.

    Attributes:
        run: The number of the target's run.
        recipe: A digest of how target and shadow models are trained.
        design: A digest of who is trained on what, and with which seeds.
        target: A digest of the target's weights.
        data: A digest of the images, by the key of the folder: whoever has not the key cannot try
            images out.
        models: The target and its shadow models.
        questions: What they are asked, and how many examples of each.
    """

    KIND: ClassVar[str | None] = "leakage-table"

    run: str
    recipe: str
    design: str
    target: str
    data: str
    models: int
    questions: Mapping[str, int] = field(default_factory=dict)


def design_digest(design: ShadowDesign) -> str:
    """SHA-256 of who is trained on what, and with which seeds."""
    digest = hashlib.sha256()
    for part in (design.always, design.pool, design.population):
        digest.update(len(part).to_bytes(8, "big") + part.astype("<i8").tobytes())
    digest.update(np.packbits(design.halves).tobytes())
    digest.update(repr(design.seeds()).encode())
    return digest.hexdigest()


@final
@dataclass(frozen=True, kw_only=True)
class TableFolder:
    """The folder of one table: what is in it is of `record`, or it is refused.

    Guarantee: what is read is what was kept, with this `key`.
    """

    root: Path
    record: TableRecord
    key: bytes = field(repr=False)

    @property
    def _told(self) -> Path:
        return self.root / "table.json"

    @property
    def _signals(self) -> Path:
        return self.root / "signals.npz"

    def with_others(self, possible: Mapping[str, int]) -> "TableFolder":
        """The folder with all that its models were asked, where that is more than is asked now.

        A table of more questions is enough, and goes on as it was begun.

        Args:
            possible: Questions that can be asked, and how many examples of each; a table with
                others is as good as none.

        Raises:
            RunError: Its record cannot be read.
        """
        if not self._told.exists():
            return self
        there = TableRecord.read(self._told).questions
        if not self.record.questions.items() <= there.items() <= possible.items():
            return self
        return replace(self, record=replace(self.record, questions=there))

    def begin(self, *, force: bool) -> dict[int, dict[str, Numbers]]:
        """Begins the table, or goes on with it: the signals of models that were asked earlier.

        The folder is there.

        Args:
            force: Begin anew where another table is in it.

        Raises:
            RunError: Another table is in it, or one whose record is gone, or it cannot be written
                to.
            DataError: The signals are damaged, or another table's, or were changed.
        """
        if not force and self._signals.exists() and not self._told.exists():
            raise RunError(
                f"{self._told}: expected the record of the signals beside it, found none; put it "
                f"back, or train all {self.record.models - 1} shadow models: with --out FOLDER "
                "beside them, or with --force in their place, which loses what was said"
            )
        if force or not self._told.exists():
            self._remove_signals()
            self.record.write(self._told, mode=_PRIVATE)
            return {}
        before = TableRecord.read(self._told)
        for name in ("run", "recipe", "target", "data", "models", "design", "questions"):
            if getattr(before, name) != getattr(self.record, name):
                self._refuse(before, name)
        return self._read() if self._signals.exists() else {}

    def _refuse(self, before: TableRecord, name: str) -> NoReturn:
        """Raise for another table: in what it is another, and what it costs to have this one."""
        had, asked = before.models - 1, self.record.models - 1
        what = f"another {_NAMES.get(name, name)}"
        if name == "models":
            what = (
                f"{had} shadow models where {asked} were asked for, none of which can be used: who "
                "is in whose data follows from their number"
            )
        if name == "questions" and (lacks := self.record.questions.keys() - before.questions):
            what = f"fewer questions: nobody was asked for {', '.join(sorted(lacks))}"
        said = replace(self, record=before)._read() if self._signals.exists() else {}
        raise RunError(
            f"{self._told}: expected the table that was asked for, got one of {what}; ask as then, "
            f"or train all {asked} shadow models: with --out FOLDER beside it, or with --force in "
            f"its place, which loses what {len(said.keys() - {0})} of {had} shadow models said"
        )

    @property
    def _mark(self) -> Numbers:
        """A digest of the record, which stands among the signals: they are of no other table."""
        told = json.dumps(self.record.to_dict(), sort_keys=True).encode()
        return np.frombuffer(hashlib.sha256(told).digest(), np.uint8).astype(np.float64)

    def _mac(self, signals: Mapping[int, Mapping[str, Numbers]]) -> Numbers:
        """Over all that models said, and whose it is: none can be changed, added or left out."""
        mac = hmac.new(self.key, self._mark.tobytes(), "sha256")
        for model in sorted(signals):
            for question, each in sorted(signals[model].items()):
                mac.update(f"{_entry(model, question)} {len(each)}\n".encode() + each.tobytes())
        return np.frombuffer(mac.digest(), np.uint8).astype(np.float64)

    def _remove_signals(self) -> None:
        try:
            self._signals.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"{self._signals}: expected a file that can be removed: {error.strerror}; remove "
                "it, or choose another folder"
            ) from error

    def keep(self, signals: Mapping[int, Mapping[str, Numbers]]) -> None:
        """Writes the signals of all models that were asked so far, atomically.

        Raises:
            RunError: The folder cannot be written to.
        """
        content = io.BytesIO()
        arrays = {_entry(m, q): each for m, of in signals.items() for q, each in of.items()}
        told = {_MARK: self._mark, _MAC: self._mac(signals)}
        np.savez(content, **told, **arrays)  # type: ignore[arg-type]  # its stub takes flags there too
        try:
            write_file(self._signals, content.getvalue(), overwrite=True, mode=_PRIVATE)
        except OSError as error:
            raise RunError(
                f"{self._signals}: expected a place to write to: {error.strerror}"
            ) from error

    def _read(self) -> dict[int, dict[str, Numbers]]:
        """Whole models alone: one that was not asked everything is asked anew."""
        found: dict[int, dict[str, Numbers]] = {}
        self._check_reached()
        with self._opened() as archive:
            names = set(archive.namelist())
            mark = self._array(archive, len(self._mark), f"{_MARK}.npy")
            if not np.array_equal(mark, self._mark):
                raise DataError(
                    f"{self._signals}: expected the signals of table.json beside it, got those of "
                    "another table; begin anew with --force"
                )
            for model in range(self.record.models):
                wanted = {q: f"{_entry(model, q)}.npy" for q in self.record.questions}
                if names.issuperset(wanted.values()):
                    rows = self.record.questions
                    found[model] = {
                        q: self._array(archive, rows[q], name) for q, name in wanted.items()
                    }
            mac = self._mac(found)
            if not np.array_equal(self._array(archive, len(mac), f"{_MAC}.npy"), mac):
                raise DataError(
                    f"{self._signals}: expected what was written there with exposed.key, got "
                    "signals that were changed, or another key; put both back, or begin anew with "
                    "--force"
                )
        return found

    def _check_reached(self) -> None:
        try:
            with reading(self._signals) as file:
                _check_private(self._signals, file.fileno())
        except OSError as error:
            raise RunError(
                f"{self._signals}: expected a file that can be read: {error.strerror}; begin anew "
                "with --force"
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        """The signals; of a file that is damaged it is said how to go on without it."""
        try:
            with opened_npz(self._signals) as archive:
                yield archive
        except KeyError as error:
            raise DataError(
                f"{self._signals}: expected the signals of a table with their seal, got a file "
                "where one of them is missing; it was cut, or is of an older version: begin anew "
                "with --force"
            ) from error
        except DataError as error:
            words = str(error)
            more = "" if "--force" in words else "; begin anew with --force"
            raise DataError(f"{words}{more}") from error

    def _array(self, archive: zipfile.ZipFile, rows: int, name: str) -> Numbers:
        """One array, whose size is known before a byte of it is read."""
        with archive.open(name) as file:
            header = array_header(file, self._signals, name)
            if header.shape != (rows,) or header.dtype != np.float64:
                raise DataError(
                    f"{self._signals}: expected {rows} numbers in {name}, got {header.dtype} "
                    f"{list(header.shape)}; it is of another table, begin anew with --force"
                )
            size = prod(header.shape) * header.dtype.itemsize
            raw = exactly(file, size, self._signals, name)
        values = np.frombuffer(raw, np.float64).copy()
        if not np.isfinite(values).all():
            raise DataError(
                f"{self._signals}: expected finite numbers in {name}, got others; begin anew with "
                "--force"
            )
        return values


@contextmanager
def alone_in(out: Path) -> Iterator[Path]:
    """The folder of a table in `out`, made where it is not there, and in the block for one alone.

    That the record and its page can be written to `out` is seen to first: models are trained in the
    block.

    Raises:
        RunError: Another measurement is under way in it, or it cannot be made or written to.
    """
    folder = out / "leakage"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _WRITTEN:
            check_target(out / name)
    except IrregularFileError as error:  # says itself what was expected
        raise RunError(
            f"{error.filename}: {error.strerror}; move it elsewhere, or choose another folder "
            "with --out"
        ) from error
    except OSError as error:
        raise RunError(
            f"{folder}: expected a folder that can be made: {error.strerror}; choose another one "
            "with --out"
        ) from error
    for place in (out, folder):
        if not os.access(place, os.W_OK):
            raise RunError(
                f"{place}: expected a folder that can be written to; choose another one with --out"
            )
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except BlockingIOError as error:
            raise RunError(
                f"{folder}: another measurement is under way in it; wait for its end, or choose "
                "another folder with --out"
            ) from error
        except OSError as error:
            raise RunError(
                f"{folder}: expected a folder that can be locked: {error.strerror}; choose one on "
                "a local disk with --out"
            ) from error
        yield folder


def exposed_key(folder: Path, *, force: bool = False) -> bytes:
    """The secret key of a table and its digests, drawn where there is neither it nor a table.

    Who has it can look them up.

    Args:
        folder: Of the table.
        force: Draw one for another table where that of the table is gone.

    Raises:
        RunError: It is damaged or gone, or cannot be written, or others can read it.
    """
    path = folder / "exposed.key"
    there = [name for name in ("table.json", "signals.npz") if (folder / name).exists()]
    if there and not force and not path.exists():
        raise RunError(
            f"{path}: expected the key of {there[0]} beside it, found none; put it back, or begin "
            "anew: with --out FOLDER, or with --force in its place"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, secrets.token_bytes(_KEY_BYTES), overwrite=False, mode=_PRIVATE)
        with reading(path) as file:
            _check_private(path, file.fileno())
            key = file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise RunError(
            f"{path}: expected a key that can be read and written: {error.strerror}"
        ) from error
    if len(key) != _KEY_BYTES:
        raise RunError(f"{path}: expected {_KEY_BYTES} bytes, got others; put it back")
    return key


def _check_private(path: Path, fd: int) -> None:
    """Refuses a file that others than its owner can read or change, as `archive` does its keys."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & 0o077:
        raise RunError(
            f"{path}: others can reach what it says of the people in the data (mode {mode:04o}); "
            f"run: chmod 600 {shlex.quote(str(path))}"
        )


def _entry(model: int, question: str) -> str:
    return f"{model}-{question}"
