"""The plan: exact rates and steps, and the bad plans that are refused."""

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import DPPlan, GaussianSteps, PlanError, epsilon_of

properties = settings(deadline=None, derandomize=True, max_examples=200)
VALID: dict[str, Any] = {"samples": 1000, "batch_size": 100, "epochs": 1}


def test_an_epoch_of_cifar_at_128_has_391_steps() -> None:
    """Where int(1 / sampling rate) loses a step."""
    assert DPPlan(samples=50_000, batch_size=128, epochs=1).steps == 391


def test_no_number_of_batches_loses_a_step() -> None:
    """One epoch of L full batches is L steps, for every L."""
    assert all(
        DPPlan(samples=64 * batches, batch_size=64, epochs=1).steps == batches
        for batches in range(1, 2001)
    )


@properties
@given(samples=st.integers(1, 10**7), data=st.data(), epochs=st.floats(0.01, 1000))
def test_rate_and_steps_are_exact(samples: int, data: st.DataObject, epochs: float) -> None:
    """The rate is batch / samples, not one over a number of batches; steps are the nearest."""
    batch_size = data.draw(st.integers(1, samples))
    plan = DPPlan(samples=samples, batch_size=batch_size, epochs=epochs)
    assert plan.sampling_rate == float(Fraction(batch_size, samples))
    wanted = Fraction(epochs) * samples / batch_size
    assert plan.steps == max(1, round(wanted)) or abs(plan.steps - wanted) <= Fraction(51, 100)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"samples": 0}, "samples: expected a whole number, at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 to 1000"),
        ({"batch_size": 1001}, "batch_size: expected 1 to 1000.*sampling rate above 1"),
        ({"epochs": 0}, "epochs: expected a finite number > 0"),
        ({"epochs": math.inf}, "epochs: expected a finite number > 0"),
        ({"max_grad_norm": 0}, "max_grad_norm: expected a finite number > 0"),
        ({"noise_multiplier": 0}, "noise_multiplier: expected a finite number > 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier: expected a finite number > 0"),
        ({"delta": 0}, "delta: expected a probability below 1 / samples"),
        ({"delta": 0.001}, "delta: expected a probability below 1 / samples = 0.001"),
        ({"target_epsilon": -1}, "target_epsilon: expected a finite number > 0"),
    ],
)
def test_bad_plans_are_refused_by_the_field(settings_: dict[str, float], message: str) -> None:
    """No noise, a batch larger than the data, a delta that protects nobody, and the like."""
    with pytest.raises(PlanError, match=f"^{message}"):
        DPPlan(**{**VALID, **settings_})


def test_a_delta_is_below_one_by_samples_in_words_and_in_the_check() -> None:
    """The message that asks for one names the limit that the next one keeps."""
    plan = DPPlan(**VALID, noise_multiplier=1.0)
    with pytest.raises(PlanError, match=r"^delta: the plan has none; give one below 1 / samples$"):
        plan.epsilon()
    with pytest.raises(PlanError, match=r"^delta: expected a probability below 1 / samples"):
        plan.epsilon(1 / plan.samples)
    assert plan.epsilon(0.99 / plan.samples) > 0


def test_calibrate_gives_a_new_plan_within_the_budget() -> None:
    """The old plan stays without noise; the new one remembers what it was made for."""
    plan = DPPlan(**VALID)
    calibrated = plan.calibrate(epsilon=2.0, delta=1e-4)
    assert not plan.calibrated
    assert calibrated.calibrated
    assert 0.99 * 2 < calibrated.epsilon() <= 2.0
    assert (calibrated.delta, calibrated.target_epsilon) == (1e-4, 2.0)
    assert (
        dataclasses.replace(calibrated, noise_multiplier=None, delta=None, target_epsilon=None)
        == plan
    )


def test_calibrate_refuses_what_cannot_be_kept() -> None:
    """A delta of one over n and an epsilon below all precision."""
    with pytest.raises(PlanError, match=r"^delta: "):
        DPPlan(**VALID).calibrate(epsilon=1.0, delta=1e-3)
    with pytest.raises(PlanError, match="cannot be reached"):
        DPPlan(samples=10, batch_size=10, epochs=1000).calibrate(epsilon=1e-3, delta=1e-3)


def test_the_event_is_what_the_accountant_needs() -> None:
    """All steps, or the first few, at the plan's own rate and noise."""
    plan = DPPlan(**VALID, noise_multiplier=1.5, delta=1e-4)
    assert plan.event(3) == GaussianSteps(noise_multiplier=1.5, sampling_rate=0.1, steps=3)
    assert plan.event(0).steps == 0
    assert plan.epsilon() == epsilon_of([plan.event()], 1e-4)


def test_a_plan_without_noise_or_delta_has_no_epsilon() -> None:
    """What is missing, and how to get it."""
    with pytest.raises(PlanError, match=r"no noise yet: call plan.calibrate"):
        DPPlan(**VALID).epsilon(1e-4)
    with pytest.raises(PlanError, match=r"^delta: the plan has none"):
        DPPlan(**VALID, noise_multiplier=1.0).epsilon()


def test_a_plan_survives_json_and_is_frozen() -> None:
    """It goes into checkpoints as plain values, and nobody changes it under way."""
    plan = DPPlan(**VALID, noise_multiplier=1.5, delta=1e-4)
    assert DPPlan(**json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.noise_multiplier = 0.1  # type: ignore[misc]


def test_a_plan_says_under_which_conditions_its_epsilon_holds() -> None:
    """All that a record and a claim state beside ε, in plain JSON values."""
    plan = DPPlan(samples=100, batch_size=10, epochs=1, noise_multiplier=1.5, delta=1e-3)
    assert json.loads(json.dumps(plan.conditions())) == {
        "delta": 1e-3,
        "noise_multiplier": 1.5,
        "max_grad_norm": 1.0,
        "sampling_rate": 0.1,
        "unit": "example",
        "relation": "add or remove one example",
        "accountant": "PRV and RDP, the smaller bound",
    }
    on_all = dataclasses.replace(plan, batch_size=100)
    assert on_all.conditions()["accountant"] == "the Gaussian mechanism, exactly"
