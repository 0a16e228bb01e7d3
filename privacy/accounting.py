"""What Poisson-sampled Gaussian steps have cost: epsilon, and the noise for a wanted epsilon.

Steps on all examples have a closed form. Else the accountants are Opacus': PRV wherever it can
serve, RDP where it cannot. What neither can bound raises, and steps without noise cost `inf`. Other
batches than Poisson samples have no account here.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from privacy import _opacus
from privacy.errors import AccountingError, PlanError
from privacy.statistics import gdp_epsilon
from privacy.validate import positive, probability, real, shown, whole

__all__ = ["GaussianSteps", "Unit", "checked_events", "checked_unit"]
__all__ += ["epsilon_of", "epsilons_of", "noise_multiplier_for"]

Unit = Literal["example", "person"]
"""Of what one more or one less makes a neighbouring data set."""

_LARGEST_NOISE_MULTIPLIER = 1e4
_PRECISION = 1e-3
_FAILS = (ValueError, RuntimeError, RuntimeWarning, ArithmeticError, MemoryError)
_ROOT_ERROR = 1e-9
"""Added to a root, which may lie on either side of what it is searched for."""
_LARGEST_PRV_EPSILON = 30.0
"""Above it RDP serves alone: there PRV gains nothing that matters, and its grid takes gigabytes."""


@dataclass(frozen=True, kw_only=True)
class GaussianSteps:
    """Steps of the Poisson-sampled Gaussian mechanism, under adding or removing one unit.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm; 0 means no
            privacy.
        sampling_rate: Probability with which each unit is in a step, in (0, 1].
        steps: How many steps, at least 0.
        unit: What is sampled, clipped and protected as one: an `example`, or a `person` with all
            examples that are theirs.

    Example:
        >>> GaussianSteps(noise_multiplier=1.0, sampling_rate=0.01, steps=100).steps
        100
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    unit: Unit = "example"

    def __post_init__(self) -> None:
        checked_unit(self.unit)
        if not real("noise_multiplier", self.noise_multiplier) >= 0:
            raise PlanError(
                f"noise_multiplier: expected a finite number >= 0, got {self.noise_multiplier}"
            )
        if not 0 < real("sampling_rate", self.sampling_rate) <= 1:
            raise PlanError(
                f"sampling_rate: expected a probability in (0, 1], got {self.sampling_rate}"
            )
        whole("steps", self.steps, least=0)


def epsilon_of(events: Sequence[GaussianSteps], delta: float) -> float:
    """Bounds the epsilon of everything in `events` together, at `delta`.

    Guarantee: the training that took exactly these steps is (epsilon, delta)-differentially private
    with respect to adding or removing one unit (an example, or a person), given that every step was
    Poisson-sampled at its rate and noised with its multiplier.

    Args:
        events: The steps taken, in any order.
        delta: Failure probability, in (0, 1).

    Returns:
        An upper bound, at least 0; 0 where nothing was taken, `inf` where a step carried no noise.

    Raises:
        PlanError: `delta` is not in (0, 1), or `events` are none, or of examples and of persons.
        AccountingError: No accountant could bound these events.

    Example:
        >>> steps = GaussianSteps(noise_multiplier=1.1, sampling_rate=256 / 60_000, steps=1000)
        >>> round(epsilon_of([steps], delta=1e-5), 2)
        0.61
    """
    delta = probability("delta", delta)
    history = _history(events)
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    return _tightest(history, delta)


def epsilons_of(events: Sequence[GaussianSteps], deltas: Sequence[float]) -> tuple[float, ...]:
    """Bounds epsilon at each of several deltas, as `epsilon_of` does, several times as quickly.

    Guarantee: each is an upper bound. That at the smallest delta is what `epsilon_of` gives, and
    the others differ from it by rounding alone (1e-5): the steps are composed once.

    Args:
        events: The steps taken, in any order.
        deltas: Failure probabilities, each in (0, 1).

    Raises:
        PlanError: A delta is not in (0, 1), or `events` are none, or of examples and of persons.
        AccountingError: No accountant could bound these events.

    Example:
        >>> steps = GaussianSteps(noise_multiplier=1.1, sampling_rate=256 / 60_000, steps=1000)
        >>> [round(each, 2) for each in epsilons_of([steps], [1e-5, 0.01])]
        [0.61, 0.19]
    """
    deltas = [probability("delta", each) for each in deltas]
    history = _history(events)
    quick = [math.nan] * len(deltas)
    if all(noise > 0 for noise, _, _ in history) and any(rate < 1 for _, rate, _ in history):
        quick = _composed_once(list(history), deltas)
    return tuple(
        epsilon_of(events, delta) if math.isnan(bound) else max(0.0, bound)
        for delta, bound in zip(deltas, quick, strict=True)
    )


