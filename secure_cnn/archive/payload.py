"""The payload on disk: segments encrypted and decrypted by a few threads, at fixed offsets.

Cipher, hash, read and write all release the interpreter lock on pieces of this size, so threads
scale; each has one ciphertext and one plaintext buffer that it uses again and again. Nothing here
knows a header or a tensor.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, final

from secure_cnn.archive.errors import Tampered, Truncated
from secure_cnn.archive.pieces import Pieces
from secure_cnn.archive.signatures import leaf_hash
from secure_cnn.archive.stream import HEADER_LENGTH, OVERHEAD, Floe

__all__ = [
    "Layout",
    "decrypt_file",
    "decrypt_memory",
    "encrypt_file",
    "hash_file",
    "read_at",
    "wipe",
    "write_at",
]

_MAX_THREADS = 4
_WIPE_LENGTH = 1 << 20

_Work: TypeAlias = Callable[[int], None]


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

    def is_last(self, index: int) -> bool:
        """Whether this is the last segment.

        Example:
            >>> Layout(offset=4096, segment_length=4096, plaintext_length=0).is_last(0)
            True
        """
        return index == self.segments - 1


def encrypt_file(
    fd: int, layout: Layout, floe: Floe, plaintext: Pieces, *, hashed: bool
) -> list[bytes]:
    """Writes a whole payload at its offset.

    Args:
        fd: A file open for writing.
        layout: Where the payload goes.
        floe: A stream made by `create_stream` for this file alone.
        plaintext: Exactly `layout.plaintext_length` bytes.
        hashed: Whether to hash what is written.

    Returns:
        The leaf hashes of header and segments in order if `hashed`, else an empty list.

    Raises:
        OSError: Writing failed.

    Example:
        >>> import tempfile
        >>> from secure_cnn.archive.stream import create_stream
        >>> floe = create_stream(bytes(32), b"", 4096)
        >>> layout = Layout(offset=0, segment_length=4096, plaintext_length=5)
        >>> with tempfile.TemporaryFile() as file:
        ...     fd = file.fileno()
        ...     leaves = encrypt_file(fd, layout, floe, Pieces([memoryview(b"hello")]), hashed=True)
        >>> len(leaves), layout.end
        (2, 111)
    """
    leaves = [b""] * (layout.segments + 1) if hashed else []
    if hashed:
        leaves[0] = leaf_hash(floe.header)
    write_at(fd, memoryview(floe.header), layout.offset)

    def start() -> _Work:
        segment = memoryview(bytearray(layout.segment_length))
        scratch = memoryview(bytearray(layout.segment_length))

        def work(index: int) -> None:
            data = plaintext.read(*layout.plaintext(index), scratch)
            offset, length = layout.ciphertext(index)
            floe.encrypt_into(index, layout.is_last(index), data, segment)
            if hashed:
                leaves[index + 1] = leaf_hash(segment[:length])
            write_at(fd, segment[:length], offset)

        return work

    _share_out(layout.segments, start)
    return leaves


def decrypt_memory(
    fd: int, layout: Layout, floe: Floe, leaves: Sequence[bytes], target: memoryview
) -> None:
    """Decrypts a whole payload into memory; on any failure the whole target is zero.

    Args:
        fd: A file open for reading.
        layout: Where the payload lies.
        floe: Its stream, opened.
        leaves: The signed leaf hashes, each compared before its segment is decrypted; empty if
            unsigned.
        target: Exactly `layout.plaintext_length` bytes.

    Raises:
        Tampered: A segment is not what was signed or encrypted.
        Truncated: The file ends too early.

    Example:
        >>> import tempfile
        >>> from secure_cnn.archive.stream import create_stream
        >>> floe = create_stream(bytes(32), b"", 4096)
        >>> layout = Layout(offset=0, segment_length=4096, plaintext_length=5)
        >>> with tempfile.TemporaryFile() as file:
        ...     fd = file.fileno()
        ...     leaves = encrypt_file(fd, layout, floe, Pieces([memoryview(b"hello")]), hashed=True)
        ...     target = bytearray(5)
        ...     decrypt_memory(fd, layout, floe, leaves, memoryview(target))
        >>> bytes(target)
        b'hello'
    """

    def start() -> _Work:
        scratch = memoryview(bytearray(layout.segment_length))

        def work(index: int) -> None:
            segment = _read_segment(fd, layout, leaves, index, scratch)
            begin, length = layout.plaintext(index)
            out = target[begin : begin + length]
            floe.decrypt_into(index, layout.is_last(index), segment, out)

        return work

    try:
        _share_out(layout.segments, start)
    except BaseException:
        wipe(target)
        raise


def decrypt_file(fd: int, layout: Layout, floe: Floe, leaves: Sequence[bytes], out: int) -> None:
    """Decrypts a whole payload into a file, which the caller throws away on failure.

    Args:
        fd: A file open for reading.
        layout: Where the payload lies.
        floe: Its stream, opened.
        leaves: As for `decrypt_memory`.
        out: A file open for writing, written from its start.

    Raises:
        Tampered: A segment is not what was signed or encrypted.
        Truncated: The file ends too early.

    Example:
        >>> import tempfile
        >>> from secure_cnn.archive.stream import create_stream
        >>> floe = create_stream(bytes(32), b"", 4096)
        >>> layout = Layout(offset=0, segment_length=4096, plaintext_length=5)
        >>> with tempfile.TemporaryFile() as file:
        ...     fd = file.fileno()
        ...     leaves = encrypt_file(fd, layout, floe, Pieces([memoryview(b"hello")]), hashed=True)
        ...     with tempfile.TemporaryFile() as out:
        ...         decrypt_file(fd, layout, floe, leaves, out.fileno())
        ...         out.read()
        b'hello'
    """

    def start() -> _Work:
        scratch = memoryview(bytearray(layout.segment_length))
        plain = memoryview(bytearray(layout.segment_length))

        def work(index: int) -> None:
            segment = _read_segment(fd, layout, leaves, index, scratch)
            begin, length = layout.plaintext(index)
            floe.decrypt_into(index, layout.is_last(index), segment, plain[:length])
            write_at(out, plain[:length], begin)

        return work

    _share_out(layout.segments, start)


def hash_file(fd: int, layout: Layout) -> list[bytes]:
    """The leaf hashes of header and segments as they are in the file; needs no key.

    Raises:
        Truncated: The file ends too early.

    Example:
        >>> import tempfile
        >>> from secure_cnn.archive.stream import create_stream
        >>> floe = create_stream(bytes(32), b"", 4096)
        >>> layout = Layout(offset=0, segment_length=4096, plaintext_length=5)
        >>> with tempfile.TemporaryFile() as file:
        ...     fd = file.fileno()
        ...     leaves = encrypt_file(fd, layout, floe, Pieces([memoryview(b"hello")]), hashed=True)
        ...     hash_file(fd, layout) == leaves
        True
    """
    leaves = [b""] * (layout.segments + 1)
    leaves[0] = leaf_hash(read_at(fd, HEADER_LENGTH, layout.offset))

    def start() -> _Work:
        scratch = memoryview(bytearray(layout.segment_length))

        def work(index: int) -> None:
            leaves[index + 1] = leaf_hash(_read_segment(fd, layout, (), index, scratch))

        return work

    _share_out(layout.segments, start)
    return leaves


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Exactly `length` bytes of a file from `offset`.

    Raises:
        Truncated: The file ends too early.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     write_at(file.fileno(), memoryview(b"hello"), 0)
        ...     read_at(file.fileno(), 3, 2)
        b'llo'
    """
    buffer = bytearray(length)
    _read_into(fd, memoryview(buffer), offset)
    return bytes(buffer)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` to a file at `offset`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     write_at(file.fileno(), memoryview(b"hello"), 0)
        ...     file.read()
        b'hello'
    """
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def wipe(target: memoryview) -> None:
    """Fills a buffer with zeros, a part at a time, so that no second one is needed.

    Example:
        >>> secret = bytearray(b"secret")
        >>> wipe(memoryview(secret))
        >>> secret == bytes(6)
        True
    """
    zeros = bytes(min(len(target), _WIPE_LENGTH))
    for start in range(0, len(target), _WIPE_LENGTH):
        part = target[start : start + _WIPE_LENGTH]
        part[:] = zeros[: len(part)]


def _read_into(fd: int, target: memoryview, offset: int) -> None:
    """Fills a buffer from a file."""
    while len(target):
        done = os.preadv(fd, [target], offset)
        if done == 0:
            raise Truncated(f"the file ends at byte {offset}; get it again")
        target, offset = target[done:], offset + done


def _read_segment(
    fd: int, layout: Layout, leaves: Sequence[bytes], index: int, scratch: memoryview
) -> memoryview:
    """A segment in `scratch`, equal to what was signed if leaves are given."""
    offset, length = layout.ciphertext(index)
    segment = scratch[:length]
    _read_into(fd, segment, offset)
    if leaves and leaf_hash(segment) != leaves[index + 1]:
        raise Tampered(f"segment {index} is not the one that was signed; get the file again")
    return segment


def _share_out(count: int, start: Callable[[], _Work]) -> None:
    """Does work 0 … count-1 on a few threads, each with its own `start()`, until one fails."""
    threads = min(_MAX_THREADS, count, len(os.sched_getaffinity(0)))
    stop = threading.Event()

    def run(first: int) -> None:
        try:
            work = start()
            for index in range(first, count, threads):
                if stop.is_set():
                    return
                work(index)
        except BaseException:
            stop.set()
            raise

    if threads == 1:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(run, first) for first in range(threads)]
        try:
            for future in running:
                future.result()
        finally:
            stop.set()
