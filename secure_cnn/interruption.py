"""Interruption: a signal becomes a request that every loop of a run looks at after every step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "Stopped", "stop_here", "stop_on_signals"]


class StopRequest:
    """A request to stop after the present step; a class because a signal handler sets it."""

    def __init__(self) -> None:
        self.requested = False

    def set(self) -> None:
        """Asks the training to stop after the present step."""
        self.requested = True


class Stopped(BaseException):
    """Work ended because it was asked to; not an Exception, so that no handler hides it."""


def stop_here(stop: StopRequest) -> None:
    """Ends the work where it was asked to end."""
    if stop.requested:
        raise Stopped


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a stop request; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, the request is only ever set by hand.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
