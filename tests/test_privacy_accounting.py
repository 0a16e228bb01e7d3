"""Epsilon against an independent accountant, closed forms and published values."""

import math
from collections.abc import Iterator

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from privacy import (
    AccountingError,
    GaussianSteps,
    PlanError,
    _opacus,
    accounting,
    epsilon_of,
    noise_multiplier_for,
)

few = settings(deadline=None, derandomize=True, max_examples=6)


def steps_of(noise_multiplier: float, sampling_rate: float, steps: int) -> GaussianSteps:
    """Short for an event."""
    return GaussianSteps(
        noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps
    )


def independent_epsilon(events: list[GaussianSteps], delta: float) -> float:
    """Google's privacy loss distributions (Koskela et al. 2020), pessimistic."""
    accountant = PLDAccountant()
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        accountant.compose(sampled, event.steps)
    return float(accountant.get_epsilon(delta))


def exact_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """The closed form of the Gaussian mechanism on full batches (Balle and Wang 2018)."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        loss, gain = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(stats.norm.cdf(loss) - math.exp(epsilon) * stats.norm.cdf(gain)) - delta

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([steps_of(1.1, 256 / 60_000, 1000)], 1e-5),
        ([steps_of(4.0, 0.01, 10_000)], 1e-5),
        ([steps_of(1.0, 128 / 50_000, 5 * 391)], 1e-5),
        ([steps_of(2.0, 0.1, 100)], 1e-6),
        ([steps_of(1.0, 0.05, 50), steps_of(2.0, 0.02, 300)], 1e-5),
    ],
    ids=["MNIST", "Abadi", "CIFAR", "large batches", "two kinds of steps"],
)
def test_epsilon_agrees_with_an_independent_accountant(
    events: list[GaussianSteps], delta: float
) -> None:
    """Above it, as a bound must be, and by no more than the promised error of 0.01 and a little."""
    independent = independent_epsilon(events, delta)
    assert independent <= epsilon_of(events, delta) <= independent + 0.012
    fewer = [steps_of(e.noise_multiplier * 1.02, e.sampling_rate, e.steps) for e in events]
    assert not independent <= epsilon_of(fewer, delta) <= independent + 0.012


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 1), (5.0, 10), (10.0, 400)])
def test_full_batches_cost_what_the_closed_form_says(noise: float, steps: int) -> None:
    """At sampling rate 1 the exact epsilon is known, of steps of two kinds too."""
    exact = exact_epsilon(noise, steps, 1e-5)
    assert exact <= epsilon_of([steps_of(noise, 1.0, steps)], 1e-5) <= exact + 1e-8
    # As much information again, by half of the noise in a quarter of the steps.
    both = [steps_of(noise, 1.0, 4 * steps), steps_of(noise / 2, 1.0, steps)]
    assert epsilon_of(both, 1e-5) == pytest.approx(exact_epsilon(noise, 8 * steps, 1e-5), abs=1e-8)


def test_a_sample_among_full_batches_is_not_taken_for_one() -> None:
    """Where only some steps are on all examples the accountants serve, and stay above the truth."""
    events = [steps_of(5.0, 1.0, 10), steps_of(5.0, 0.5, 10)]
    independent = independent_epsilon(events, 1e-5)
    assert independent <= epsilon_of(events, 1e-5) <= 1.1 * independent + 0.012


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "published"),
    [
        (4.0, 0.01, 10_000, 1.26),
        (1.3, 256 / 60_000, 15 * 60_000 // 256, 1.19),
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 3.01),
        (0.7, 256 / 60_000, 45 * 60_000 // 256, 7.10),
    ],
    ids=["Abadi 2016", "tutorial 1", "tutorial 2", "tutorial 3"],
)
def test_published_values_are_improved_not_contradicted(
    noise: float, rate: float, steps: int, published: float
) -> None:
    """Abadi et al. 2016 and TensorFlow Privacy's MNIST table at 1e-5, by looser accountants."""
    assert 0.7 * published < epsilon_of([steps_of(noise, rate, steps)], 1e-5) < published


@few
@given(
    noise=st.floats(0.6, 4),
    rate=st.floats(1e-3, 0.2),
    steps=st.integers(1, 300),
    more=st.integers(1, 300),
)
def test_more_steps_cost_more(noise: float, rate: float, steps: int, more: int) -> None:
    """Epsilon never falls as steps are added."""
    before = epsilon_of([steps_of(noise, rate, steps)], 1e-5)
    assert 0 <= before <= epsilon_of([steps_of(noise, rate, steps + more)], 1e-5)


