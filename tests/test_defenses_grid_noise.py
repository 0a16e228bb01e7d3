"""Rounded Gaussian noise: its table against exact arithmetic, its draws by chi-square."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from defenses.errors import EvaluationError
from defenses.smoothing.certification import GridNoise

SIGMAS = [0.001, 0.05, 0.25, 1.0]
NOISES = {sigma: GridNoise(sigma) for sigma in (0.02, 0.25)}


class Words:
    """A generator whose next words are given."""

    def __init__(self, words):
        self.bit_generator, self._words = self, np.array(words, dtype=np.uint64)

    def random_raw(self, count):
        return self._words[:count]


def number(noise, word):
    """The number that one word becomes."""
    return int(noise.draw(Words([word]), (1,)))


def first_word(noise, level):
    """The smallest word that becomes at least `level`, by bisection."""
    low, high = 0, 2**64 - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if number(noise, middle) >= level else (middle + 1, high)
    return low


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_probability_is_right_to_half_a_word(sigma):
    """Against a normal distribution of 50 digits, from the middle to the last word."""
    mpmath = pytest.importorskip("mpmath")
    noise, reach = GridNoise(sigma), number(GridNoise(sigma), 2**64 - 1)
    assert number(noise, 0) == -reach
    with mpmath.workdps(50):
        for level in {-reach + 1, -reach // 2, 0, 1, reach // 3, reach}:
            edge = (mpmath.mpf(2 * level - 1) / 2) / (255 * mpmath.mpf(sigma))
            exact = mpmath.ncdf(edge) * 2**64
            assert abs(first_word(noise, level) - exact) <= 0.5 + 1e-9
        # Nothing beyond the last number is worth a word.
        assert mpmath.ncdf(-(reach + mpmath.mpf(1) / 2) / (255 * mpmath.mpf(sigma))) * 2**64 <= 0.5


@pytest.mark.parametrize("sigma", [0.01, 0.25])
def test_draws_follow_the_distribution(sigma):
    """Chi-square over all numbers that are expected often enough; a shifted table is rejected."""
    drawn = GridNoise(sigma).draw(np.random.default_rng(5), (4_000_000,)).numpy().astype(int)
    reach = int(3 * 255 * sigma)
    edges = (np.arange(-reach, reach + 2) - 0.5) / (255 * sigma)
    edges[0], edges[-1] = -np.inf, np.inf
    expected = np.diff(special.ndtr(edges)) * len(drawn)
    seen = np.bincount(drawn.clip(-reach, reach) + reach, minlength=2 * reach + 1)
    assert stats.chisquare(seen, expected).pvalue > 1e-3
    shifted = np.bincount((drawn + 1).clip(-reach, reach) + reach, minlength=2 * reach + 1)
    assert stats.chisquare(shifted, expected).pvalue < 1e-9


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from(sorted(NOISES)))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_numbers_rise_with_their_words_and_are_symmetric(one, other, sigma):
    """The guide table gives what the search gives, everywhere."""
    noise, (low, high) = NOISES[sigma], sorted((one, other))
    assert number(noise, low) <= number(noise, high)
    assert number(noise, 2**64 - 1 - low) == -number(noise, low)
    words = np.array([low], dtype=np.uint64)
    assert number(noise, low) == noise._search(words)[0]


def test_draws_are_independent_of_how_they_are_cut():
    """And of every generator but their own."""
    noise = GridNoise(0.25)
    whole = noise.draw(np.random.default_rng(3), (7, 2, 3))
    before, generator = torch.get_rng_state(), np.random.default_rng(3)
    parts = [noise.draw(generator, (n, 2, 3)) for n in (1, 4, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.get_rng_state(), before)


def test_levels_and_the_largest_noise_fit_sixteen_bits():
    """At the largest sigma that is allowed."""
    assert number(GridNoise(10), 2**64 - 1) + 255 < 2**15


@pytest.mark.parametrize("sigma", [0.0, -1.0, 10.5, float("nan"), float("inf")])
def test_another_sigma_is_refused(sigma):
    """Before a table is made."""
    with pytest.raises(EvaluationError, match="sigma"):
        GridNoise(sigma)
