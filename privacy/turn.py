"""One thread at a time: what a second one asks for meanwhile is refused, not waited for."""

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

from privacy.errors import StepError

__all__ = ["InTurn", "Turn"]

_Item = TypeVar("_Item")


class Turn:
    """Held by the thread that is in a step; a class because it holds a lock.

    It is of a thread, not of a call: a Ctrl-C before it is given back locks out no retry.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StepError(
                "another thread is in a step of this training: a batch must not be added twice; "
                "iterate private.batches and call private.step in one thread"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


class InTurn(Generic[_Item]):
    """An iterator that is advanced by one thread at a time; a class because it holds a place."""

    def __init__(self, items: Iterator[_Item], turn: Turn) -> None:
        self._items, self._turn = items, turn

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        with self._turn:
            return next(self._items)
