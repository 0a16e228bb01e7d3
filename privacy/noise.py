"""Cryptographic randomness: a key stream as uniform bits, as coins and as Gaussian noise.

AES-256 in counter mode out of `cryptography`, keyed from the operating system. It shares nothing
with torch's, numpy's or Python's generators, so no `manual_seed` and no attack library can move it.
Keys are never stored, printed or saved.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from weakref import WeakSet

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from privacy.errors import PlanError
from privacy.native import call, compiled
from privacy.validate import real, whole

__all__ = ["SecureGenerator"]

_KEY_BYTES = 32
_BLOCK_BYTES = 16
_WORDS = _BLOCK_BYTES // 8
_MANTISSA_BITS = 53
_HALF_A_CELL = torch.tensor(2.0 ** -(_MANTISSA_BITS + 1), dtype=torch.float64)
_LEAST_RADIUS = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
_BLOCK = 2**17
"""Numbers made at a time, so that every pass over them stays in the cache. Draws of a multiple of
it give the same numbers however they are cut."""
_ZEROS = memoryview(bytes(8 * _BLOCK))
_living: "WeakSet[SecureGenerator]" = WeakSet()


class SecureGenerator:
    """An unpredictable stream of random numbers, as a class because it owns the place in it.

    Guarantee: the bits are the AES-256-CTR key stream of a fresh random key (NIST SP 800-38A). A
    forked process, such as one that reads a data set, gets a fresh key before anything else runs
    in it, and has its parent's no more: parent and child never share noise.

    Args:
        key: 32 bytes that fix the stream, for tests only; fresh from the operating system by
            default.

    Raises:
        PlanError: The key does not have 32 bytes.

    Example:
        >>> generator = SecureGenerator()
        >>> generator.normal(4).dtype
        torch.float64
        >>> generator
        SecureGenerator()
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and not isinstance(key, bytes):
            raise PlanError(f"key: expected {_KEY_BYTES} bytes, got {type(key).__name__}")
        if key is not None and len(key) != _KEY_BYTES:
            raise PlanError(f"key: expected {_KEY_BYTES} bytes, got {len(key)}")
        self._place, self._taking = 0, Lock()
        self._rekey(os.urandom(_KEY_BYTES) if key is None else key)
        _living.add(self)

    def __repr__(self) -> str:
        return "SecureGenerator()"

    def __reduce__(self) -> str:
        raise TypeError("a SecureGenerator cannot be copied or saved: its noise would repeat")

    def words(self, count: int) -> Tensor:
        """Words uniform over all 2^64 values, int64 [count]."""
        return self._words(self._take(count), count, _buffer(count))

    def uniform(self, count: int) -> Tensor:
        """Uniform float64 in the open (0, 1), on a grid of 2^-53 shifted by half a cell."""
        # The last cell's centre rounds up to 1; the largest double below 1 keeps the interval open.
        return _centres(self.words(count)).clamp_(max=1 - 2.0**-_MANTISSA_BITS)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers, float64 [count], with tails to 8.5 sigma.

        By the transform of Box and Muller (1958) of 53-bit uniforms.
        """
        return torch.cat([torch.empty(0, dtype=torch.float64), *self.normal_blocks(count)])

    def normal_blocks(self, count: int) -> Iterator[Tensor]:
        """The numbers of `normal`, at most 131,072 at a time: so they are used from the cache."""
        for part, place in self._parts(count):
            size = part.stop - part.start
            yield _normal(self._words(place, size + size % 2, _buffer(size + 1)))[:size]

    def perturb(self, values: list[Tensor], *, deviation: float, scale: float = 1.0) -> None:
        """Puts (values + deviation * z) * scale in the place of the values.

        The z are the numbers of `normal`, one for each value. All is done in float64 and rounded
        once, to the type of the values: float tensors of one type, on one device, each dense in
        memory. With compiled functions each of torch's threads makes the noise of its own parts of
        the stream.
        """
        numbers = [_in_memory_order(tensor) for tensor in values]
        parts = list(self._parts(sum(map(len, numbers))))
        fused = compiled() is not None and all(map(_is_plain, numbers))

        def add(parts: list[tuple[slice, int]], threads: int) -> None:
            longest = max((part.stop - part.start for part, _ in parts), default=0)
            buffer = _buffer(longest + longest % 2)
            for part, place in parts:
                size = part.stop - part.start
                words = self._words(place, size + size % 2, buffer)
                pieces = _cut(numbers, part)
                if fused:
                    _fused(words, pieces, deviation, scale, threads=threads)
                else:
                    _add(_normal(words)[:size], pieces, deviation, scale)

        threads = torch.get_num_threads()
        # The cipher works with one thread. Several for parts of their own pay for many parts only:
        # they meet torch's threads, which wait for work without sleeping.
        streams = min(threads, len(parts) // 8) if fused else 1
        if streams < 2:
            add(parts, threads)
            return
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(lambda some: add(some, 1), [parts[i::streams] for i in range(streams)]))

    def bernoulli(self, count: int, probability: float) -> Tensor:
        """Independent coins, bool [count], each True with a probability that is exact to 2^-53."""
        chance = real("probability", probability)
        if not 0 <= chance <= 1:
            raise PlanError(f"probability: expected a number in [0, 1], got {chance}")
        return self.uniform(count) < chance

    def _parts(self, count: int) -> Iterator[tuple[slice, int]]:
        """The blocks of `count` normal numbers, each with its place in the stream."""
        count = whole("count", count, least=0)
        place = self._take(count + count % 2)
        for start in range(0, count, _BLOCK):
            yield slice(start, min(start + _BLOCK, count)), place + start

    def _take(self, count: int) -> int:
        """The place of the next words; no other call gets the same, not even in another thread."""
        # Fewer than none would take the place back, and the same noise would come again.
        count = whole("count", count, least=0)
        with self._taking:
            self._place += count
            return self._place - count

    def _words(self, place: int, count: int, buffer: Tensor) -> Tensor:
        """Words from a place that was taken."""
        if os.getpid() != self._process:
            self._rekey(os.urandom(_KEY_BYTES))
        return self._stream(place, count, buffer)

    def _rekey(self, key: bytes) -> None:
        """Lets the key stream of `key` go on from the same place in this process."""
        self._stream, self._process = _key_stream(key), os.getpid()

    def _part(self) -> None:
        """In a forked process: another key, and no lock that a thread of the parent may hold."""
        self._taking = Lock()
        self._rekey(os.urandom(_KEY_BYTES))


def _part_from_parent() -> None:
    for generator in list(_living):
        generator._part()


os.register_at_fork(after_in_child=_part_from_parent)


def _buffer(count: int) -> Tensor:
    """Memory for `count` words, and for the rest of the cipher's block at either end."""
    return torch.empty(count + 2 * _WORDS, dtype=torch.int64)


