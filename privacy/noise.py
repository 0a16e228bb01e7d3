"""Cryptographic randomness: a key stream as uniform bits, as coins and as Gaussian noise.

AES-256 in counter mode out of `cryptography`, keyed from the operating system. It shares nothing
with torch's, numpy's or Python's generators, so no `manual_seed` and no attack library can move it.
Keys are never stored, printed or saved.
"""

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

__all__ = ["SecureGenerator"]

_KEY_BYTES = 32
_BLOCK_BYTES = 16
_MANTISSA_BITS = 53


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
        size = 8 * count
        stream = bytearray(size + _BLOCK_BYTES - 1)
        # The key stream itself is the encryption of zeros.
        self._cipher.update_into(bytes(size), stream)
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(stream, dtype=torch.int64, count=count)

    def uniform(self, count: int) -> torch.Tensor:
        """Uniform numbers in the open interval (0, 1), on a grid of 2^-53 shifted by half a cell.

        Returns:
            A float64 tensor [count].

        Example:
            >>> u = SecureGenerator().uniform(1000)
            >>> bool(((u > 0) & (u < 1)).all())
            True
        """
        words = self.words(count)
        # The shift drags the sign along; the mask takes it off again.
        words.bitwise_right_shift_(64 - _MANTISSA_BITS).bitwise_and_(2**_MANTISSA_BITS - 1)
        centres = words.to(torch.float64).add_(0.5).mul_(2.0**-_MANTISSA_BITS)
        # The last cell's centre rounds up to 1; the largest double below 1 keeps the interval open.
        return centres.clamp_(max=1 - 2.0**-_MANTISSA_BITS)

    def normal(self, count: int) -> torch.Tensor:
        """Standard normal numbers, with tails to 8.5 sigma.

        By the transform of Box and Muller (1958) of 53-bit uniforms, in float64.

        Returns:
            A float64 tensor [count].

        Example:
            >>> SecureGenerator().normal(5).shape
            torch.Size([5])
        """
        pairs = (count + 1) // 2
        uniforms = self.uniform(2 * pairs)
        radius = uniforms[:pairs].log_().mul_(-2).sqrt_()
        angle = uniforms[pairs:].mul_(2 * math.pi)
        return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)])[:count]

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

    def _rekey(self, key: bytes) -> None:
        """Starts the key stream of `key` for this process."""
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES)))
        self._cipher: CipherContext = cipher.encryptor()
        self._process = os.getpid()
