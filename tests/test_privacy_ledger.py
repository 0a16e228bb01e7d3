"""The ledger: append-only, plain values, nothing assumed to be free."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import (
    GaussianSteps,
    Ledger,
    LedgerError,
    PlanError,
    epsilon_of,
    noise_multiplier_for,
)

events = st.builds(
    GaussianSteps,
    noise_multiplier=st.sampled_from([0.8, 1.0, 2.0]),
    sampling_rate=st.sampled_from([0.01, 0.1]),
    steps=st.integers(0, 5),
)


@settings(deadline=None, derandomize=True)
@given(recorded=st.lists(events, max_size=12))
def test_nothing_recorded_is_lost(recorded: list[GaussianSteps]) -> None:
    """Steps of each kind add up, order is kept, and JSON gives the same ledger back."""
    ledger = Ledger()
    for event in recorded:
        before = ledger.steps
        ledger.record(event)
        assert ledger.steps == before + event.steps
    kinds = {(e.noise_multiplier, e.sampling_rate) for e in recorded}
    for kind in kinds:
        of_kind = [
            sum(e.steps for e in many if (e.noise_multiplier, e.sampling_rate) == kind)
            for many in (recorded, ledger.events)
        ]
        assert of_kind[0] == of_kind[1]
    assert Ledger.from_list(json.loads(json.dumps(ledger.to_list()))).events == ledger.events
    assert Ledger(ledger.events).events == ledger.events


def test_equal_neighbours_are_joined() -> None:
    """A training of a million steps is one row."""
    ledger = Ledger()
    step = GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=1)
    for _ in range(1000):
        ledger.record(step)
    assert ledger.to_list() == [{"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 1000}]


def test_epsilon_is_that_of_everything_together() -> None:
    """Steps of two kinds are composed, and an empty ledger costs nothing."""
    first = GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=10)
    second = GaussianSteps(noise_multiplier=2.0, sampling_rate=0.1, steps=10)
    ledger = Ledger([first, second])
    assert ledger.epsilon(1e-5) == epsilon_of([first, second], 1e-5)
    assert ledger.epsilon(1e-5) > epsilon_of([first], 1e-5)
    assert Ledger().epsilon(1e-5) == 0


ROW = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 2}


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [None],
        [{**ROW, "steps": None}],
        [{**ROW, "steps": 1.9}],
        [{**ROW, "steps": -1}],
        [{**ROW, "noise_multiplier": "much"}],
        [{**ROW, "sampling_rate": 2.0}],
        [{"steps": 2}],
    ],
)
def test_a_damaged_ledger_is_refused(rows: Any) -> None:
    """A row that cannot be read might have cost anything."""
    with pytest.raises(PlanError, match=r"^ledger: expected noise_multiplier, sampling_rate and"):
        Ledger.from_list(rows)


def test_a_ledger_prints_its_steps_and_no_session() -> None:
    """Sessions are drawn at random, and say which trainings ran beside each other."""
    ledger = Ledger([GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=4)])
    assert repr(ledger) == "Ledger(steps=4)"


def test_the_events_cannot_be_changed_from_outside() -> None:
    """What is handed out is a tuple of frozen values."""
    ledger = Ledger([GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=2)])
    assert isinstance(ledger.events, tuple)
    ledger.to_list().clear()
    assert ledger.steps == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Ledger().record(None),
        lambda: Ledger().bind(None),
        lambda: Ledger(5),
        lambda: Ledger([1]),
        lambda: Ledger().epsilon("x"),
        lambda: Ledger().epsilon(None),
        lambda: Ledger.open(None),
        lambda: Ledger.open(b"spent"),
        lambda: epsilon_of(None, 1e-5),
        lambda: epsilon_of([None], 1e-5),
        lambda: epsilon_of([], True),
        lambda: GaussianSteps(noise_multiplier="1", sampling_rate=0.1, steps=1),
        lambda: GaussianSteps(noise_multiplier=1.0, sampling_rate=None, steps=1),
        lambda: GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=1.5),
        lambda: noise_multiplier_for(epsilon="1", delta=1e-5, sampling_rate=0.1, steps=1),
        lambda: noise_multiplier_for(epsilon=1, delta="x", sampling_rate=0.1, steps=1),
        lambda: noise_multiplier_for(epsilon=1, delta=1e-5, sampling_rate="x", steps=1),
        lambda: noise_multiplier_for(epsilon=1, delta=1e-5, sampling_rate=0.1, steps=0),
    ],
)
def test_values_of_other_types_are_refused(wrong: Any) -> None:
    """By what was expected; nothing is assumed to be free, and no search goes on for ever."""
    with pytest.raises((PlanError, LedgerError), match="expected"):
        wrong()
