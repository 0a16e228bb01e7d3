"""Membership attacks as functions of a table: against loops, and against planted truths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from support.score_tables import of_pool, planted

from privacy.errors import LeakageError
from privacy.leakage import (
    ScoreTable,
    area,
    areas,
    attack_p,
    attack_r,
    balanced_halves,
    base,
    bavaria,
    confidence,
    global_threshold,
    lira,
    oracle_threshold,
    point,
    resolved,
    rmia,
    shadow_thresholds,
)

SHADOWED = {
    "lira": lira,
    "lira-own-variance": lambda table, **how: lira(table, pooled=False, **how),
    "bavaria": bavaria,
    "base": base,
    "rmia": rmia,
}
SHADOWED |= {
    f"{name}-offline": lambda table, attack=attack: attack(table, online=False)
    for name, attack in SHADOWED.items()
}
ATTACKS = SHADOWED | {"threshold": global_threshold, "attack-p": attack_p, "attack-r": attack_r}


def shadows_of(table, target):
    """All others but the one that was trained on the other half."""
    pool = ~table.population
    own = table.members[pool, target]
    return [
        k
        for k in range(table.members.shape[1])
        if k != target and (table.members[pool, k] == own).any()
    ]


def one_by_one(table, name, target):
    """The scores of one target, an example at a time, with nothing shared between them."""
    others = shadows_of(table, target)
    phi, mem = table.signals[:, others], table.members[:, others]
    own = table.signals[:, target]
    sides = {
        side: [row[flags == side] for row, flags in zip(phi, mem, strict=True)]
        for side in (True, False)
    }
    centre, pooled, likeness = {}, {}, {}
    for side, rows in sides.items():
        means = np.array([row.mean() for row in rows if len(row)])
        degrees = sum(max(0, len(row) - 1) for row in rows)
        squares = sum(((row - row.mean()) ** 2).sum() for row in rows if len(row))
        centre[side] = means.mean()
        pooled[side] = squares / degrees if degrees else means.var(ddof=1)
        error = pooled[side] * np.mean([1 / len(row) for row in rows if len(row)])
        between = max(means.var(ddof=1) - error, pooled[side] / 1000)
        likeness[side] = pooled[side] / between
    online = not name.endswith("offline")
    found = []
    for i, value in enumerate(own):
        laws = {}
        for side in (True, False):
            row, n = sides[side][i], len(sides[side][i])
            if name.startswith("bavaria"):
                m = row.mean() if n else 0.0
                prior = likeness[side]
                kappa, alpha = prior + n, 8 + n / 2
                at = (prior * centre[side] + n * m) / kappa
                beta = 7 * pooled[side] + ((row - m) ** 2).sum() / 2
                beta += prior * n * (m - centre[side]) ** 2 / (2 * kappa)
                laws[side] = stats.t(2 * alpha, at, np.sqrt(beta * (kappa + 1) / (alpha * kappa)))
            elif name.startswith("lira-own"):
                at = np.median(row) if n else centre[side]
                own = max(row.std(), 1e-3 * np.sqrt(pooled[side])) if n > 1 else None
                laws[side] = stats.norm(at, own or np.sqrt(pooled[side]))
            elif name.startswith("lira"):
                laws[side] = stats.norm(row.mean() if n else centre[side], np.sqrt(pooled[side]))
        if laws:
            there = laws[True].logpdf(value) - laws[False].logpdf(value)
            found.append(there if online else -laws[False].logsf(value))
    return np.array(found)


@pytest.mark.parametrize("name", [n for n in SHADOWED if n.startswith(("lira", "bavaria"))])
@pytest.mark.parametrize("models", [3, 8, 9])
def test_all_targets_at_once_are_each_alone(name, models):
    """The likelihood attacks against a loop over examples that sees one target's shadows alone."""
    table = planted(models, models=models, pool=30, population=10)
    scores = SHADOWED[name](table)
    for target in range(models):
        assert scores[:, target] == pytest.approx(
            one_by_one(table, name, target), rel=1e-8, abs=1e-9
        )