def _key_stream(key: bytes) -> Callable[[int, int, Tensor], Tensor]:
    """A function that writes words of a key's stream to a buffer; only its closure has the key."""

    def words(place: int, count: int, buffer: Tensor) -> Tensor:
        counter, skipped = divmod(place, _WORDS)
        cipher = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(_BLOCK_BYTES, "big")))
        encryptor = cipher.encryptor()
        size, written = 8 * (skipped + count), buffer.numpy().data.cast("B")
        # The key stream itself is the encryption of zeros.
        for start in range(0, size, len(_ZEROS)):
            encryptor.update_into(_ZEROS[: size - start], written[start:])
        return buffer[skipped : skipped + count]

    return words


def _centres(words: Tensor) -> Tensor:
    """Uniform numbers as the centres of 2^53 cells, float64 in (0, 1], in the place of words."""
    words.bitwise_and_(2**_MANTISSA_BITS - 1)
    # Each number takes its word's own place: fresh memory costs more than the numbers.
    cells = words.view(torch.float64).copy_(words)
    return torch.add(_HALF_A_CELL, cells, alpha=2.0**-_MANTISSA_BITS, out=cells)


def _normal(words: Tensor) -> Tensor:
    """Normal numbers of an even number of words, in their place."""
    if compiled() is not None:
        _fused(words, [], 0.0, 0.0, threads=torch.get_num_threads())
        return words.view(torch.float64)
    pairs, normals = len(words) // 2, _centres(words)
    logarithm, angle = normals[:pairs].log_(), normals[pairs:].mul_(2 * math.pi)
    squared = torch.sub(_LEAST_RADIUS, logarithm, alpha=2, out=logarithm)
    # Of a number above zero this is the root, at half the price of `sqrt`.
    radius, sine = squared.rsqrt().mul_(squared), angle.sin()
    torch.mul(radius, angle.cos_(), out=normals[:pairs])
    torch.mul(radius, sine, out=normals[pairs:])
    return normals


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor in one dimension, in the order of memory: a view."""
    strides, sizes = tensor.stride(), tensor.shape
    outer_first = sorted(range(tensor.dim()), key=lambda d: (strides[d], sizes[d]), reverse=True)
    dense = tensor.permute(outer_first)
    assert dense.is_contiguous(), f"sizes {[*sizes]} with strides {[*strides]}"
    return dense.view(-1)


def _is_plain(values: Tensor) -> bool:
    """Whether a compiled function may write them: a tensor may lie at any address."""
    aligned = values.data_ptr() % values.element_size() == 0
    return values.is_cpu and values.dtype == torch.float32 and aligned


def _cut(values: list[Tensor], part: slice) -> list[Tensor]:
    """What lies in a part of all the values together, views of one dimension."""
    found, first = [], 0
    for of_tensor in values:
        last = first + of_tensor.shape[0]
        if first < part.stop and part.start < last:
            found.append(of_tensor[max(part.start - first, 0) : part.stop - first])
        first = last
    return found


def _add(noise: Tensor, pieces: list[Tensor], deviation: float, scale: float) -> None:
    """What `SecureGenerator.perturb` does, with noise for all pieces together."""
    for piece, of_piece in zip(pieces, torch.split(noise, [*map(len, pieces)]), strict=True):
        moved = of_piece.to(piece.device).mul_(deviation).add_(piece)
        piece.copy_(moved.mul_(scale))


def _fused(
    words: Tensor, pieces: list[Tensor], deviation: float, scale: float, *, threads: int
) -> None:
    """`_normal` and `_add` in one pass, compiled."""
    work = _Work(
        pairs=len(words) // 2,
        numbers=words.data_ptr(),
        pieces=len(pieces),
        lengths=(ctypes.c_long * len(pieces))(*map(len, pieces)),
        values=(ctypes.c_void_p * len(pieces))(*(piece.data_ptr() for piece in pieces)),
        deviation=deviation,
        scale=scale,
    )
    call("normal_numbers", work, threads=threads)


class _Work(ctypes.Structure):
    """As privacy/native/noise.c declares it."""

    _fields_ = (
        ("pairs", ctypes.c_long),
        ("numbers", ctypes.c_void_p),
        ("next", ctypes.c_long),
        ("pieces", ctypes.c_long),
        ("lengths", ctypes.POINTER(ctypes.c_long)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("deviation", ctypes.c_double),
        ("scale", ctypes.c_double),
    )
