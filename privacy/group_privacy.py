"""What steps that protect one example cost a person who has several of them.

Of k examples a Poisson sample holds J, a binomial number, and together they move the sum by J
clipping norms at most. So a step's worst case is a mixture of Gaussians with means J (Choquette-
Choo et al. 2023, arXiv 2310.15526; Charles et al. 2024, arXiv 2407.07737), bounded here by its
Rényi divergences, in both directions (Mironov 2017, arXiv 1702.07476). Of few examples and little
epsilon the lemma that knows nothing of the steps says more: k times epsilon, at a delta that grows
exponentially (Dwork and Roth 2014, section 2.3). The smaller bound is given. Where every example
is in every step the group is one example with k times the clipping norm, and the bound exact.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from privacy.accounting import GaussianSteps, checked_events, epsilon_of, epsilons_of
from privacy.validate import probability, whole

__all__ = ["group_epsilon"]

_Numbers = NDArray[np.float64]

_ORDERS = (*(1 + x / 100 for x in (1, 2, 3, 5, 7)), *(1 + x / 10 for x in range(1, 100)))
_ORDERS += tuple(float(order) for order in range(12, 64))
_LEFT_OUT = 2.0**-10
"""Part of delta that pays for samples which hold more of the group than is looked at."""
_TAIL = 12.0
"""Deviations beyond the outermost peak at which an integral ends: exp(-72) of the peak."""
_CELLS = 4
"""Cells of an integral in a deviation: sums of smooth functions converge exponentially."""
_SHARES = tuple(2.0 ** (-j / 2) for j in range(1, 41))
"""Of delta: which are tried for one example of a group."""
_LARGEST = 500.0
"""Above it e^epsilon is no number of any use."""


def group_epsilon(events: Sequence[GaussianSteps], delta: float, *, size: int) -> float:
    """Bounds the epsilon of everything in `events` for a group of `size` examples at once.

    Guarantee: the training that took exactly these steps is (epsilon, delta)-differentially private
    with respect to adding or removing up to `size` examples together, such as all images of one
    person, given that every example was Poisson-sampled by a coin of its own.

    Args:
        events: The steps taken, in any order; their unit is an example.
        delta: Failure probability, in (0, 1).
        size: How many examples the largest group has, at least 1.

    Returns:
        An upper bound, at least 0; 0 where nothing was taken, `inf` where a step carried no noise.

    Raises:
        PlanError: A value is out of range, or `events` are none.

    Example:
        >>> steps = GaussianSteps(noise_multiplier=2.0, sampling_rate=0.01, steps=1000)
        >>> [round(group_epsilon([steps], 1e-5, size=size), 1) for size in (1, 10)]
        [0.6, 9.1]
    """
    delta, size = probability("delta", delta), whole("size", size)
    taken = [event for event in checked_events(events) if event.steps > 0]
    if size == 1 or not taken or any(event.noise_multiplier == 0 for event in taken):
        return epsilon_of(events, delta)
    if all(event.sampling_rate == 1 for event in taken):
        # All of them are in every step: together they are one who moves the sum as far as that.
        return epsilon_of(
            [replace(each, noise_multiplier=each.noise_multiplier / size) for each in taken], delta
        )
    steps = sum(event.steps for event in taken)
    mixtures = [_Mixture(event, size, left_out=_LEFT_OUT * delta / steps) for event in taken]

    def bound(order: float) -> float:
        with_them = sum(mixture.added(order) for mixture in mixtures)
        without = sum(mixture.removed(order) for mixture in mixtures)
        return max(
            with_them + _beyond(order, delta * (1 - _LEFT_OUT)), without + _beyond(order, delta)
        )

    best = _least(bound, _ORDERS)
    return max(0.0, min(best, _of_any_steps(taken, delta, size=size, below=best)))


def _least(bound: Callable[[float], float], orders: Sequence[float]) -> float:
    """The least of bounds that fall with the order and then rise, of which any holds."""
    bound = functools.cache(bound)
    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        if bound(orders[middle]) <= bound(orders[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return bound(orders[low])


def _of_any_steps(
    events: Sequence[GaussianSteps], delta: float, *, size: int, below: float
) -> float:
    """The lemma: neighbours one after the other, e^(j epsilon) of a share of delta each.

    Infinite where it would not come below the bound that is known.
    """
    if size * epsilon_of(events, delta) >= min(below, _LARGEST):
        return math.inf
    for share, each in _of_shares(tuple(events), delta):
        if size * each >= min(below, _LARGEST):
            break
        shares = math.expm1(size * each) / math.expm1(each) if each > 0 else size
        if share * shares <= delta:
            return size * each
    return math.inf


@functools.lru_cache(maxsize=64)
def _of_shares(events: tuple[GaussianSteps, ...], delta: float) -> list[tuple[float, float]]:
    """What one example costs at each share of delta; the steps are composed once for all groups."""
    shares = [delta * share for share in _SHARES]
    return list(zip(shares, epsilons_of(events, shares), strict=True))


def _beyond(order: float, delta: float) -> float:
    """What turns a Rényi divergence into epsilon (Canonne, Kamath, Steinke 2020, 2004.00010)."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


class _Mixture:
    """One kind of step as a pair of a mixture and a Gaussian; a class: two integrals share it.

    Numbers of examples above `most` are left out: they come with a probability of at most
    `left_out`.
    """

    def __init__(self, event: GaussianSteps, size: int, *, left_out: float) -> None:
        self._steps, self._variance = event.steps, event.noise_multiplier**2
        held = stats.binom(size, event.sampling_rate)
        self._most = min(size, int(held.isf(left_out)))
        self._lost = float(held.sf(self._most))
        weights = np.asarray(held.logpmf(np.arange(self._most + 1)), dtype=np.float64)
        self._counts = np.flatnonzero(np.isfinite(weights)).astype(np.float64)
        self._weights = weights[np.isfinite(weights)] - special.logsumexp(weights)

    def added(self, order: float) -> float:
        """Rényi divergence of all steps with the group from those without it."""
        return self._steps * self._log_moment(order, 0, order * self._most) / (order - 1)

    def removed(self, order: float) -> float:
        """The same of those without from those with it; what was left out adds its own."""
        lowest = (1 - order) * self._most
        moment = self._log_moment(1 - order, lowest, 0) / (order - 1)
        return self._steps * (moment - math.log1p(-self._lost))

    def _log_moment(self, power: float, first: float, last: float) -> float:
        """Logarithm of E[(mixture / Gaussian)^power] under the Gaussian, by the trapezoidal rule.

        The integrand has its peaks from `first` to `last`, and falls off as the Gaussian does
        beyond them. Its poles lie pi * variance away from the real line, hence the cells.
        """
        deviation = math.sqrt(self._variance)
        cell = min(deviation, self._variance) / _CELLS
        cells = math.ceil((last - first + 2 * _TAIL * deviation) / cell)
        total = -math.inf
        for block in np.array_split(np.arange(cells + 1), 1 + cells // 2**14):
            x = np.asarray(first - _TAIL * deviation + cell * block, dtype=np.float64)
            values = power * self._log_ratio(x) - x**2 / (2 * self._variance)
            total = np.logaddexp(total, special.logsumexp(values))
        return float(total) + math.log(cell) - math.log(2 * math.pi * self._variance) / 2

    def _log_ratio(self, x: _Numbers) -> _Numbers:
        """Logarithm of the mixture's density over the Gaussian's."""
        exponents = self._counts * (2 * x[:, None] - self._counts) / (2 * self._variance)
        found: _Numbers = special.logsumexp(exponents + self._weights, axis=1)
        return found
