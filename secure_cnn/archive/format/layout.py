"""Where the segments of a payload lie in the file: arithmetic only."""

from typing import final

from secure_cnn.archive.format.stream import HEADER_LENGTH, OVERHEAD

__all__ = ["Layout"]


@final
class Layout:
    """Where the segments of a payload lie in the file."""

    __slots__ = ("_piece", "offset", "plaintext_length", "segment_length", "segments")

    def __init__(self, *, offset: int, segment_length: int, plaintext_length: int) -> None:
        self.offset, self.segment_length = offset, segment_length
        self.plaintext_length = plaintext_length
        self._piece = segment_length - OVERHEAD
        self.segments = max(1, -(-plaintext_length // self._piece))

    @property
    def longest(self) -> int:
        """Bytes of the longest segment there is."""
        return min(self.segment_length, self.plaintext_length + OVERHEAD)

    @property
    def end(self) -> int:
        """The offset behind the last segment."""
        return self.offset + HEADER_LENGTH + self.plaintext_length + self.segments * OVERHEAD

    def plaintext(self, index: int) -> tuple[int, int]:
        """Start and length of a segment's plaintext."""
        start = index * self._piece
        return start, min(self._piece, self.plaintext_length - start)

    def ciphertext(self, index: int) -> tuple[int, int]:
        """Offset in the file and length of a segment."""
        start = self.offset + HEADER_LENGTH + index * self.segment_length
        return start, self.plaintext(index)[1] + OVERHEAD

    def covering(self, start: int, stop: int) -> range:
        """The segments that hold a range of the plaintext, at least one."""
        first = start // self._piece
        return range(first, max(first + 1, -(-stop // self._piece)))

    def is_last(self, index: int) -> bool:
        """Whether this is the last segment."""
        return index == self.segments - 1
