"""The run's folder: made once, never overwritten unless asked for; and the journal kept in it.

run.json                        the record
report.html                     its page
metrics.jsonl                   a line an epoch, see `metrics`
checkpoints/model.*             the finished model, `.sealed` or `.safetensors`
checkpoints/training.*          the training under way, gone once it is complete
checkpoints/sums.*              what people can leave a ridge head by, see `recipe.ridge`

Beside them stand, once they are made, audit.*, leakage.* and a folder leakage/; certificate.* of a
run that others have left; and of a training in shards a folder shards/.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secure_cnn.checkpoint import Sealing, write_state
from secure_cnn.errors import RunError
from secure_cnn.files import locked_folder, target_of
from secure_cnn.pages import Examples, write_page
from secure_cnn.recipe.metrics import append_metrics, write_metrics
from secure_cnn.record import ChosenRecord, EpochRecord, ResultRecord, RunRecord

__all__ = ["Journal", "RunFolder"]

_OWN = (
    *("run.json", "report.html", "metrics.jsonl"),
    *("audit.json", "audit.html", "leakage.json", "leakage.html"),
)
"""What a run writes into its folder, and what an audit and a leakage measurement add."""
_OWN_STAGES = re.compile(r"(inventory|shard-\d{3,}-slice-\d{3,})\.(sealed|safetensors)")
_OWN_SHADOWS = ("table.json", "signals.npz", "exposed.key")
"""What a leakage measurement keeps of its shadow models, and the key of its digests."""
_OWN_CHECKPOINTS = tuple(
    f"{stem}.{end}" for stem in ("model", "training", "sums") for end in ("sealed", "safetensors")
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The places in a run's folder."""

    root: Path
    sealed: bool

    @property
    def record(self) -> Path:
        """The record's file."""
        return self.root / "run.json"

    @property
    def page(self) -> Path:
        """The page's file."""
        return self.root / "report.html"

    @property
    def metrics(self) -> Path:
        """The file of a line an epoch."""
        return self.root / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The finished model's file."""
        return self._checkpoint("model")

    @property
    def training(self) -> Path:
        """The file of the training under way."""
        return self._checkpoint("training")

    @property
    def sums(self) -> Path:
        """The file of the sums that a ridge head is solved from."""
        return self._checkpoint("sums")

    @property
    def shadows(self) -> Path:
        """The folder of what a leakage measurement keeps of its shadow models."""
        return self.root / "leakage"

    @property
    def shards(self) -> Path:
        """The folder of the stages of a training in shards."""
        return self.root / "shards"

    def recorded(self) -> RunRecord:
        """The record of the run that is in it."""
        if not os.path.lexists(self.record):
            raise RunError(
                f"{self.root}: no run has begun here, so there is nothing to resume; start one "
                "without --resume"
            )
        if self.model.parent.is_symlink():
            raise RunError(
                f"{self.model.parent}: expected the run's own folder, got a symbolic link; put the "
                "folder itself back that it leads to"
            )
        return RunRecord.read(self.record)

    @contextmanager
    def begun(self, *, force: bool) -> Iterator[None]:
        """Makes the folder for a new run, and keeps every other run out of it in the block.

        A folder that holds a run is refused without `force`, one that holds anything else always.
        With `force` the files of the earlier run are removed, and no other; the files of a run that
        was killed before it wrote its record are removed in any case.
        """
        with self._writable():
            self.root.mkdir(parents=True, exist_ok=True)
        # Held from before the old record goes until the block ends: nobody finds it in between.
        with self.locked():
            with self._writable():
                self._clear(force=force)
                self.model.parent.mkdir(exist_ok=True)
            if not os.access(self.root, os.W_OK):
                raise RunError(f"{self.root}: expected a folder that can be written to")
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other run out of the folder in the block."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.root))
            except BlockingIOError as error:
                raise RunError(
                    f"{self.root}: a run is under way in it; wait for its end, or interrupt it"
                ) from error
            except OSError as error:
                if not self.root.is_dir():
                    raise RunError(
                        f"{self.root}: expected a run's folder, with run.json in it: "
                        f"{error.strerror}"
                    ) from error
                raise RunError(
                    f"{self.root}: expected a folder that can be locked: {error.strerror}; choose "
                    "one on a local disk"
                ) from error
            yield

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.root}: expected a folder that can be made and written to: {error.strerror}"
            ) from error

    def _clear(self, *, force: bool) -> None:
        """Removes an earlier run, if that is what the folder holds and it may go."""
        own, strangers = self._sorted()
        if strangers or not all(target_of(path.name) for path in own):
            self._check_replaceable(strangers, force=force)
        measured = any(path.parent == self.shadows for path in own)
        with self._unmeasured() if measured else nullcontext():
            # The record last: killed in between, what is left is still a run to replace.
            for path in sorted(own, key=lambda path: path == self.record):
                path.unlink()
            if measured:
                self.shadows.rmdir()
            if self.shards.is_dir():
                self.shards.rmdir()

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """Keeps a measurement of what the run leaks out of its folder in the block."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.shadows))
            except BlockingIOError as error:
                raise RunError(
                    f"{self.shadows}: a measurement of the run is under way in it; wait for its "
                    "end, or interrupt it"
                ) from error
            yield

    def _check_replaceable(self, strangers: list[str], *, force: bool) -> None:
        """Passes if the folder holds a run, nothing else, and was named to be replaced."""
        if self.root.is_symlink():
            raise RunError(
                f"{self.root}: expected a folder that can be made and written to, got a link; give "
                "the path it leads to"
            )
        if not self.record.is_file():
            raise RunError(
                f"{self.root}: holds no run, so it is not replaced; choose another folder"
            )
        if strangers:
            raise RunError(
                f"{self.root}: holds more than a run, so it is not replaced: "
                f"{', '.join(strangers[:8])}; move that elsewhere, or choose another folder"
            )
        # Last: a way out that is named must be one.
        if not force:
            raise RunError(
                f"{self.root}: exists already, and a run is never overwritten; choose another "
                "folder, go on with --resume, or replace it with --force"
            )

    def _sorted(self) -> tuple[list[Path], list[str]]:
        """The files that runs write here, and the names of everything else."""
        own, strangers = [], []
        places: dict[Path, Callable[[str], object]] = {self.root: _OWN.__contains__}
        within: dict[Path, Callable[[str], object]] = {
            self.model.parent: _OWN_CHECKPOINTS.__contains__,
            self.shadows: _OWN_SHADOWS.__contains__,
            self.shards: _OWN_STAGES.fullmatch,
        }
        there = [place for place in within if place.is_dir() and not place.is_symlink()]
        places |= {place: within[place] for place in there}
        for place, is_own in places.items():
            for path in place.iterdir():
                if path in places:
                    continue
                # Of a name with what a killed writer adds to it, its temporary file.
                written = target_of(path.name) or path.name
                regular = stat.S_ISREG(path.stat(follow_symlinks=False).st_mode)
                if regular and is_own(written):
                    own.append(path)
                else:
                    strangers.append(path.relative_to(self.root).as_posix())
        return own, sorted(strangers)

    def _checkpoint(self, stem: str) -> Path:
        return self.root / "checkpoints" / f"{stem}.{'sealed' if self.sealed else 'safetensors'}"


class Journal:
    """A run's record, kept in its folder as it grows; a class because it holds the record."""

    def __init__(
        self,
        folder: RunFolder,
        record: RunRecord,
        sealing: Sealing | None,
        on_epoch: Callable[[EpochRecord], object] | None = None,
    ) -> None:
        self.folder, self.record, self.sealing = folder, record, sealing
        self._on_epoch = on_epoch
        self._examples: Examples | None = None
        self._before, self._started = record.seconds, time.monotonic()

    def begin(self) -> None:
        """Leaves the lines of the epochs on record, and of no later ones: they are run again."""
        write_metrics(self.folder.metrics, self.record.epochs)

    def write(self) -> None:
        """Writes the record and its page."""
        seconds = self._before + time.monotonic() - self._started
        self.record = replace(self.record, seconds=seconds)
        self.record.write(self.folder.record)
        write_page(self.record, self._examples, self.folder.page)

    def begin_variant(self, chosen: ChosenRecord) -> None:
        """Writes down what the settings come to in a training that begins, or goes on."""
        others = tuple(each for each in self.record.chosen if each.variant != chosen.variant)
        self.record = replace(self.record, chosen=(*others, chosen))
        self.record.write(self.folder.record)

    def save(self, state: Mapping[str, Any], released: int) -> None:
        """Writes a training's state, after so many noised steps.

        A state shows its weights: they are on record as released before it is there.
        """
        if released > self.record.released:
            self.record = replace(self.record, released=released)
            self.record.write(self.folder.record)
        write_state(self.folder.training, state, sealing=self.sealing)

    def add_epoch(self, epoch: EpochRecord, released: int) -> None:
        """Writes an epoch down, and how many steps were released; that number never falls."""
        released = max(self.record.released, released)
        self.record = replace(self.record, epochs=(*self.record.epochs, epoch), released=released)
        self.record.write(self.folder.record)
        append_metrics(self.folder.metrics, epoch)

    def tell(self, epoch: EpochRecord) -> None:
        """Tells whoever follows the run of an epoch; what they raise ends it as interrupted."""
        if self._on_epoch is None:
            return
        try:
            self._on_epoch(epoch)
        except BaseException:
            self.interrupt()
            raise

    def add_result(
        self, found: ResultRecord, examples: Examples | None, *, notes: Iterable[str]
    ) -> None:
        """Writes down what a finished training can do, and what is to be said of it."""
        results = tuple(r for r in self.record.results if r.variant != found.variant)
        self.record = replace(self.record, results=(*results, found))
        self._examples = examples
        for words in filter(None, notes):
            self.note(words)

    def note(self, words: str) -> None:
        """Adds a note, unless an earlier try has said so already."""
        self.record = replace(self.record, notes=tuple(dict.fromkeys((*self.record.notes, words))))

    def interrupt(self) -> None:
        """Writes down where the run stopped."""
        self.record = replace(self.record, status="interrupted")
        self.write()

    def complete(self) -> None:
        """Closes page and record; only a complete run can do without the state to go on from."""
        record = replace(self.record, status="complete")
        # The page comes first: a run whose page could not be written can still be resumed.
        write_page(record, self._examples, self.folder.page)
        record.write(self.folder.record)
        self.record = record
        self.folder.training.unlink(missing_ok=True)