def test_quotients_are_those_of_a_loop():
    """BASE, RMIA, Attack-R and Attack-P, an example and a target at a time."""
    table = planted(3, pool=25, population=8, models=7)
    p = 1 / (1 + np.exp(-table.signals))
    known = np.flatnonzero(table.population)
    wanted = {
        name: np.zeros_like(p)
        for name in ("base", "base-offline", "rmia", "rmia-offline", "attack-r", "attack-p")
    }
    for t in range(7):
        others = shadows_of(table, t)
        usual = p[:, others].mean(1)
        without = np.array(
            [p[i, [k for k in others if not table.members[i, k]]].mean() for i in range(len(p))]
        )
        wanted["base"][:, t] = np.log(p[:, t] / usual)
        wanted["base-offline"][:, t] = np.log(p[:, t]) - 0.33 * np.log(without)
        for name, divided in (("rmia", usual), ("rmia-offline", (1.33 * without + 0.67) / 2)):
            quotient = p[:, t] / divided
            wanted[name][:, t] = [(quotient[i] / quotient[known] > 2).mean() for i in range(len(p))]
        for i in range(len(p)):
            out = [k for k in others if not table.members[i, k]]
            wanted["attack-r"][i, t] = np.mean(table.signals[i, out] < table.signals[i, t])
            wanted["attack-p"][i, t] = np.mean(table.signals[known, t] < table.signals[i, t])
    for name, values in wanted.items():
        assert ATTACKS[name](table) == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("model", [0, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_of_a_targets_own_membership_goes_into_its_scores(name, model):
    """Told that another half was trained on, it says the same of every example of the pool.

    For a shadow model in the target's place too, of which the other half goes with its own.
    """
    table = planted(5, pool=60, population=20)
    members, pool = table.members.copy(), ~table.population
    both = {model, int(table.partners[model])}
    assert len(both) == (1 if model == 0 else 2)
    for each in both:
        members[pool, each] = ~members[pool, each]
    other = replace(table, members=members)
    found, again = (ATTACKS[name](each)[:, model] for each in (table, other))
    assert found == pytest.approx(again, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("models", [3, 5, 9])
def test_a_shift_is_seen_and_none_is_not(name, models):
    """Where members are surer every attack finds them; where they are not, none does (control).

    Of every model in turn: how often an example is in the others tells nothing of the one.
    """
    pool = 1_500
    seen = planted(1, pool=pool, shift=2.5, models=models)
    blind = planted(2, pool=pool, shift=0.0, models=models)
    # 5.5 standard errors of an area of one half: a chance of 4e-8 for each model.
    error = 5.5 * np.sqrt((pool + 1) / (12 * (pool / 2) ** 2))
    assert area(*of_pool(ATTACKS[name](seen), seen)) > 0.5 + error
    known = ~blind.population
    assert np.abs(areas(ATTACKS[name](blind)[known], blind.members[known]) - 0.5).max() < error


def test_two_halves_are_known():
    """By who was trained on what: the target has no partner, and shadow models have in pairs."""
    table = planted(models=7)
    assert table.partners.tolist() == [0, 2, 1, 4, 3, 6, 5]
    assert planted(models=6).partners.tolist() == [0, 2, 1, 4, 3, 5]


def test_lira_has_the_curve_of_two_normal_laws():
    """With many shadows of a known shift d and deviation s: TPR = Phi(Phi^-1(f) + d / s)."""
    table = planted(7, pool=10_000, population=2, models=65, shift=1.0, spread=0.8)
    for attack in (lira, bavaria, lambda each: lira(each, online=False)):
        scores, members = of_pool(attack(table), table)
        for fpr in (0.1, 0.01):
            limit = oracle_threshold(scores, members, fpr)
            found = point(scores[members], scores[~members], threshold=limit, fpr=fpr)
            wanted = stats.norm.cdf(stats.norm.ppf(fpr) + 1.0 / 0.8)
            # Estimated means cost a little of the shift; five standard errors besides.
            assert found.tpr == pytest.approx(wanted, abs=0.02 + 5 * np.sqrt(0.25 / 5_000))


def test_few_shadows_are_better_pooled():
    """What one variance for all examples is for; with a shadow model or two of each side."""
    table = planted(11, pool=4_000, models=5, shift=1.0)
    areas = {name: area(*of_pool(SHADOWED[name](table), table)) for name in SHADOWED}
    assert areas["lira"] > areas["lira-own-variance"] + 0.02
    assert areas["bavaria"] > areas["lira-own-variance"] + 0.02


def test_many_shadows_make_bavaria_lira():
    """Its prior weighs less and less: the scores come together, and with few they do not."""
    apart = []
    for models in (5, 257):
        table = planted(3, pool=300, models=models)
        one, other = (
            of_pool(f(table), table)[0] for f in (bavaria, lambda t: lira(t, pooled=False))
        )
        apart.append(np.median(np.abs(one - other)))
    assert apart[1] < 0.1 < apart[0]


def test_what_does_not_change_the_order_changes_nothing():
    """Any growing function for the threshold, an affine one for LiRA and BaVarIA."""
    table = planted(6)
    bent = replace(table, signals=np.arctan(table.signals))
    moved = replace(table, signals=3.0 * table.signals - 5.0)
    plain = area(*of_pool(global_threshold(table), table))
    assert area(*of_pool(global_threshold(bent), bent)) == plain
    for attack in (lira, bavaria):
        assert attack(moved) == pytest.approx(attack(table), rel=1e-8, abs=1e-8)


def test_confidence_neither_saturates_nor_depends_on_the_batch():
    """Against a formula in float64 where that still works, and beyond."""
    logits = 4 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 7
    found = confidence(logits, labels)
    p = logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
    assert found == pytest.approx((p.log() - (1 - p).log()).numpy(), rel=1e-9)
    apart = [confidence(logits[i : i + 1], labels[i : i + 1])[0] for i in range(50)]
    assert found == pytest.approx(apart, abs=1e-12)
    assert confidence(torch.tensor([[1000.0, 0.0]]), torch.tensor([0])) == 1000.0


def test_halves_are_balanced():
    """Each example in half of the models, each model with half of the examples."""
    halves = balanced_halves(101, 8, np.random.default_rng(0))
    assert (halves.sum(1) == 4).all()
    assert set(halves.sum(0)) == {50, 51}
    assert not np.array_equal(halves[:, 0], halves[:, 2])


EIGHT = np.array([9.0, 7.0, 5.0, 1.0, 8.0, 4.0, 2.0, 0.0])
IN = np.array([True] * 4 + [False] * 4)


@pytest.mark.parametrize(("fpr", "hits"), [(0.0, 1), (0.25, 3), (0.5, 3), (0.75, 4)])
def test_eight_scores_have_known_rates(fpr, hits):
    """Fractions of four members, at thresholds that so many of four others pass."""
    limit = oracle_threshold(EIGHT, IN, fpr)
    found = point(EIGHT[IN], EIGHT[~IN], threshold=limit, fpr=fpr)
    assert (found.tpr, found.realised_fpr) == (hits / 4, fpr)
    assert area(EIGHT, IN) == 11 / 16
    assert found.tpr_interval[0] < found.tpr <= found.tpr_interval[1]
    assert found.ppv(0.5) == hits / (hits + 4 * fpr)
    assert found.ties == 1


def test_rates_of_few_are_not_told():
    """Ten false alarms must be expected."""
    assert resolved(100, 0.1)
    assert not resolved(99, 0.1)


def test_an_attackers_threshold_is_of_the_shadows():
    """Of the non-members of all others, whatever the model's own are."""
    scores = np.array([[5.0, 1.0], [2.0, 6.0], [3.0, 4.0]])
    members = np.array([[True, False], [False, True], [False, False]])
    assert shadow_thresholds(scores, members, [0.0, 0.5]).tolist() == [[4.0, 3.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"signals": np.zeros((240, 9), np.float32)}, "signals: expected an array of float64"),
        ({"signals": [[1.0]]}, "signals: expected an array of float64 with 2 axes, got list"),
        ({"members": np.zeros((240, 8), bool)}, "expected 240 rows and 9 columns"),
        ({"labels": np.zeros(3, np.int64)}, "3 labels"),
        ({"recipes": ("r",) * 8 + ("s",)}, "another recipe for model 8"),
        ({"recipes": ("r",) * 8}, "a recipe and a seed for each of 9 models"),
        ({"members": np.zeros((240, 9), bool)}, "got 0 for model 0"),
        ({"members": np.ones((240, 9), bool)}, "got 240 for model 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, words):
    """By the part and by the model that are wrong."""
    with pytest.raises(LeakageError, match=words):
        replace(planted(), **change)


def test_a_signal_that_is_none_is_refused():
    """With the example and the model that it is of."""
    signals = planted().signals.copy()
    signals[7, 3] = np.nan
    with pytest.raises(LeakageError, match="got nan of example 7 from model 3"):
        replace(planted(), signals=signals)
    two = {name: getattr(planted(), name)[:, :2] for name in ("signals", "members")}
    with pytest.raises(LeakageError, match="at least two shadow models, got 2"):
        replace(planted(), **two, recipes=("r",) * 2, seeds=(0, 1))


def test_what_needs_a_population_asks_for_it():
    """And a threshold, a prior, a quotient outside of what they can be is refused."""
    table = planted(population=0)
    for attack in (attack_p, rmia):
        with pytest.raises(LeakageError, match="population: expected examples that no model"):
            attack(table)
    with pytest.raises(LeakageError, match="gamma: expected a number of at least 1"):
        rmia(planted(), gamma=float("nan"))
    with pytest.raises(LeakageError, match="fpr: expected a fraction"):
        oracle_threshold(EIGHT, IN, 1.0)
    with pytest.raises(LeakageError, match="prior: expected a share"):
        point([1.0], [0.0], threshold=0.5, fpr=0.0).ppv(1.0)
    for nobody in (~IN & IN, IN | ~IN):
        with pytest.raises(LeakageError, match="expected some and some others"):
            area(EIGHT, nobody)
    with pytest.raises(LeakageError, match="even number of models"):
        balanced_halves(10, 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "at least two classes"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), "got \\[2, 3\\]"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels: expected 0 to 2"),
    ],
)
def test_logits_without_the_classes_of_the_labels_are_refused(logits, labels, words):
    """Before an index runs out of them."""
    with pytest.raises(LeakageError, match=words):
        confidence(logits, labels)


def test_an_attack_cannot_change_what_the_next_one_sees():
    """One that works in place ends, and the caller's own array is not the table's."""
    signals = np.random.default_rng(0).normal(size=(20, 3))
    members = np.arange(20)[:, None] % 2 == np.array([0, 0, 1])
    table = ScoreTable(
        signals=signals,
        members=members,
        labels=np.zeros(20, dtype=np.int64),
        recipes=("r",) * 3,
        seeds=(0, 1, 2),
    )
    signals[:] = 0
    assert table.signals.any()
    for part in (table.signals, table.members, table.labels):
        with pytest.raises(ValueError, match="read-only"):
            part[:] = 0
