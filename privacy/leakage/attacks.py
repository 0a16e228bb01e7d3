"""Membership attacks: scores of a table that are higher the likelier an example was trained on.

Each model of the table is attacked in turn, with the others as its shadow models: column t of what
comes back is of model t, and nothing of whom t was trained on has gone into it. So K + 1 trainings
give K + 1 targets. The one model that has the other half is no shadow model of t: with it, how many
models have an example would say whether t does. A score means something beside the others of its
column alone.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from scipy import special

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.table import Flags, ScoreTable
from privacy.statistics import Numbers

__all__ = [
    "attack_p",
    "attack_r",
    "base",
    "bavaria",
    "global_threshold",
    "lira",
    "rmia",
]

_LOG_2PI = float(np.log(2 * np.pi))
_LEAST_VARIANCE = 1e-12
_LEAST_OWN = 1e-6
"""An example's own variance over that of all: its deviation is a thousandth at least."""
_TINY = float(np.finfo(float).tiny)
_MOST_LIKENESS = 1000.0
_SHAPE = 8.0
"""As if examples' variances were known of 16 signals: with less, a law's tails hide who is certain.

Of 2, 4, 8 and 16 the best on the whole, on images of digits and on simulated signals, at 4 and at
16 shadow models.
"""
_OFFLINE_SHARE = 0.33
"""Of the mean of models that did not train on an example, in what one would have that did."""


def global_threshold(table: ScoreTable) -> Numbers:
    """The model's own confidence: no shadow model is asked (Yeom et al. 2018, arXiv 1709.01604)."""
    arguments.instance("table", table, ScoreTable)
    return table.signals.copy()


def attack_p(table: ScoreTable) -> Numbers:
    """Share of the population of which the model is less sure (Ye et al. 2022, arXiv 2111.09679).

    Raises:
        LeakageError: The table has no population.
    """
    arguments.instance("table", table, ScoreTable)
    scores = np.empty_like(table.signals)
    for column, known in enumerate(_population(table).T):
        ordered = np.sort(known)
        scores[:, column] = np.searchsorted(ordered, table.signals[:, column]) / len(ordered)
    return scores


def attack_r(table: ScoreTable) -> Numbers:
    """Share of the models without the example that are less sure of it (Ye et al. 2022).

    With k of them it takes k + 1 values: there is no threshold in between.
    """
    arguments.instance("table", table, ScoreTable)
    out = ~table.members
    ordered = np.sort(np.where(out, table.signals, np.inf), axis=1)
    below = np.stack(
        [np.searchsorted(row, own) for row, own in zip(ordered, table.signals, strict=True)]
    )
    # A model's own signal is not below itself, so it never counts; its partner's may.
    partner = table.signals[:, table.partners]
    below = below - (out[:, table.partners] & (partner < table.signals))
    scores: Numbers = below / np.maximum(1, _of_others(table, out.astype(float)))
    return scores


def lira(table: ScoreTable, *, online: bool = True, pooled: bool = True) -> Numbers:
    """Log likelihood ratio of two normal distributions (Carlini et al. 2022, arXiv 2112.03570).

    Args:
        table: Of a target and shadow models.
        online: Whether models that trained on the example are asked too; else the score is how
            unlikely so high a confidence is without it (the log survival: the authors' own code
            ranks by the density, which suspects those of whom the model is least sure).
        pooled: One variance for all examples, of deviations from each example's own mean; else one
            for each, which needs many models (64 and more), and the location is the median.
    """
    arguments.instance("table", table, ScoreTable)
    sides = [_Side.of(table, inside=inside) for inside in (True, False)]
    inside, outside = (_normal(side, pooled=pooled) for side in sides)
    if not online:
        survival: Numbers = special.log_ndtr(-_standard(table.signals, *outside))
        return -survival
    return _log_density(table.signals, *inside) - _log_density(table.signals, *outside)


def bavaria(table: ScoreTable, *, online: bool = True) -> Numbers:
    """Log likelihood ratio of two Student distributions, each shrunk towards what all have.

    A normal-inverse-gamma prior for mean and variance of each example. Its centre is the mean over
    all examples and the pooled variance, and it weighs as much as examples are alike: with no
    shadow model it is the global attack, with many it is `lira` (BaVarIA-t, arXiv 2603.11799).
    Far beyond all signals that were seen the quotient of two such distributions falls again.

    Args:
        table: Of a target and shadow models.
        online: As for `lira`.
    """
    arguments.instance("table", table, ScoreTable)
    outside = _student(table, inside=False)
    if not online:
        return -_log_survival(table.signals, *outside)
    return _log_student(table.signals, *_student(table, inside=True)) - _log_student(
        table.signals, *outside
    )


