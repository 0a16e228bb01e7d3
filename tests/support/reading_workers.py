"""Processes that read for a test, told from those that an earlier test left to the collector."""

import gc
import multiprocessing
from typing import Any

__all__ = ["living_workers", "remember"]

_KNOWN: set[int | None] = set()


def remember() -> None:
    """To be called before a test: what lives now is not its own."""
    gc.collect()
    _KNOWN.clear()
    _KNOWN.update(process.pid for process in multiprocessing.active_children())


def living_workers() -> list[Any]:
    """Processes of this one that live and began since."""
    return [each for each in multiprocessing.active_children() if each.pid not in _KNOWN]
