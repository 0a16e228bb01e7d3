"""Which part of a step takes how long: a stopwatch whose parts nest, and what it reads.

A part's seconds are its own: what a part inside of it takes is that one's. So the parts of a step
add up to the step, and what nobody claimed is `other`. Nothing here knows what is timed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from typing import Any, Protocol, final

import torch

__all__ = ["PARTS", "ClockMarks", "EventMarks", "Marks", "Stopwatch", "marks_for"]

PARTS = (
    *("data", "attack", "forward", "backward", "clipping", "noise", "optimizer"),
    *("averaging", "saving", "other"),
)
"""The parts of a training step, in the order in which they come; what is left is `other`."""


class Marks(Protocol):
    """Points in time, and the time between two of them."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to a later one."""


@final
class ClockMarks:
    """Marks are readings of a clock: right where a call returns when its work is done."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def mark(self) -> float:
        """What the clock says."""
        return self._clock()

    def seconds(self, start: float, end: float) -> float:
        """The difference."""
        return end - start


@final
class EventMarks:
    """Marks are events that a GPU reaches in the order of its work; nothing waits before the end.

    Waiting at each mark would forbid the overlap that training lives on, and so measure another
    training. An event that the GPU reaches while it waits for the processor is reached at once.

    Args:
        record: Gives a `torch.cuda.Event` with timing that has been put into the queue.
    """

    def __init__(self, record: Callable[[], Any]) -> None:
        self._record = record

    def mark(self) -> Any:
        """An event in the queue."""
        return self._record()

    def seconds(self, start: Any, end: Any) -> float:
        """Waits until the later event is reached; events count in milliseconds."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def marks_for(device: torch.device, clock: Callable[[], float]) -> Marks:
    """Events on a CUDA device, the clock elsewhere."""
    if device.type == "cuda":
        return EventMarks(partial(_recorded, device))
    return ClockMarks(clock)


@final
class Stopwatch:
    """Seconds of each part; a class because it holds what is under way."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._under_way: list[str] = []
        self._changes: list[tuple[str | None, Any]] = []

    def enter(self, name: str) -> None:
        """A part begins inside of the present one."""
        self._under_way.append(name)
        self._changes.append((name, self._marks.mark()))

    def leave(self) -> None:
        """The present part ends; the one around it goes on."""
        self._under_way.pop()
        around = self._under_way[-1] if self._under_way else None
        self._changes.append((around, self._marks.mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is this part's, unless a part inside of it claims it."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, owner: object, method: str, name: str) -> None:
        """From now on the calls of a method of this one object are a part.

        Raises:
            AttributeError: The object has no such method.
        """
        call = getattr(owner, method)

        @wraps(call)
        def timed(*values: Any, **named: Any) -> Any:
            with self.part(name):
                return call(*values, **named)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last time; starts anew."""
        changes, self._changes = self._changes, []
        found: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(changes):
            if name is not None:
                found[name] = found.get(name, 0.0) + self._marks.seconds(start, end)
        return found


def _recorded(device: torch.device) -> Any:
    """An event at the end of the device's queue."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event
