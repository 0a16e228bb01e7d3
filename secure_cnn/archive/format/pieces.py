"""Several buffers used as one, so that tensors are saved and loaded without joining them."""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import final

import numpy as np

__all__ = ["Pieces"]


@final
class Pieces:
    """Buffers used as if they stood one behind the other, without joining them.

    Attributes:
        buffers: Those that are not empty.
    """

    __slots__ = ("_starts", "buffers")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self.buffers = [buffer for buffer in buffers if len(buffer)]
        self._starts = [0, *accumulate(len(buffer) for buffer in self.buffers)]

    def __len__(self) -> int:
        return self._starts[-1]

    def parts(self, start: int, length: int) -> list[memoryview]:
        """Views of the `length` bytes from `start`, one of each buffer that has some of them."""
        parts: list[memoryview] = []
        index = bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            within = start - self._starts[index]
            parts.append(self.buffers[index][within : within + length])
            taken = len(parts[-1])
            start, length, index = start + taken, length - taken, index + 1
        return parts

    def read(self, start: int, length: int, scratch: memoryview) -> memoryview:
        """A view of `length` bytes from `start`; copied to `scratch` if they span buffers."""
        parts = self.parts(start, length)
        if len(parts) == 1:
            return parts[0]
        done = 0
        for part in parts:
            # An assignment would hold the interpreter lock while it copies.
            np.copyto(
                np.frombuffer(scratch[done : done + len(part)], "B"), np.frombuffer(part, "B")
            )
            done += len(part)
        return scratch[:length]
