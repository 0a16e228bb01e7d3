"""Membership attacks beside other people's, on the same table: none of theirs finds more.

Plain LiRA is written out here and runs everywhere. The libraries are the dependency group `rivals`;
where they are missing the tests skip and say so.
"""

import warnings

import numpy as np
import pytest
from scipy import special, stats

from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    ScoreTable,
    ShadowDesign,
    area,
    bavaria,
    lira,
    oracle_threshold,
)

RATES = (0.1, 0.01)


def uneven(shadows, *, pool, seed=0):
    """Examples that differ in how sure models are of them, how much that varies, and in shift."""
    random = np.random.default_rng(seed)
    half = pool // 2 + 50
    everybody = np.arange(2 * half)
    design = ShadowDesign.around(
        everybody[:half], everybody[half:], shadows=shadows, pool=pool, seed=seed
    )
    members = design.members()
    rows = (len(members), 1)
    spread = np.exp(0.3 * random.standard_normal(rows))
    shift = np.abs(random.standard_normal(rows))
    noise = random.standard_normal(members.shape)
    return ScoreTable(
        signals=2 * random.standard_normal(rows) + spread * (noise + shift * members),
        members=members,
        labels=np.zeros(len(members), dtype=np.int64),
        recipes=("r",) * (shadows + 1),
        seeds=tuple(range(shadows + 1)),
    )


def of_target(table, scores):
    """Scores and memberships of the pool, of the first model."""
    pool = ~table.population
    return scores[pool], table.members[pool, 0]


def figures(scores, members):
    """Area, and shares of the members found at each rate."""
    limits = [oracle_threshold(scores, members, rate) for rate in RATES]
    return [area(scores, members), *((scores[members] > limit).mean() for limit in limits)]


def plain_lira(table):
    """Of the target, with each example's median and deviation (the code of Carlini et al. 2022)."""
    densities = []
    for inside in (True, False):
        seen = table.members[:, 1:] == inside
        signals = np.where(seen, table.signals[:, 1:], np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows of the population, which nobody has
            middle, deviation = np.nanmedian(signals, 1), np.nanstd(signals, 1)
        densities.append(stats.norm.logpdf(table.signals[:, 0], middle, deviation + 1e-30))
    return densities[0] - densities[1]


def test_own_variances_are_plain_lira():
    """The same numbers, where no deviation is below a thousandth of that of all."""
    table = uneven(16, pool=500)
    found, members = of_target(table, lira(table, pooled=False)[:, 0])
    wanted, _ = of_target(table, plain_lira(table))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert area(found, members) > 0.6


@pytest.mark.parametrize("shadows", [4, 16])
@pytest.mark.parametrize("attack", [lira, bavaria])
def test_what_all_examples_have_in_common_helps_where_models_are_few(attack, shadows):
    """Stronger than plain LiRA on the same table: in 99.9 % of paired bootstrap samples."""
    table = uneven(shadows, pool=4_000)
    ours, members = of_target(table, attack(table)[:, 0])
    plain, _ = of_target(table, plain_lira(table))
    random = np.random.default_rng(1)
    gains = []
    for _ in range(300):
        rows = random.integers(0, len(members), len(members))
        gains.append(area(ours[rows], members[rows]) - area(plain[rows], members[rows]))
    assert np.quantile(gains, 0.001) > 0


def ours_of(tables, names):
    """The best of some of our attacks' figures, each the mean over tables."""
    found = [
        [figures(*of_target(table, MEMBERSHIP_ATTACKS[name](table)[:, 0])) for table in tables]
        for name in names
    ]
    return np.max(np.mean(found, 1), 0)


@pytest.mark.parametrize("shadows", [4, 16])
@pytest.mark.parametrize("mode", ["online-carlini", "offline", "offline-carlini"])
def test_sacroml_finds_no_more(mode, shadows):
    """Its LiRA with own or fixed variance: areas, and members found at 10 % and 1 %, of four."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("sacroml.attacks.likelihood_attack", reason="no sacroml")
    tables = [uneven(shadows, pool=1_000, seed=seed) for seed in range(4)]
    theirs = [
        np.mean([figures(*_sacroml(module, table, mode, fixed)) for table in tables], 0)
        for fixed in (False, True)
    ]
    names = ("lira", "bavaria") if mode == "online-carlini" else ("lira-offline", "bavaria-offline")
    ours = ours_of(tables, names)
    assert (ours >= np.max(theirs, 0)).all(), (ours, theirs)


def _sacroml(module, table, mode, fixed):
    """Scores and memberships of the pool, by a method of theirs that takes signals as they are."""
    pool = ~table.population
    signals, members = table.signals[pool], table.members[pool]
    seen = [
        dict(enumerate(list(row[mask]) for row, mask in zip(signals[:, 1:], masks, strict=True)))
        for masks in (~members[:, 1:], members[:, 1:])
    ]
    chance = special.expit(signals[:, 0])
    attack = module.LIRAAttack(write_report=False, mode=mode, fix_variance=fixed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = np.ones(len(signals), dtype=int)
        found, _ = attack._compute_scores(classes, np.stack([1 - chance, chance], 1), *seen)
    # The columns are those of a classifier: the second one is a member's.
    return np.array(found)[:, 1], members[:, 0]


@pytest.mark.parametrize("kind", ["lr", "rf", "gb", "knn", "dt"])
def test_a_learnt_attack_of_art_finds_no_more(kind):
    """Adversarial Robustness Toolbox: learns from shadow models' members, asked of the target."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        art = pytest.importorskip(
            "art.attacks.inference.membership_inference", reason="no adversarial-robustness-toolbox"
        )
        from art.estimators.classification import BlackBoxClassifier
    table = uneven(4, pool=2_000)
    pool = ~table.population
    chance = special.expit(table.signals[pool])
    answers, members = np.stack([1 - chance, chance], 2), table.members[pool]
    inside, outside = answers[:, 1:][members[:, 1:]], answers[:, 1:][~members[:, 1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        victim = BlackBoxClassifier(lambda x: x, (2,), 2)
        attack = art.MembershipInferenceBlackBox(victim, attack_model_type=kind)
        attack.fit(pred=inside, test_pred=outside)
        told = attack.infer(None, pred=answers[:, 0], probabilities=True)
    theirs = figures(np.asarray(told, dtype=float).reshape(len(told), -1)[:, -1], members[:, 0])
    ours = ours_of([table], ("lira", "bavaria", "lira-offline", "base"))
    assert (ours >= theirs).all(), (ours, theirs)
