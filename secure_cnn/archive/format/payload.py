"""The payload on disk: segments encrypted and decrypted by a few threads, at fixed offsets.

Cipher, hash, read and write all release the interpreter lock on pieces of this size, so threads
scale; each has one ciphertext and one plaintext buffer that it uses again and again. A signature
covers the root of a hash tree over the ciphertext, the tree of RFC 6962.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, final

from secure_cnn.archive.errors import Tampered, Truncated
from secure_cnn.archive.format.stream import HEADER_LENGTH, Floe, Layout
from secure_cnn.archive.format.tensors import Pieces
from secure_cnn.files import write_at

__all__ = [
    "Payload",
    "Plaintext",
    "Progress",
    "Work",
    "encrypt_file",
    "hash_file",
    "leaf_hash",
    "merkle_root",
    "read_at",
    "share_out",
    "wipe",
]

_WIPE_LENGTH = 1 << 20
_WRITE_BACK = 8 << 20
_TOLD_EVERY = 8 << 20

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and in all, every few MiB and at the end, in the caller's thread.

What it raises ends the work as any failure does.
"""

Work: TypeAlias = Callable[[int], None]
_MAX_THREADS = 4


class Plaintext(Protocol):
    """What is encrypted, read in parts by several threads."""

    def read(self, start: int, length: int, scratch: memoryview) -> memoryview:
        """The bytes from `start`; in `scratch` where they are not in one piece elsewhere."""


