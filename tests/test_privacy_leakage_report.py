"""What a report says of a table: figures, who is exposed, and what was promised."""

import hmac
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import stats
from support.score_tables import planted

from privacy import GaussianSteps, _opacus, epsilon_of
from privacy.errors import LeakageError
from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    Promise,
    ScoreTable,
    ShadowDesign,
    allowed_tpr,
    area,
    global_threshold,
    lira,
    membership_report,
    shadow_thresholds,
)

KEY = b"sixteen bytes or more"


def test_a_report_has_the_figures_of_each_attack():
    """Those of the target, of all models together, and nothing that its size cannot tell."""
    table = planted(8, pool=2_400, models=9)
    report = membership_report(table, key=KEY)
    assert (report.members, report.others, report.shadows) == (1_200, 1_200, 8)
    assert report.passed
    found = report.attack("lira")
    scores = lira(table)[~table.population]
    members = table.members[~table.population]
    assert found.area == area(scores[:, 0], members[:, 0])
    alone = [area(scores[:, model], members[:, model]) for model in range(9)]
    assert found.areas == pytest.approx(alone, rel=1e-12)
    assert [each.fpr for each in found.of_target] == [0.1, 0.01]
    assert [each.fpr for each in found.of_all] == [0.1, 0.01, 0.001]
    limit = shadow_thresholds(scores, members, [0.01])[0]
    named = scores > limit
    assert found.of_target[1].hits == (named & members)[:, 0].sum()
    assert found.of_all[1].false_alarms == (named & ~members).sum()
    assert found.oracle[0].realised_fpr <= 0.1
    assert sorted(found.by_class) == [0, 1, 2]
    with pytest.raises(LeakageError, match=r"attack: expected one of global-threshold, .* 'x'"):
        report.attack("x")


def test_who_is_given_away_is_told_by_a_key_alone():
    """Ten planted ones of whom every model that knows them is certain; no row, no name."""
    table = planted(9, pool=600, shift=0.0)
    signals = table.signals.copy()
    signals[:10] = np.where(table.members[:10], 40.0, -40.0)
    report, again, other = (
        membership_report(replace(table, signals=signals), key=key) for key in (KEY, KEY, KEY[::-1])
    )
    assert [each.found for each in report.exposed] == [each.of for each in report.exposed]
    assert len({each.digest for each in report.exposed}) == 10
    assert report.exposed == again.exposed
    assert not {each.digest for each in report.exposed} & {each.digest for each in other.exposed}


@pytest.mark.parametrize(("pool", "seed", "most"), [(400, 0, None), (400, 0, 40), (300, 7, None)])
def test_an_example_has_one_digest_in_every_table(pool, seed, most):
    """That of its index in the data set: of other rows, of another pool, of another seed."""
    design = ShadowDesign.around(
        np.arange(300), np.arange(300, 600), shadows=8, pool=pool, seed=seed
    )
    rows = design.rows(most)
    members, examples = design.members()[rows], design.asked[rows]
    known = int(examples[np.flatnonzero(members.any(1))[17]])
    signals = np.random.default_rng(0).normal(size=members.shape)
    signals += 40.0 * (members & (examples == known)[:, None])
    table = ScoreTable(
        signals=signals, members=members, labels=np.zeros(len(rows), dtype=np.int64),
        recipes=("a",) * 9, seeds=tuple(range(9)), examples=examples,
    )  # fmt: skip
    attacks = {"global-threshold": global_threshold}
    (found,) = membership_report(table, key=KEY, exposed=1, attacks=attacks).exposed
    assert found.digest == hmac.digest(KEY, f"example {known}".encode(), "sha256").hex()
    with pytest.raises(LeakageError, match=r"examples: expected the index of each"):
        replace(table, examples=examples[1:])


@pytest.mark.parametrize(("shift", "passed"), [(0.0, True), (3.0, False)])
def test_more_than_privacy_allows_fails_the_report(shift, passed):
    """Epsilon 1 beside signals that tell members apart, and beside some that do not (control)."""
    table = planted(10, pool=1_000, shift=shift, spread=0.5)
    promise = Promise(pairs=((1.0, 1e-5), (0.5, 0.1)))
    report = membership_report(table, key=KEY, promise=promise)
    assert (report.passed, report.void) == (passed, False)
    words = "epsilon 1 at delta 1e-05 (with 1 more pairs) allows"
    assert all(words in line for line in report.broken)
    assert report.verdict.startswith("within what epsilon 1" if passed else "more than was promis")
    assert membership_report(table, key=KEY).verdict.startswith("measured, with nothing promised")