def base(table: ScoreTable, *, online: bool = True) -> Numbers:
    """Log probability less the log of its mean over the shadow models (arXiv 2505.24089).

    Args:
        table: Of a target and shadow models.
        online: Whether models that trained on the example are asked too.
    """
    arguments.instance("table", table, ScoreTable)
    usual = np.log(_mean_probability(table, online=online))
    return _log_probability(table) - (usual if online else _OFFLINE_SHARE * usual)


def rmia(table: ScoreTable, *, online: bool = True, gamma: float = 2.0) -> Numbers:
    """Share of the population over which an example stands out (Zarifzadeh et al. 2024).

    An example's probability is divided by what it has on average; it stands out over another whose
    quotient is `gamma` times smaller (RMIA, arXiv 2312.03262).

    Args:
        table: Of a target and shadow models.
        online: Whether models that trained on the example are asked too.
        gamma: At least 1.

    Raises:
        LeakageError: The table has no population, or `gamma` is below 1.
    """
    arguments.instance("table", table, ScoreTable)
    arguments.number("gamma", gamma, "a number of at least 1", lambda x: x >= 1)
    _population(table)
    usual = _mean_probability(table, online=online)
    if not online:
        # What a model that trained on it would add is not known: a third of the way to certainty.
        usual = ((1 + _OFFLINE_SHARE) * usual + (1 - _OFFLINE_SHARE)) / 2
    stands = _log_probability(table) - np.log(usual)
    scores = np.empty_like(stands)
    for column, known in enumerate(stands[table.population].T):
        ordered = np.sort(known)
        over = np.searchsorted(ordered, stands[:, column] - np.log(gamma))
        scores[:, column] = over / len(ordered)
    return scores


@final
@dataclass(frozen=True, kw_only=True)
class _Side:
    """Signals of shadow models that trained on an example, or did not: for each model attacked.

    `counts`, `means` and `squares` (about the mean) are `[examples, models]`.
    """

    table: ScoreTable
    counts: Numbers
    means: Numbers
    squares: Numbers
    chosen: Flags

    @classmethod
    def of(cls, table: ScoreTable, *, inside: bool) -> "_Side":
        chosen = table.members if inside else ~table.members
        # About each example's own middle, where sums of squares lose least.
        middle = table.signals.mean(1, keepdims=True)
        parts = np.where(chosen, table.signals - middle, 0.0)
        counts = _of_others(table, chosen.astype(float))
        sums, squares = _of_others(table, parts), _of_others(table, np.square(parts))
        least = np.maximum(counts, 1)
        return cls(
            table=table,
            counts=counts,
            means=middle + sums / least,
            squares=np.maximum(0.0, squares - np.square(sums) / least),
            chosen=chosen,
        )

    @property
    def centre(self) -> Numbers:
        """The mean over all examples, for each model that is left out: `[1, models]`."""
        seen = self.counts > 0
        total = np.where(seen, self.means, 0.0).sum(0, keepdims=True)
        found: Numbers = total / np.maximum(1, seen.sum(0, keepdims=True))
        return found

    @property
    def spread(self) -> Numbers:
        """Variance of the means of examples: `[1, models]`."""
        seen = self.counts > 0
        apart = np.where(seen, np.square(self.means - self.centre), 0.0).sum(0, keepdims=True)
        found: Numbers = apart / np.maximum(1, seen.sum(0, keepdims=True) - 1)
        return found

    @property
    def variance(self) -> Numbers:
        """Of deviations from each example's own mean, over all examples: `[1, models]`."""
        degrees = np.maximum(0.0, self.counts - 1).sum(0, keepdims=True)
        pooled = self.squares.sum(0, keepdims=True) / np.maximum(1, degrees)
        # One model on this side of every example: how examples differ is all that is known.
        known = np.where(degrees > 0, pooled, self.spread)
        found: Numbers = np.maximum(_LEAST_VARIANCE, known)
        return found

    @property
    def likeness(self) -> Numbers:
        """How many signals of an example what all have in common is worth: `[1, models]`."""
        seen = np.maximum(1, self.counts)
        error = np.where(self.counts > 0, 1 / seen, 0.0).sum(0, keepdims=True)
        error = error / np.maximum(1, (self.counts > 0).sum(0, keepdims=True)) * self.variance
        between = np.maximum(self.spread - error, self.variance / _MOST_LIKENESS)
        found: Numbers = np.maximum(1 / _MOST_LIKENESS, self.variance / between)
        return found