def encrypt_file(
    fd: int,
    layout: Layout,
    floe: Floe,
    plaintext: Plaintext,
    *,
    hashed: bool,
    progress: Progress | None = None,
) -> list[bytes]:
    """Writes a payload, of a stream made for this file alone; gives the leaf hashes if `hashed`."""
    leaves = [b""] * (layout.segments + 1) if hashed else []
    if hashed:
        leaves[0] = leaf_hash(floe.header)
    write_at(fd, memoryview(floe.header), layout.offset)
    batch = max(1, _WRITE_BACK // layout.segment_length)

    def work(index: int, segment: memoryview, scratch: memoryview) -> None:
        data = plaintext.read(*layout.plaintext(index), scratch)
        offset, length = layout.ciphertext(index)
        floe.encrypt_into(index, layout.is_last(index), data, segment)
        if hashed:
            leaves[index + 1] = leaf_hash(segment[:length])
        write_at(fd, segment[:length], offset)
        if (index + 1) % batch == 0:
            first, _ = layout.ciphertext(index + 1 - batch)
            _begin_write_back(fd, first, offset + length - first)

    _each_segment(layout, range(layout.segments), work, progress)
    return leaves


@final
class Payload:
    """A payload open for reading: whole, or the segments of a range, each checked at every read."""

    __slots__ = ("_fd", "_floe", "_leaves", "layout")

    def __init__(self, fd: int, layout: Layout, floe: Floe, leaves: Sequence[bytes]) -> None:
        self._fd, self.layout, self._floe, self._leaves = fd, layout, floe, leaves

    def on(self, fd: int) -> "Payload":
        """The same payload, read through another file descriptor of the same file."""
        return Payload(fd, self.layout, self._floe, self._leaves)

    def read_into(self, target: memoryview, start: int = 0) -> None:
        """Decrypts a range, of one segment at least; on any failure the whole target is zero."""
        self.scatter_into(Pieces([target]), start)

    def scatter_into(self, targets: Pieces, start: int = 0) -> None:
        """As `read_into`, into several buffers one behind the other."""
        layout, stop = self.layout, start + len(targets)

        def work(index: int, segment: memoryview, plain: memoryview) -> None:
            first, length = layout.plaintext(index)
            low, high = max(first, start), min(first + length, stop)
            wanted = targets.parts(low - start, high - low)
            outs = [plain[: low - first], *wanted, plain[high - first : length]]
            self._decrypt(index, segment, outs)

        try:
            _each_segment(layout, layout.covering(start, stop), work, None)
        except BaseException:
            for buffer in targets.buffers:
                wipe(buffer)
            raise

    def read(self, start: int, length: int, scratch: memoryview) -> memoryview:
        """One segment's plaintext, in `scratch`: what a file of the same layout encrypts."""
        index = self.layout.covering(start, start + length)[0]
        self._decrypt(index, memoryview(bytearray(self.layout.longest)), [scratch[:length]])
        return scratch[:length]

    def copy_to(self, out: int, progress: Progress | None = None) -> None:
        """Decrypts all into a file open for writing, which the caller throws away on failure."""
        self._decrypt_each(lambda first, plain: write_at(out, plain, first), progress)

    def check(self, progress: Progress | None = None) -> None:
        """Decrypts all and keeps nothing."""
        self._decrypt_each(lambda first, plain: None, progress)

    def _decrypt_each(
        self, use: Callable[[int, memoryview], None], progress: Progress | None
    ) -> None:
        """Gives each segment's plaintext, with where it starts, to a function, on a few threads."""

        def work(index: int, segment: memoryview, plain: memoryview) -> None:
            first, length = self.layout.plaintext(index)
            self._decrypt(index, segment, [plain[:length]])
            use(first, plain[:length])

        _each_segment(self.layout, range(self.layout.segments), work, progress)

    def _decrypt(self, index: int, scratch: memoryview, outs: Sequence[memoryview]) -> None:
        """One segment into buffers, after it was found equal to what was signed, if it was."""
        segment = _read_segment(self._fd, self.layout, index, scratch)
        if self._leaves and leaf_hash(segment) != self._leaves[index + 1]:
            raise Tampered(f"segment {index} is not the one that was signed; get the file again")
        self._floe.decrypt_into(index, self.layout.is_last(index), segment, outs)


def hash_file(fd: int, layout: Layout, progress: Progress | None = None) -> list[bytes]:
    """The leaf hashes of header and segments as they are in the file; needs no key."""
    leaves = [b""] * (layout.segments + 1)
    leaves[0] = leaf_hash(read_at(fd, HEADER_LENGTH, layout.offset))

    def start() -> Work:
        segment = memoryview(bytearray(layout.longest))

        def work(index: int) -> None:
            leaves[index + 1] = leaf_hash(_read_segment(fd, layout, index, segment))

        return work

    share_out(range(layout.segments), start, _in_bytes(layout, progress))
    return leaves


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Exactly `length` bytes of a file from `offset`."""
    buffer = bytearray(length)
    _read_into(fd, memoryview(buffer), offset)
    return bytes(buffer)


def wipe(target: memoryview) -> None:
    """Fills a buffer with zeros, a part at a time, so that no second one is needed."""
    zeros = bytes(min(len(target), _WIPE_LENGTH))
    for start in range(0, len(target), _WIPE_LENGTH):
        part = target[start : start + _WIPE_LENGTH]
        part[:] = zeros[: len(part)]


def _each_segment(
    layout: Layout,
    indexes: range,
    work: Callable[[int, memoryview, memoryview], None],
    progress: Progress | None,
) -> None:
    """Does work on segments by their number, on a few threads, each with two buffers of its own."""

    def start() -> Work:
        one, other = (memoryview(bytearray(layout.longest)) for _ in range(2))
        return lambda index: work(index, one, other)

    share_out(indexes, start, _in_bytes(layout, progress))


def _in_bytes(layout: Layout, progress: Progress | None) -> Callable[[int], None] | None:
    """Turns a count of finished segments into progress in bytes, reported every few MiB."""
    if progress is None:
        return None
    last, total = 0, layout.plaintext_length

    def tell(segments: int) -> None:
        nonlocal last
        done = layout.plaintext(segments)[0] if segments < layout.segments else total
        if done - last >= _TOLD_EVERY or done == total > last:
            last = done
            progress(done, total)

    return tell


def _begin_write_back(fd: int, offset: int, length: int) -> None:
    """Lets the disk begin with what was written, so that the sync at the end has little to do."""
    # Linux begins to write what is dirty here; where this does nothing, nothing is lost but time.
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def _read_into(fd: int, target: memoryview, offset: int) -> None:
    while len(target):
        done = os.preadv(fd, [target], offset)
        if done == 0:
            raise Truncated(f"the file ends at byte {offset}; get it again")
        target, offset = target[done:], offset + done


def _read_segment(fd: int, layout: Layout, index: int, scratch: memoryview) -> memoryview:
    offset, length = layout.ciphertext(index)
    segment = scratch[:length]
    _read_into(fd, segment, offset)
    return segment


def leaf_hash(data: bytes | memoryview) -> bytes:
    """SHA-256 over a zero byte and the data: a leaf of the tree."""
    digest = hashlib.sha256(b"\0")
    digest.update(data)
    return digest.digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root over one leaf hash or more: nodes are SHA-256(1, left, right), an odd last moves up.

    The byte before leaves and nodes keeps a node from being taken for a leaf.
    """
    level = list(leaves)
    while len(level) > 1:
        odd = level[len(level) & ~1 :]
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs] + odd
    return level[0]


def share_out(
    indexes: range, start: Callable[[], Work], told: Callable[[int], None] | None = None
) -> None:
    """Does the work of each index, in about this order; whoever is free takes the next one.

    When it returns or raises, no thread is at work any more. After a failure, or an interrupt, no
    index is begun.
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
    for thread in threads:
        if thread.ident is not None:
            thread.join()