def test_the_bound_is_that_of_randomised_response():
    """Which reaches it: at FPR 1 / (1 + e^epsilon) its TPR is e^epsilon / (1 + e^epsilon)."""
    for epsilon in (0.1, 1.0, 5.0):
        fpr = 1 / (1 + np.exp(epsilon))
        assert allowed_tpr(fpr, epsilon=epsilon, delta=0.0) == pytest.approx(1 - fpr)
    assert allowed_tpr(0.0, epsilon=1.0, delta=0.01) == pytest.approx(0.01)
    assert allowed_tpr(1.0, epsilon=1.0, delta=0.0) == 1.0
    assert allowed_tpr(0.5, epsilon=1e6, delta=0.0) == 1.0


RATES = np.geomspace(1e-4, 0.9, 20)


def test_who_is_there_in_anothers_place_is_told_by_two_changes():
    """A sum of one of +1 and -1 with Gaussian noise: its trade-off is known, and is not exceeded.

    A bound of one change alone would be; and one pair says much less than several.
    """
    steps = GaussianSteps(noise_multiplier=4.0, sampling_rate=1.0, steps=4)
    promise, one = Promise.of([steps], 1e-5), Promise.of([steps], 1e-5, others=())
    told = stats.norm.cdf(stats.norm.ppf(RATES) + 2 * 0.5)
    allowed = np.array([promise.allowed_tpr(fpr) for fpr in RATES])
    assert (allowed >= told).all()
    assert (allowed <= told + 0.08).all()
    assert np.max([one.allowed_tpr(fpr) for fpr in RATES] - told) > 0.3
    epsilon, delta = one.pairs[0]
    once = np.array([allowed_tpr(fpr, epsilon=epsilon, delta=delta) for fpr in RATES])
    assert (once < told).any()


@pytest.mark.parametrize("delta", [1e-5, 0.01, 0.4])
def test_a_promise_is_no_less_than_what_sampled_steps_cost(delta):
    """Another library's accountant, which rounds each loss down: far from where delta is small."""
    steps = GaussianSteps(noise_multiplier=0.8, sampling_rate=0.1, steps=50)
    accountant = PLDAccountant(value_discretization_interval=1e-2)
    accountant.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(0.8)), 50)
    [(epsilon, _)] = Promise.of([steps], delta, others=()).pairs
    # Its own bound is rounded up by at most an interval a step, and mostly by much less.
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, abs=0.1)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1.1, 0.02, 200, 1e-5), (1.5, 0.1, 9, 1e-5), (3.0, 0.1, 40, 0.0125)],
)
def test_a_promise_is_what_an_accountant_says_of_each_delta_alone(noise, rate, steps, delta):
    """The steps are composed once for all; no less, but for rounding, and the first is exact."""
    events = [GaussianSteps(noise_multiplier=noise, sampling_rate=rate, steps=steps)]
    promise = Promise.of(events, delta)
    alone = [epsilon_of(events, each) for _, each in promise.pairs]
    assert promise.pairs[0] == (alone[0], delta)
    assert [epsilon for epsilon, _ in promise.pairs] == pytest.approx(alone, abs=1e-5)
    curve = Promise(pairs=tuple(zip(alone, (d for _, d in promise.pairs), strict=True)))
    told = [promise.allowed_tpr(fpr) for fpr in RATES]
    assert told == pytest.approx([curve.allowed_tpr(fpr) for fpr in RATES], abs=1e-5)


def test_the_steps_of_a_promise_are_composed_once(monkeypatch):
    """For its smallest delta; and each alone where that fails."""
    composed, events = [], [GaussianSteps(noise_multiplier=1.5, sampling_rate=0.1, steps=9)]
    prv = _opacus.PRVAccountant._get_dprv

    def counted(self, **errors):
        composed.append(errors["delta_error"])
        return prv(self, **errors)

    monkeypatch.setattr(_opacus.PRVAccountant, "_get_dprv", counted)
    promise = Promise.of(events, 1e-5, others=(0.05,))
    assert composed == [pytest.approx(1e-8)]

    def fail(events, deltas):
        raise ValueError(events, deltas)

    monkeypatch.setattr(_opacus, "prv_epsilons", fail)
    alone = Promise.of(events, 1e-5, others=(0.05,))
    assert np.array(alone.pairs) == pytest.approx(np.array(promise.pairs), abs=1e-5)


