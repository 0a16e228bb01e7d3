"""Where the segments of a payload lie in the file: arithmetic only."""

from typing import final

from secure_cnn.archive.format.stream import HEADER_LENGTH, OVERHEAD

__all__ = ["Layout"]


@final
class Layout:
    """Where the segments of a payload lie in the file.

    Example:
        >>> layout = Layout(offset=4096, segment_length=4096, plaintext_length=5000)
        >>> layout.segments, layout.end, layout.plaintext(1)
        (2, 9234, (4064, 936))
    """

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
        """Start and length of a segment's plaintext.

        Example:
            See `Layout`.
        """
        start = index * self._piece
        return start, min(self._piece, self.plaintext_length - start)

    def ciphertext(self, index: int) -> tuple[int, int]:
        """Offset in the file and length of a segment.

        Example:
            >>> Layout(offset=4096, segment_length=4096, plaintext_length=5000).ciphertext(1)
            (8266, 968)
        """
        start = self.offset + HEADER_LENGTH + index * self.segment_length
        return start, self.plaintext(index)[1] + OVERHEAD

    def covering(self, start: int, stop: int) -> range:
        """The segments that hold a range of the plaintext, at least one.

        Example:
            >>> layout = Layout(offset=4096, segment_length=4096, plaintext_length=5000)
            >>> layout.covering(4000, 4065), layout.covering(0, 0)
            (range(0, 2), range(0, 1))
        """
        first = start // self._piece
        return range(first, max(first + 1, -(-stop // self._piece)))

    def is_last(self, index: int) -> bool:
        """Whether this is the last segment.

        Example:
            >>> Layout(offset=4096, segment_length=4096, plaintext_length=0).is_last(0)
            True
        """
        return index == self.segments - 1
