"""Several buffers read as one, so that tensors are saved without joining them first."""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import final

__all__ = ["Pieces"]


@final
class Pieces:
    """Buffers read as if they stood one behind the other, without joining them.

    Example:
        >>> pieces = Pieces([memoryview(b"hello "), memoryview(b"world")])
        >>> len(pieces), bytes(pieces.read(4, 4, memoryview(bytearray(4))))
        (11, b'o wo')
    """

    __slots__ = ("_buffers", "_starts")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = [buffer for buffer in buffers if len(buffer)]
        self._starts = [0, *accumulate(len(buffer) for buffer in self._buffers)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int, scratch: memoryview) -> memoryview:
        """A view of `length` bytes from `start`; copied to `scratch` if several buffers have them.

        Example:
            See `Pieces`.
        """
        if length == 0:
            return scratch[:0]
        index = bisect.bisect_right(self._starts, start) - 1
        if start + length <= self._starts[index + 1]:
            within = start - self._starts[index]
            return self._buffers[index][within : within + length]
        done = 0
        while done < length:
            within = start + done - self._starts[index]
            part = self._buffers[index][within : within + length - done]
            scratch[done : done + len(part)] = part
            done += len(part)
            index += 1
        return scratch[:length]