def _of_others(table: ScoreTable, values: Numbers) -> Numbers:
    """For each model the sum over its shadow models: all but itself and its partner."""
    apart = table.partners != np.arange(values.shape[1])
    partner = np.where(apart, values[:, table.partners], 0.0)
    found: Numbers = values.sum(1, keepdims=True) - values - partner
    return found


def _normal(side: _Side, *, pooled: bool) -> tuple[Numbers, Numbers]:
    """Location and variance of one side; where no model is on it, those of all examples."""
    if pooled:
        return np.where(side.counts > 0, side.means, side.centre), side.variance
    middle = np.where(side.counts > 0, _medians(side), side.centre)
    own = side.squares / np.maximum(1, side.counts)
    # A few models may agree by chance; of that no example is as good as certain.
    own = np.maximum(_LEAST_OWN * side.variance, own)
    return middle, np.where(side.counts > 1, own, side.variance)


def _medians(side: _Side) -> Numbers:
    """Of the signals on one side, for each model: `[examples, models]`."""
    signals, partners = side.table.signals, side.table.partners
    models = signals.shape[1]
    order = np.argsort(np.where(side.chosen, signals, np.inf), axis=1, kind="stable")
    ordered = np.take_along_axis(signals, order, 1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(models)[None], 1)
    # Without the model's own and its partner's, those behind them move up.
    own = np.where(side.chosen, places, models)
    other = np.where(partners != np.arange(models), own[:, partners], models)
    first, second = np.minimum(own, other), np.maximum(own, other)
    left = side.counts.astype(np.int64)
    middles = []
    for rank in ((left - 1) // 2, left // 2):
        at = np.clip(rank, 0, models - 1)
        at = at + (at >= first)
        at = np.clip(at + (at >= second), 0, models - 1)
        middles.append(np.take_along_axis(ordered, at, 1))
    found: Numbers = (middles[0] + middles[1]) / 2
    return found


def _student(table: ScoreTable, *, inside: bool) -> tuple[Numbers, Numbers, Numbers]:
    """Location, squared scale and degrees of freedom of the next signal on one side."""
    side = _Side.of(table, inside=inside)
    prior, strength, shape = side.centre, side.likeness, _SHAPE
    kappa, alpha = strength + side.counts, shape + side.counts / 2
    location = (strength * prior + side.counts * side.means) / kappa
    apart = strength * side.counts * np.square(side.means - prior) / (2 * kappa)
    beta = (shape - 1) * side.variance + side.squares / 2 + apart
    return location, beta * (kappa + 1) / (alpha * kappa), 2 * alpha


def _standard(signals: Numbers, location: Numbers, variance: Numbers) -> Numbers:
    found: Numbers = (signals - location) / np.sqrt(variance)
    return found


def _log_density(signals: Numbers, location: Numbers, variance: Numbers) -> Numbers:
    standard = _standard(signals, location, variance)
    found: Numbers = -(np.square(standard) + np.log(variance) + _LOG_2PI) / 2
    return found


def _log_student(signals: Numbers, location: Numbers, scale: Numbers, degrees: Numbers) -> Numbers:
    standard = _standard(signals, location, scale)
    constant = special.gammaln((degrees + 1) / 2) - special.gammaln(degrees / 2)
    constant = constant - np.log(degrees * np.pi * scale) / 2
    found: Numbers = constant - (degrees + 1) / 2 * np.log1p(np.square(standard) / degrees)
    return found


def _log_survival(signals: Numbers, location: Numbers, scale: Numbers, degrees: Numbers) -> Numbers:
    """Log probability of a larger signal; of those beyond what a double holds, the least there."""
    tails = special.stdtr(degrees, -_standard(signals, location, scale))
    found: Numbers = np.log(np.maximum(tails, _TINY))
    return found


def _log_probability(table: ScoreTable) -> Numbers:
    found: Numbers = special.log_expit(table.signals)
    return found


def _mean_probability(table: ScoreTable, *, online: bool) -> Numbers:
    """Mean probability of each example over the other models: `[examples, models]`."""
    probabilities = special.expit(table.signals)
    chosen = np.ones_like(table.members) if online else ~table.members
    parts = np.where(chosen, probabilities, 0.0)
    counts = _of_others(table, chosen.astype(float))
    mean = _of_others(table, parts) / np.maximum(1, counts)
    found: Numbers = np.maximum(np.where(counts > 0, mean, 0.5), _TINY)
    return found


def _population(table: ScoreTable) -> Numbers:
    if not table.population.any():
        raise LeakageError(
            "population: expected examples that no model was trained on, got none; leave some out "
            "of the pool"
        )
    found: Numbers = table.signals[table.population]
    return found