def _history(events: object) -> tuple[_opacus.Event, ...]:
    """The steps that were taken, as accountants know them."""
    return tuple(
        (event.noise_multiplier, event.sampling_rate, event.steps)
        for event in checked_events(events)
        if event.steps > 0
    )


def checked_events(events: object) -> Sequence[GaussianSteps]:
    """Events, given that each is one: anything else is refused, for nothing is free."""
    found: list[Any] = list(events) if isinstance(events, Iterable) else [events]
    for event in found:
        if not isinstance(event, GaussianSteps):
            raise PlanError(
                f"events: expected a list of privacy.GaussianSteps, got {type(event).__name__} in "
                "the place of one"
            )
    if len({event.unit for event in found}) > 1:
        raise PlanError(
            "events: expected steps of one unit, got steps that protect an example and steps that "
            "protect a person: they have no epsilon in common"
        )
    return found


def checked_unit(unit: object) -> Unit:
    """The unit of privacy, given that it is one."""
    for known in get_args(Unit):
        if isinstance(unit, str) and unit == known:
            return known  # type: ignore[no-any-return]
    raise PlanError(f"unit: expected {' or '.join(get_args(Unit))}, got {shown(unit)}")


@functools.lru_cache(maxsize=256)
def _tightest(events: tuple[_opacus.Event, ...], delta: float) -> float:
    """The smallest bound there is; remembered, since an accountant takes up to a second."""
    history = list(events)
    bounds = [_bound(_opacus.rdp_epsilon, history, delta)]
    if all(sampling_rate == 1 for _, sampling_rate, _ in events):
        bounds.append(_bound(_closed_form, history, delta))
    elif not bounds[0] > _LARGEST_PRV_EPSILON:
        bounds.append(_bound(_opacus.prv_epsilon, history, delta))
    finite = [bound for bound in bounds if math.isfinite(bound)]
    if not finite:
        raise AccountingError(
            f"expected an accountant to bound {history} at delta={delta}, none could; use more "
            "noise or fewer steps"
        )
    # Where delta is more than the steps need at epsilon 0, accountants say less than nothing.
    return max(0.0, min(finite))


def _composed_once(history: list[_opacus.Event], deltas: Sequence[float]) -> list[float]:
    """The smaller of both accountants' bounds at each delta; `nan` where one of them has none."""
    rdp = _bounds(_opacus.rdp_epsilons, history, deltas)
    served = [d for d, bound in zip(deltas, rdp, strict=True) if bound <= _LARGEST_PRV_EPSILON]
    prv = dict(zip(served, _bounds(_opacus.prv_epsilons, history, served), strict=True))
    # Above the largest that PRV serves, RDP is all that there is, as in `_tightest`.
    both = [(bound, prv.get(delta, bound)) for delta, bound in zip(deltas, rdp, strict=True)]
    return [min(pair) if all(map(math.isfinite, pair)) else math.nan for pair in both]


def _closed_form(history: list[_opacus.Event], delta: float) -> float:
    """Exactly what steps on all examples cost: one Gaussian mechanism (Dong et al. 2019)."""
    mu = math.hypot(*(math.sqrt(steps) / noise for noise, _, steps in history))
    return gdp_epsilon(mu, delta) + _ROOT_ERROR