@few
@given(
    epsilon=st.floats(0.3, 12),
    rate=st.sampled_from([0.01, 0.05, 1.0]),
    steps=st.integers(1, 300),
)
def test_the_noise_found_keeps_the_budget_and_no_less_would(
    epsilon: float, rate: float, steps: int
) -> None:
    """At most the wanted epsilon; two parts in a thousand less noise cost more than it."""
    noise = noise_multiplier_for(epsilon=epsilon, delta=1e-5, sampling_rate=rate, steps=steps)
    assert epsilon_of([steps_of(noise, rate, steps)], 1e-5) <= epsilon
    assert epsilon_of([steps_of(0.998 * noise, rate, steps)], 1e-5) > epsilon


def test_an_epsilon_out_of_reach_is_a_plan_error() -> None:
    """No noise brings the bound below its own precision; the message says what would help."""
    with pytest.raises(PlanError, match=r"epsilon=0\.0005 .*cannot be reached.*allow a larger"):
        noise_multiplier_for(epsilon=0.0005, delta=1e-5, sampling_rate=1.0, steps=2000)


@pytest.mark.parametrize("epsilon", [1e3, 1e12])
def test_a_huge_epsilon_is_still_answered(epsilon: float) -> None:
    """Where accountants overflow, too little noise counts as infinitely expensive."""
    noise = noise_multiplier_for(epsilon=epsilon, delta=1e-5, sampling_rate=0.01, steps=10)
    assert noise > 0
    assert epsilon_of([steps_of(noise, 0.01, 10)], 1e-5) <= epsilon


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_a_positive_number(epsilon: float) -> None:
    """Anything else is refused by name."""
    with pytest.raises(PlanError, match=r"^epsilon: expected a finite number > 0"):
        noise_multiplier_for(epsilon=epsilon, delta=1e-5, sampling_rate=0.1, steps=10)


def test_steps_without_noise_cost_everything() -> None:
    """One noiseless step among noised ones makes epsilon infinite; none taken cost nothing."""
    assert epsilon_of([steps_of(1.0, 0.1, 10), steps_of(0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon_of([steps_of(0.0, 0.1, 0)], 1e-5) == 0
    assert epsilon_of([], 1e-5) == 0


@pytest.mark.parametrize(
    ("settings_", "name"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"steps": -1}, "steps"),
    ],
)
def test_events_check_their_ranges(settings_: dict[str, float], name: str) -> None:
    """A sampling rate above 1 or a negative noise has no meaning; the field is named."""
    valid = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 1}
    with pytest.raises(PlanError, match=f"^{name}: expected"):
        GaussianSteps(**{**valid, **settings_})  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    """Zero has no bound, one no meaning."""
    with pytest.raises(PlanError, match=r"^delta: expected a probability"):
        epsilon_of([steps_of(1.0, 0.1, 1)], delta)


@pytest.mark.usefixtures("forgetful")
def test_the_costly_accountant_is_spared_where_it_gains_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At an epsilon of hundreds its grid takes gigabytes; RDP bounds it alone."""

    def refuse(events: object, delta: float) -> float:
        raise AssertionError("PRV was asked")

    monkeypatch.setattr(_opacus, "prv_epsilon", refuse)
    assert 900 < epsilon_of([steps_of(0.15, 0.004, 4000)], 1e-5) < math.inf


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Bounds are not remembered, so that a replaced accountant is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "_tightest", accounting._tightest.__wrapped__)
        yield


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("failure", [ValueError, RuntimeWarning, MemoryError, OverflowError])
def test_one_accountant_serves_where_the_other_fails(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A numerical failure of one leaves the other's bound; of both, there is no epsilon to give."""
    event = steps_of(1.1, 0.01, 100)
    loose = _opacus.rdp_epsilon([(1.1, 0.01, 100)], 1e-5)
    tight = _opacus.prv_epsilon([(1.1, 0.01, 100)], 1e-5)

    def fail(events: object, delta: float) -> float:
        raise failure("numerics")

    monkeypatch.setattr(_opacus, "prv_epsilon", fail)
    assert epsilon_of([event], 1e-5) == loose
    monkeypatch.undo()
    monkeypatch.setattr(_opacus, "rdp_epsilon", fail)
    assert epsilon_of([event], 1e-5) == tight
    monkeypatch.setattr(_opacus, "prv_epsilon", fail)
    with pytest.raises(AccountingError, match="more noise or fewer steps"):
        epsilon_of([event], 1e-5)
