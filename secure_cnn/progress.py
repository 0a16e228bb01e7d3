"""Progress bars, on stderr: of a training, and of work on a large file or on many.

What the bar of a training shows of private losses is not covered by epsilon; it is shown to the
trainer and written nowhere.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from secure_cnn.printable import Terminal

__all__ = [
    "TrainingProgress",
    "count_progress",
    "file_progress",
    "part_progress",
    "tell_share",
    "training_progress",
]

_SMOOTHING = 0.9
_NEARLY = 1 - 2**-20
_PATIENCE = 1.0
"""Seconds that work takes before its bar comes."""


class TrainingProgress:
    """One training's line: steps, loss, accuracy, images per second, epsilon and time left."""

    def __init__(self, bar: Progress, name: str, *, steps: int, done: int) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task(
            name, total=steps, completed=done, loss="", speed="", told=""
        )
        self._loss: float | None = None
        self._images = 0

    def advance(self, losses: torch.Tensor, *, step: int) -> None:
        """After a batch with `losses` [n]; `step` steps are done."""
        loss = float(losses.mean())
        self._loss = (
            loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        )
        self._images += len(losses)
        elapsed = self._bar.tasks[self._task].elapsed or 0.0
        speed = f"{self._images / elapsed:.0f} images/s" if elapsed > 0 else ""
        self._bar.update(self._task, completed=step, loss=f"loss {self._loss:.3f}", speed=speed)

    def tell(self, what: str) -> None:
        """Shows what is known since the last epoch, such as accuracy and epsilon."""
        self._bar.update(self._task, told=what)


@contextmanager
def training_progress(
    name: str, *, steps: int, done: int, shown: bool = True, told: str = ""
) -> Iterator[TrainingProgress]:
    """A progress line for one training, drawn on stderr when that is a terminal.

    `told` is said before, wherever stderr leads.
    """
    console = Terminal(stderr=True, wrap=True)
    if told:
        console.print(told)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        TextColumn("{task.fields[told]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        yield TrainingProgress(bar, name, steps=steps, done=done)


@contextmanager
def file_progress(
    name: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """A progress line for work on one file: bytes, bytes per second and time left.

    It is drawn on stderr when that is a terminal, comes when the work has taken a second, and goes
    when it ends, however it ends. What it yields is called with the bytes done so far, and those
    there are in all.
    """
    with _patient(name, (DownloadColumn(binary_units=True), TransferSpeedColumn()), clock) as tell:
        yield tell


@contextmanager
def count_progress(
    name: str, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """A progress line for work on so many things, such as images; else as `file_progress`.

    What it yields is called with the number of those that are done.
    """
    with _patient(name, (MofNCompleteColumn(),), clock) as tell:
        yield lambda done: tell(done, total)


@contextmanager
def part_progress(
    name: str, total: int, *, kept: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[float], None]]:
    """A progress line for work in parts that each take long, such as trainings.

    On a terminal it says which part is under way ("shadow model 4 of 16"), for how long the work
    goes on and how long it will; where stderr leads elsewhere each part that is done is a line,
    with an estimate. What it yields is called with the parts that are done, and the share of the
    one under way.

    Args:
        name: Of one part.
        total: Parts that there are.
        kept: Those that are there from before, which is said.
        clock: In seconds.
    """
    console = Terminal(stderr=True, wrap=True)
    if kept:
        console.print(f"{kept} of {total} {name}s are kept from before")
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        get_time=clock,
        disable=not console.is_interactive,
    )
    task, began, told = bar.add_task(name, total=total, completed=kept), clock(), kept

    def tell(done: float) -> None:
        nonlocal told
        under_way = min(total, int(done) + 1)
        bar.update(task, completed=done, description=f"{name} {under_way} of {total}")
        bar.start()
        if int(done) > told and not console.is_interactive:
            told, gone = int(done), clock() - began
            left = gone / (told - kept) * (total - told)
            words = f"{name} {told} of {total} is done after {_duration(gone)}"
            console.print(words + (f", about {_duration(left)} left" if left else ""))

    try:
        yield tell
    finally:
        bar.stop()


def tell_share(tell: Callable[[float], None], done: int, share: float) -> None:
    """How far the part behind so many others is; whole only once it is told to be done."""
    tell(done + min(share, _NEARLY))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _patient(
    name: str, columns: tuple[ProgressColumn, ...], clock: Callable[[], float]
) -> Iterator[Callable[[int, int], None]]:
    """A line with these columns that comes when the work has taken its time."""
    console = Terminal(stderr=True, wrap=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        get_time=clock,
        disable=not console.is_interactive,
    )
    task, began = bar.add_task(name, total=None), clock()

    def tell(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if clock() - began >= _PATIENCE:
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()