def noise_multiplier_for(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int
) -> float:
    """Finds the least noise multiplier, to one part in a thousand, that costs at most `epsilon`.

    Args:
        epsilon: The budget, > 0.
        delta: Failure probability, in (0, 1).
        sampling_rate: Probability with which each example is in a step, in (0, 1].
        steps: Number of steps, at least 1.

    Returns:
        A noise multiplier with `epsilon_of(...) <= epsilon`: the search keeps its safe end.

    Raises:
        PlanError: A value is out of range, or no noise reaches this epsilon.

    Example:
        >>> sigma = noise_multiplier_for(epsilon=3.0, delta=1e-5, sampling_rate=1.0, steps=200)
        >>> steps = GaussianSteps(noise_multiplier=sigma, sampling_rate=1.0, steps=200)
        >>> epsilon_of([steps], delta=1e-5) <= 3.0
        True
    """
    epsilon, steps = positive("epsilon", epsilon), whole("steps", steps)

    def cost(noise_multiplier: float) -> float:
        event = GaussianSteps(
            noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps
        )
        try:
            return epsilon_of([event], delta)
        except AccountingError:
            return math.inf

    low, high = _bracket(cost, epsilon)
    if high.noise_multiplier > _LARGEST_NOISE_MULTIPLIER:
        raise PlanError(
            f"epsilon={epsilon} at delta={delta} cannot be reached in {steps} steps at sampling "
            f"rate {sampling_rate:.4g}, even with a noise multiplier of {low.noise_multiplier:g}; "
            "allow a larger epsilon, or plan fewer epochs or smaller batches"
        )
    return _narrow(cost, epsilon, low, high)


class _Trial(NamedTuple):
    """A noise multiplier that was tried, and what it costs."""

    noise_multiplier: float
    epsilon: float


def _bracket(cost: Callable[[float], float], epsilon: float) -> tuple[_Trial, _Trial]:
    """The last power of two that costs too much, and the next one, which does not."""
    here = _Trial(1.0, cost(1.0))
    factor = 2.0 if here.epsilon > epsilon else 0.5
    while here.noise_multiplier <= _LARGEST_NOISE_MULTIPLIER:
        there = _Trial(factor * here.noise_multiplier, cost(factor * here.noise_multiplier))
        if (here.epsilon > epsilon) != (there.epsilon > epsilon):
            return (here, there) if factor > 1 else (there, here)
        here = there
    return here, _Trial(math.inf, 0.0)


def _narrow(cost: Callable[[float], float], epsilon: float, low: _Trial, high: _Trial) -> float:
    """Closes in on the least noise that costs at most `epsilon`; returns the safe end."""
    trial = 0
    while high.noise_multiplier - low.noise_multiplier > _PRECISION * high.noise_multiplier:
        # Epsilon is close to a power of the noise. Once one end is near, a guess kept half the
        # precision away from it brings the other end there; halving keeps a bad guess harmless.
        guess = _halfway(low, high) if trial % 3 == 2 else _power_law(low, high, epsilon)
        tried = _Trial(guess, cost(guess))
        low, high = (low, tried) if tried.epsilon <= epsilon else (tried, high)
        trial += 1
    return high.noise_multiplier


def _halfway(low: _Trial, high: _Trial) -> float:
    return (low.noise_multiplier + high.noise_multiplier) / 2


def _power_law(low: _Trial, high: _Trial, epsilon: float) -> float:
    """Where a power law through both ends costs `epsilon`, a little inside of the bracket."""
    if not (math.isfinite(low.epsilon) and high.epsilon > 0):
        return _halfway(low, high)
    fraction = math.log(low.epsilon / epsilon) / math.log(low.epsilon / high.epsilon)
    ratio = high.noise_multiplier / low.noise_multiplier
    guess: float = low.noise_multiplier * ratio**fraction
    nudge = 1 + _PRECISION / 2
    return min(max(guess, low.noise_multiplier * nudge), high.noise_multiplier / nudge)


def _bound(method: Callable[..., float], history: list[_opacus.Event], delta: float) -> float:
    """One accountant's bound, or `nan` where its numerics give up: the other one then serves."""
    return _bounds(lambda events, deltas: [method(events, deltas[0])], history, [delta])[0]


def _bounds(
    method: Callable[..., list[float]], history: list[_opacus.Event], deltas: Sequence[float]
) -> list[float]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            return method(history, deltas)
    except _FAILS:
        return [math.nan] * len(deltas)
