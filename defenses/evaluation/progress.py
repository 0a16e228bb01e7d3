"""The progress bar of an evaluation, on stderr: images, speed and time left."""

import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from defenses.evaluation.images import check_flag

__all__ = ["counted", "progress_bar"]


def progress_bar(*, shown: bool) -> Progress:
    """A bar that leaves nothing behind; silent when stderr is not a terminal."""
    check_flag("progress", shown)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )


def counted(bar: Progress, title: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches that are not empty, counted off on the bar when the next one is asked for."""
    batches = [part for part in parts if len(part)]
    task = bar.add_task(title, total=sum(map(len, batches)), speed="")
    for part in batches:
        yield part
        shown = bar.tasks[bar.task_ids.index(task)]
        done, elapsed = shown.completed + len(part), shown.elapsed or 0.0
        speed = f"{done / elapsed:.3g} images/s" if elapsed > 0 else ""
        bar.update(task, completed=done, speed=speed)
