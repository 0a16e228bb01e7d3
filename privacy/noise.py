"""Cryptographic randomness: a key stream as uniform bits, as coins and as Gaussian noise.

AES-256 in counter mode out of `cryptography`, keyed from the operating system. It shares nothing
with torch's, numpy's or Python's generators, so no `manual_seed` and no attack library can move it.
Keys are never stored, printed or saved.
"""

import math
import os
from collections.abc import Iterator

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

__all__ = ["SecureGenerator"]

_KEY_BYTES = 32
_BLOCK_BYTES = 16
_MANTISSA_BITS = 53
_HALF_A_CELL = torch.tensor(2.0 ** -(_MANTISSA_BITS + 1), dtype=torch.float64)
_LEAST_RADIUS = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
_BLOCK = 2**17
"""Numbers made at a time, so that every pass over them stays in the cache. Draws of a multiple of
it give the same numbers however they are cut."""
_ZEROS = memoryview(bytes(8 * _BLOCK))


class SecureGenerator:
    """An unpredictable stream of random numbers, as a class because it owns a cipher's position.

    Guarantee: the bits are the AES-256-CTR key stream of a fresh random key (NIST SP 800-38A). A
    forked process gets a fresh key on first use, so that parent and child never share noise.

    Args:
        key: 32 bytes that fix the stream, for tests only; fresh from the operating system by
            default.

    Raises:
        ValueError: The key does not have 32 bytes.

    Example:
        >>> generator = SecureGenerator()
        >>> generator.normal(4).dtype
        torch.float64
        >>> generator
        SecureGenerator()
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != _KEY_BYTES:
            raise ValueError(f"key: expected {_KEY_BYTES} bytes, got {len(key)}")
        self._rekey(os.urandom(_KEY_BYTES) if key is None else key)

    def __repr__(self) -> str:
        return "SecureGenerator()"

    def __reduce__(self) -> str:
        raise TypeError("a SecureGenerator cannot be copied or saved: its noise would repeat")

    def words(self, count: int) -> torch.Tensor:
        """Uniform 64-bit words.

        Args:
            count: How many, at least 0.

        Returns:
            An int64 tensor [count], uniform over all 2^64 values.

        Example:
            >>> SecureGenerator().words(3).shape
            torch.Size([3])
        """
        if os.getpid() != self._process:
            self._rekey(os.urandom(_KEY_BYTES))
        # The cipher wants room for a block more than it writes.
        words = torch.empty(count + _BLOCK_BYTES // 8, dtype=torch.int64)
        size, room = 8 * count, words.numpy().data.cast("B")
        # The key stream itself is the encryption of zeros.
        for start in range(0, size, len(_ZEROS)):
            self._cipher.update_into(_ZEROS[: size - start], room[start:])
        return words[:count]

    def uniform(self, count: int) -> torch.Tensor:
        """Uniform numbers in the open interval (0, 1), on a grid of 2^-53 shifted by half a cell.

        Returns:
            A float64 tensor [count].

        Example:
            >>> u = SecureGenerator().uniform(1000)
            >>> bool(((u > 0) & (u < 1)).all())
            True
        """
        # The last cell's centre rounds up to 1; the largest double below 1 keeps the interval open.
        return self._centres(count).clamp_(max=1 - 2.0**-_MANTISSA_BITS)

    def normal(self, count: int) -> torch.Tensor:
        """Standard normal numbers, with tails to 8.5 sigma.

        By the transform of Box and Muller (1958) of 53-bit uniforms, in float64.

        Returns:
            A float64 tensor [count].

        Example:
            >>> SecureGenerator().normal(5).shape
            torch.Size([5])
        """
        normals = torch.empty(count + count % 2, dtype=torch.float64)
        for block in torch.split(normals, _BLOCK):
            uniforms, pairs = self._centres(len(block)), len(block) // 2
            logarithm, angle = uniforms[:pairs].log_(), uniforms[pairs:].mul_(2 * math.pi)
            squared = torch.sub(_LEAST_RADIUS, logarithm, alpha=2, out=logarithm)
            # Of a number above zero this is the root, at half the price of `sqrt`.
            radius = torch.rsqrt(squared, out=block[pairs:]).mul_(squared)
            torch.cos(angle, out=block[:pairs]).mul_(radius)
            radius.mul_(angle.sin_())
        return normals[:count]

    def normal_blocks(self, count: int) -> Iterator[torch.Tensor]:
        """The same as `normal`, a piece at a time, so that what uses them finds them in the cache.

        Returns:
            An iterator over float64 tensors of at most 131,072 numbers, `count` together.

        Example:
            >>> [len(block) for block in SecureGenerator().normal_blocks(140_000)]
            [131072, 8928]
        """
        for start in range(0, count, _BLOCK):
            yield self.normal(min(_BLOCK, count - start))

    def bernoulli(self, count: int, probability: float) -> torch.Tensor:
        """Independent coins: the Poisson sample of `count` examples.

        Args:
            count: How many coins.
            probability: Chance of True, in [0, 1], exact to 2^-53.

        Returns:
            A bool tensor [count].

        Example:
            >>> SecureGenerator().bernoulli(3, 1.0)
            tensor([True, True, True])
        """
        return self.uniform(count) < probability

    def _centres(self, count: int) -> torch.Tensor:
        """Uniform numbers as the centres of 2^53 cells, float64 in (0, 1]."""
        words = self.words(count).bitwise_and_(2**_MANTISSA_BITS - 1)
        # Each number takes its word's own place: fresh memory costs more than the numbers.
        cells = words.view(torch.float64).copy_(words)
        return torch.add(_HALF_A_CELL, cells, alpha=2.0**-_MANTISSA_BITS, out=cells)

    def _rekey(self, key: bytes) -> None:
        """Starts the key stream of `key` for this process."""
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES)))
        self._cipher: CipherContext = cipher.encryptor()
        self._process = os.getpid()