def test_a_bound_is_concave_and_rises():
    """What the mean over examples needs."""
    steps = GaussianSteps(noise_multiplier=1.0, sampling_rate=0.05, steps=100)
    promise = Promise.of([steps], 1e-5, others=(0.01, 0.1))
    rates = np.linspace(0, 1, 201)
    allowed = np.array([promise.allowed_tpr(fpr) for fpr in rates])
    assert (np.diff(allowed) >= -1e-12).all()
    assert (np.diff(allowed, 2) <= 1e-12).all()
    assert (allowed >= rates).all()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ((), "promise: expected at least one pair"),
        (((-1.0, 0.1),), "an epsilon >= 0 with a delta in"),
        (((float("nan"), 0.1),), "an epsilon >= 0 with a delta in"),
        (((1.0, 1.0),), "an epsilon >= 0 with a delta in"),
    ],
)
def test_a_promise_that_cannot_be_is_refused(pairs, words):
    """One without a pair is none."""
    with pytest.raises(LeakageError, match=words):
        Promise(pairs=pairs)
    assert Promise(pairs=((float("inf"), 0.1),)).allowed_tpr(0.0) == 1.0


def test_a_report_that_cannot_be_is_refused():
    """By its key, without an attack, or with one that does not score."""
    with pytest.raises(LeakageError, match="key: expected at least 16 secret bytes, got 5"):
        membership_report(planted(), key=b"short")
    with pytest.raises(LeakageError, match="attacks: expected at least one"):
        membership_report(planted(), key=KEY, attacks={})
    for wrong in (lambda t: t.signals[:3], lambda t: t.signals * np.nan):
        with pytest.raises(LeakageError, match="attacks: expected a number for each of"):
            membership_report(planted(), key=KEY, attacks={"mine": wrong})


def test_without_a_population_its_attacks_are_left_out():
    """The others are all there."""
    names = {each.name for each in membership_report(planted(population=0), key=KEY).attacks}
    assert names == set(MEMBERSHIP_ATTACKS) - {"attack-p", "rmia", "rmia-offline"}


def test_a_control_that_fails_voids_the_report():
    """Whatever its figures are: here of an attack that ranks by the wrong end."""
    table = planted(12, shift=2.0)
    attacks = {"good": global_threshold, "wrong": lambda each: -each.signals}
    report = membership_report(table, key=KEY, attacks=attacks)
    assert (report.void, report.passed, report.broken) == (True, False, ())
    assert report.verdict.startswith("void, no figure can be believed: wrong on the planted table")
    alone = membership_report(table, key=KEY, attacks={"good": global_threshold})
    assert (alone.void, alone.passed) == (False, True)


def test_a_report_is_printed_as_a_table():
    """An attack a line, with what its sample can tell, and the verdict at the end."""
    table = planted(12, shift=2.0)
    report = membership_report(table, key=KEY, attacks={"good": global_threshold, "same": lira})
    head, names, *rows, verdict = str(report).splitlines()
    assert (
        head == f"{report.members} members, {report.others} others, {report.shadows} shadow models"
    )
    assert names.split()[:5] == ["attack", "area", "of", "all", "models"]
    assert [row.split()[:2] for row in rows] == [
        [each.name, f"{each.area:.3f}"] for each in report.attacks
    ]
    assert verdict == report.verdict
    assert repr(report) == str(report)
    assert max(map(len, [head, names, *rows])) <= 120


def test_a_rate_that_its_threshold_does_not_keep_is_printed_as_none():
    """The threshold of the shadow models lies far below the target's scores: all are named."""
    table = planted(12, shift=2.0)
    signals = table.signals.copy()
    signals[:, 0] += 50
    attacks = {"score": global_threshold}
    report = membership_report(replace(table, signals=signals), key=KEY, attacks=attacks)
    (row,) = [line for line in str(report).splitlines() if line.startswith("score")]
    assert row.endswith("not kept: FPR 1.000")
    assert "more than twice as many others as was asked" in str(report)
    (point,) = [each for each in report.attack("score").of_target if each.fpr == 0.1]
    assert (point.tpr, point.kept) == (1.0, False)
    assert "not kept" not in str(membership_report(table, key=KEY, attacks=attacks))
