"""Gaussian noise on the grid of pixel levels, so that image plus noise is exact.

In floats, `x + noise` is more than x shifted: the rounding of the sum tells which x it was, and a
classifier that looks at it gets false certificates (Voracek & Hein 2023, arXiv 2207.07209). As they
prescribe, noise here is rounded to whole levels and added to whole levels. For an image on the
grid, rounding the noisy image and rounding the noise are the same thing, so the exact, real-valued
theory of randomised smoothing holds for the classifier behind the rounding.
"""

import math
from decimal import Decimal, localcontext
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.errors import EvaluationError
from defenses.quantities import LARGEST_SIGMA

__all__ = ["LEVELS", "GridNoise"]

LEVELS = 255
_WORD_BITS, _GUIDE_BITS = 64, 16
_REACH = 9.3  # in sigmas; what lies beyond has less than half of the smallest probability of a word
_DIGITS = 45
_SEVERAL = np.iinfo(np.int16).min


@final
class GridNoise:
    """The distribution of N(0, sigma^2) rounded to the nearest k / 255, given as k.

    Sigma, in (0, 10], is the standard deviation before rounding, where the pixels span [0, 1].

    Guarantee: on uniform 64-bit words, every probability P(k <= j) is right to 2^-65, since it is
    computed in exact decimal arithmetic and not in floats. A class because it holds that table.

    Attributes:
        error: How far one number's distribution may be from the exact one, as total variation.
    """

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma <= LARGEST_SIGMA:
            raise EvaluationError(f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {sigma}")
        below = _words_below(Decimal(sigma) * LEVELS)
        self._lowest = -len(below)
        # P(k <= j) = 1 - P(k <= -1 - j): the noise is exactly symmetric.
        thresholds = below + [2**_WORD_BITS - words for words in reversed(below)]
        self._thresholds = np.array(thresholds, dtype=np.uint64)
        self._guide = self._guide_table()
        self.error = (len(thresholds) + 1) * 2.0 ** -(_WORD_BITS + 1)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Independent whole levels, int16, on the CPU; how draws are cut into calls changes none.

        The generator's uniform words are taken for fair coins; only its own state moves.
        """
        words = generator.bit_generator.random_raw(math.prod(shape))
        drawn = self._guide[words >> (_WORD_BITS - _GUIDE_BITS)]
        unsure = np.flatnonzero(drawn == _SEVERAL)
        drawn[unsure] = self._search(words[unsure])
        return torch.from_numpy(drawn).view(shape)

    def _search(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int16]:
        """The smallest j with word / 2^64 < P(k <= j)."""
        found = np.searchsorted(self._thresholds, words, side="right") + self._lowest
        return found.astype(np.int16)

    def _guide_table(self) -> npt.NDArray[np.int16]:
        """By a word's first 16 bits: the number that all such words give, or that they differ."""
        first = np.arange(2**_GUIDE_BITS, dtype=np.uint64) << np.uint64(_WORD_BITS - _GUIDE_BITS)
        last = first + np.uint64(2 ** (_WORD_BITS - _GUIDE_BITS) - 1)
        low, high = self._search(first), self._search(last)
        return np.where(low == high, low, np.int16(_SEVERAL))


def _words_below(scale: Decimal) -> list[int]:
    """2^64 P(k <= j), rounded, for j from the lowest with a word of its own up to -1."""
    reach = math.ceil(Decimal(_REACH) * scale)
    words = [_words_below_level(Decimal(2 * j + 1) / (2 * scale)) for j in range(-reach, 0)]
    return [count for count in words if count > 0]


def _words_below_level(x: Decimal) -> int:
    """2^64 times the standard normal distribution function at x <= 0, rounded.

    By the series 1/2 + phi(x) (x + x^3 / 3 + x^5 / 15 + ...), whose terms all have one sign.
    """
    if x < -_REACH:
        return 0
    with localcontext() as context:
        context.prec = _DIGITS
        total, term, odd = Decimal(0), x, 1
        while abs(term) > Decimal(10) ** -_DIGITS:
            total += term
            odd += 2
            term *= x * x / odd
        density = (-x * x / 2).exp() / (2 * _PI).sqrt()
        words = (Decimal("0.5") + density * total) * 2**_WORD_BITS
        return int(words.to_integral_value())


_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
