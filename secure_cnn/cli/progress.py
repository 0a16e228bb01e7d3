"""The bar of a command that reads all of a file: bytes, bytes per second and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from secure_cnn.printable import Terminal

__all__ = ["file_progress"]

_PATIENCE = 1.0


@contextmanager
def file_progress(
    name: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """A progress line for work on one file: bytes, bytes per second and time left.

    It is drawn on stderr when that is a terminal, comes when the work has taken a second, and goes
    when it ends, however it ends.

    Returns:
        What to call with the bytes done so far, and those there are in all.
    """
    console = Terminal(stderr=True, wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(
        *columns,
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
