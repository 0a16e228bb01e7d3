"""Planted truths that every measurement must find again, on its own table: else it is void."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from scipy.stats import rankdata

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.metrics import area, areas
from privacy.leakage.table import Flags, ScoreTable
from privacy.statistics import Numbers

__all__ = ["Control", "controls"]

_ERROR = 1e-6
"""With which probability a control fails by chance, all attacks together."""
_MOST_ROWS = 2_000
"""Of the pool, and of the population: controls need no more, and attacks take time."""
_LEAK = 300.0
"""How far from 0 planted signals are: certainty that is far beyond their own deviation."""
_COARSE = ("attack-p", "attack-r")
"""Their scores are shares of few, of which others than members can have all too, by chance."""


@final
@dataclass(frozen=True, kw_only=True)
class Control:
    """A planted truth, and whether an attack finds it.

    Attributes:
        name: `permuted` or `planted`.
        attack: Which was tried.
        expected: What it must find, in words.
        got: What it found, in words.
        passed: Whether that is so.
    """

    name: str
    attack: str
    expected: str
    got: str
    passed: bool


def controls(
    table: ScoreTable, attacks: Mapping[str, Callable[[ScoreTable], Numbers]], *, seed: int = 0
) -> tuple[Control, ...]:
    """Tries each attack on two tables made of this one, whose truth is known.

    `permuted`: every model's members are others, drawn anew, and the signals are as they were.
    Nothing is to be found of any model: areas are ½ within an interval, by Bernstein's inequality
    for draws without replacement (Hoeffding 1963, theorem 4), which fails by chance with a
    probability of 1e-6 at most, over all models and attacks. An attack fails that looks at whom it
    is to find, or at what tells it by the way other models were chosen.

    `planted`: every model is certain of its members and of nobody else. All members must be above
    all others. Attack-P and Attack-R alone may have some level: their scores are shares of so few.

    Args:
        table: The measurement's own, of a balanced design; of a large one some thousand rows.
        attacks: By name.
        seed: What draws the rows, the permutation and the planted signals.

    Raises:
        LeakageError: An argument is of another kind, or an attack gives no numbers.
    """
    arguments.whole("seed", seed, least=0)
    arguments.instance("table", table, ScoreTable)
    for name, attack in arguments.named("attacks", attacks, "attacks").items():
        arguments.called(f"attacks: {name}", attack, "a function of a table", takes=1)
    random = np.random.default_rng(seed)
    part, pool = _part(table, random)
    moved, leaking = _permuted(part, pool, random), _leaking(part, random)
    error = _ERROR / max(1, len(attacks) * table.signals.shape[1])
    found = []
    for name, attack in attacks.items():
        found += [
            _nothing(name, _scores(name, attack, moved)[pool], moved.members[pool], error),
            _everything(name, _scores(name, attack, leaking)[pool, 0], leaking.members[pool, 0]),
        ]
    return tuple(found)


def _scores(name: str, attack: Callable[[ScoreTable], Numbers], table: ScoreTable) -> Numbers:
    scores = attack(table)
    arguments.scores(f"attacks: {name}", scores, axes=2)
    if scores.shape != table.signals.shape:
        raise LeakageError(
            f"attacks: expected a number for each of {list(table.signals.shape)} signals from "
            f"{name}, got {list(scores.shape)}"
        )
    return scores


def _part(table: ScoreTable, random: np.random.Generator) -> tuple[ScoreTable, Flags]:
    """Some of the rows, and which of them are of the pool."""
    sides = [np.flatnonzero(side) for side in (~table.population, table.population)]
    rows = np.sort(np.concatenate([random.permutation(side)[:_MOST_ROWS] for side in sides]))
    part = replace(
        table,
        signals=table.signals[rows],
        members=table.members[rows],
        labels=table.labels[rows],
        examples=None,
    )
    return part, ~part.population


def _permuted(table: ScoreTable, pool: Flags, random: np.random.Generator) -> ScoreTable:
    """Each model's members drawn apart from all others', but two halves remain two halves."""
    members, rows = table.members.copy(), np.flatnonzero(pool)
    for model, partner in enumerate(table.partners.tolist()):
        if partner >= model:
            both, drawn = [model, partner], random.permutation(rows)
            members[np.ix_(rows, both)] = table.members[np.ix_(drawn, both)]
    return replace(table, members=members)


def _leaking(table: ScoreTable, random: np.random.Generator) -> ScoreTable:
    # Within a tenth, which is less than the quotient that RMIA looks for.
    rest = 0.1 * random.random(table.signals.shape)
    # Members have twice their mean, exactly that quotient: what they stand out over has less.
    rest[table.population] = [0.05, *[0.11] * (rest.shape[1] - 1)]
    return replace(table, signals=np.where(table.members, _LEAK, -_LEAK) + rest)


def _nothing(attack: str, scores: Numbers, members: Flags, error: float) -> Control:
    found, widths = areas(scores, members), _widths(scores, members, error)
    worst = int(np.argmax(np.abs(found - 0.5) / widths))
    return Control(
        name="permuted",
        attack=attack,
        expected=f"areas of all models 0.5 within {widths[worst]:.3g}",
        got=f"{found[worst]:.3g} of model {worst}",
        passed=bool((np.abs(found - 0.5) <= widths).all()),
    )


def _widths(scores: Numbers, members: Flags, error: float) -> Numbers:
    """For each model how far from ½ an area is, but for `error`, if members are drawn anew."""
    count = members.sum(0)
    pairs, fewer = count * (len(members) - count), np.minimum(count, len(members) - count)
    ranks = rankdata(scores, axis=0)
    apart, variance = np.abs(ranks - ranks.mean(0)).max(0), ranks.var(0)
    size = math.log(2 / error)
    most = apart * size / 3
    found: Numbers = (most + np.sqrt(most**2 + 2 * size * fewer * variance)) / pairs
    # Where all scores are one, the area is ½ and the interval has no width.
    return np.maximum(found, 1e-12)


def _everything(attack: str, scores: Numbers, members: Flags) -> Control:
    least, most = float(scores[members].min()), float(scores[~members].max())
    if attack in _COARSE:
        passed = least >= most and area(scores, members) > 0.5  # which it is if all are level
        # What it finds at FPR 0 says nothing of it: there are so few values that the ends may meet.
        expected = "no member below another, and not all level"
        got = f"members from {least:.3g}, others up to {most:.3g}"
    else:
        passed, expected = least > most, "TPR 1 at FPR 0"
        got = f"TPR {float((scores[members] > most).mean()):.3g} at FPR 0"
    return Control(
        name="planted",
        attack=attack,
        expected=expected,
        got=got,
        passed=passed,
    )
