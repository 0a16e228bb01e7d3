"""Tables of signals whose truth is known."""

import numpy as np

from privacy.leakage import ScoreTable, balanced_halves


def planted(seed=0, *, pool=200, population=40, models=9, shift=1.0, spread=0.7, between=2.0):
    """Normal signals about a mean of each example's own, higher by `shift` where it was seen."""
    random = np.random.default_rng(seed)
    target = random.permutation(np.arange(pool) < pool // 2)[:, None]
    shadows = balanced_halves(pool, models - models % 2, random)[:, : models - 1]
    halves = np.concatenate([target, shadows], 1)
    members = np.concatenate([halves, np.zeros((population, models), bool)])
    own = between * random.standard_normal((pool + population, 1))
    noise = spread * random.standard_normal(members.shape)
    return ScoreTable(
        signals=own + shift * members + noise,
        members=members,
        labels=random.integers(0, 3, pool + population),
        recipes=("r",) * models,
        seeds=tuple(range(models)),
    )


def of_pool(scores, table, column=0):
    """Scores and memberships of the pool, for one target."""
    pool = ~table.population
    return scores[pool, column], table.members[pool, column]
