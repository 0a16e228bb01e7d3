"""The progress bar of a training: what a person watches while it runs, on stderr.

What it shows of a private training's losses is not covered by epsilon; it is shown to the trainer
and written nowhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from secure_cnn.printable import Terminal

__all__ = ["TrainingProgress", "training_progress"]

_SMOOTHING = 0.9


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
    name: str, *, steps: int, done: int, shown: bool = True
) -> Iterator[TrainingProgress]:
    """A progress line for one training, drawn on stderr when that is a terminal."""
    console = Terminal(stderr=True, wrap=True)
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
