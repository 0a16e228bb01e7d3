"""Controls: right attacks pass them on any table, wrong ones do not."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.score_tables import planted

from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    area,
    attack_p,
    attack_r,
    controls,
    global_threshold,
    lira,
)
from privacy.leakage.controls import _widths


def failed(table, attacks):
    """Names of the controls that did not pass, with their attacks."""
    return {(each.name, each.attack) for each in controls(table, attacks) if not each.passed}


@pytest.mark.parametrize("models", [3, 5, 9, 17, 65])
@pytest.mark.parametrize(("pool", "population"), [(60, 1), (300, 40), (2_500, 2_100)])
def test_every_attack_passes_on_any_table(models, pool, population):
    """Where it finds much, and where there is nothing to be found."""
    for shift in (0.0, 3.0):
        table = planted(models, pool=pool, population=population, models=models, shift=shift)
        found = controls(table, MEMBERSHIP_ATTACKS)
        assert len(found) == 2 * len(MEMBERSHIP_ATTACKS)
        assert not [each for each in found if not each.passed]


@pytest.mark.parametrize("values", [1, 2, 6])
def test_ties_fail_no_control(values):
    """Signals of few values, as models have that say a class alone."""
    table = planted(1, pool=400, models=9)
    coarse = np.round(values * np.clip(table.signals / 8 + 0.5, 0, 1) - 0.5) / values
    assert not failed(replace(table, signals=coarse), MEMBERSHIP_ATTACKS)


def peeking(table):
    """Knows whom it is to find."""
    return table.signals + 5.0 * table.members


def counting(table):
    """Knows by how many others an example is had whether a model has it: each is in half of all."""
    return table.signals - 50.0 * (table.members.sum(1, keepdims=True) - table.members)


WRONG = {
    "counting": (counting, "permuted"),
    "peeking": (peeking, "permuted"),
    "wrong end": (lambda table: -table.signals, "planted"),
    "constant": (lambda table: np.zeros_like(table.signals), "planted"),
    "noise": (lambda t: np.random.default_rng(0).random(t.signals.shape), "planted"),
    "another model": (lambda table: np.roll(table.signals, 1, axis=1), "planted"),
    "another example": (lambda table: np.roll(table.signals, 1, axis=0), "planted"),
    "least alike": (lambda table: -np.abs(lira(table)), "planted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_attack_that_is_wrong_fails(name):
    """By the control that is there for it, beside a right one that passes."""
    attack, control = WRONG[name]
    table = planted(2, pool=600, shift=1.0)
    attacks = {name: attack, "right": global_threshold}
    assert failed(table, attacks) == {(control, name)}


def test_coarse_attacks_must_still_order():
    """Attack-P and Attack-R may have others level with members, and none above; not all level."""
    table = planted(3, pool=600)
    turned = {
        "attack-p": lambda t: -attack_p(t),
        "attack-r": lambda t: np.zeros_like(attack_r(t)),
    }
    assert failed(table, turned) == {("planted", "attack-p"), ("planted", "attack-r")}
    straight = [c for c in controls(table, {"attack-p": attack_p}) if c.name == "planted"]
    assert [(c.expected, c.passed) for c in straight] == [
        ("no member below another, and not all level", True)
    ]
    # Of what it finds at no false alarm nothing is said: it may be none, and the attack right.
    assert re.fullmatch(r"members from [\d.]+, others up to [\d.]+", straight[0].got)


@pytest.mark.parametrize("values", [2, 5, 10_000])
@pytest.mark.parametrize("count", [30, 100])
def test_an_interval_fails_no_more_often_than_it_says(values, count):
    """Of 5,000 permutations with an error of 5 %, and it is not much wider than need be."""
    random = np.random.default_rng(0)
    scores = random.integers(0, values, 200).astype(float)
    areas = []
    for _ in range(5_000):
        members = np.zeros(200, bool)
        members[random.permutation(200)[:count]] = True
        areas.append(area(scores, members) if len(areas) < 3 else _area(scores, members))
    apart = np.abs(np.array(areas) - 0.5)
    width = _widths(scores[:, None], members[:, None], 0.05)[0]
    assert (apart > width).sum() <= stats.binom.isf(3e-7, 5_000, 0.05)
    assert width < 2.3 * np.quantile(apart, 0.95)


def _area(scores, members):
    ordered = np.sort(scores[~members])
    below = np.searchsorted(ordered, scores[members], "left")
    level = np.searchsorted(ordered, scores[members], "right") - below
    return float((below + level / 2).mean() / len(ordered))
