"""Work that a few threads share: the calling one, and as many more as there are processors for."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["Work", "share_out"]

Work: TypeAlias = Callable[[int], None]

_MAX_THREADS = 4


def share_out(
    indexes: range, start: Callable[[], Work], told: Callable[[int], None] | None = None
) -> None:
    """Does the work of each index, in about this order; whoever is free takes the next one.

    When it returns or raises, no thread is at work any more. After a failure, or an interrupt, no
    index is begun.

    Raises:
        BaseException: The first failure, of the work or of `told`.
    """
    left, taking, failures = iter(indexes), threading.Lock(), list[BaseException]()
    finished = 0

    def run(tell: Callable[[int], None] | None) -> None:
        nonlocal finished
        try:
            work, done = start(), 0
            while not failures:
                with taking:
                    finished += done
                    index = next(left, None)
                if index is None:
                    return
                if tell is not None:
                    tell(finished)
                work(index)
                done = 1
        except BaseException as error:
            failures.append(error)

    count = min(_MAX_THREADS, len(indexes), len(os.sched_getaffinity(0)))
    others = [threading.Thread(target=run, args=[None], name="segments") for _ in range(count - 1)]
    try:
        # While the interpreter ends no thread can be started; then this one does all.
        with contextlib.suppress(RuntimeError):
            for thread in others:
                thread.start()
        run(told)
        _join(others)
        if told is not None and not failures:
            told(finished)
    except BaseException as interrupt:
        failures.append(interrupt)
        _join(others)
    if failures:
        raise failures[0]


def _join(threads: Sequence[threading.Thread]) -> None:
    """Returns when those that were started are done."""
    for thread in threads:
        if thread.ident is not None:
            thread.join()
