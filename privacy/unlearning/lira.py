"""U-LiRA: is this person's example told by models that forgot it from models that never saw it?

For each example two normal laws are fitted to how sure models are of it: of models that forgot it,
and of oracles that were trained without it. A model is judged by the ratio of its likelihoods.
The mean over people hides the few who are told best, so that these are reported beside it.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from privacy.errors import LeakageError, UnlearningError
from privacy.leakage import arguments
from privacy.statistics import Numbers
from privacy.unlearning import rows
from privacy.validate import shown

__all__ = ["UnlearningLiRA", "unlearning_lira"]

_FEWEST = 4
"""Of each kind: a pair is left out, and of the rest a deviation is taken."""
_LEAST = 1e-3
"""Of an example's deviation over that of all examples together: none is certain by chance."""
_TINY = 1e-9
_WORST = 0.05
_PLACES = 2**22
"""Numbers at once."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class UnlearningLiRA:
    """How well each example tells models that forgot it from those that never saw it.

    1/2 is what a coin tells. The worst 5 % are chosen by their own figures and so are above 1/2 by
    chance too: `worst_by_chance` is what the same models give where which of them forgot is drawn,
    and the p-values count how often that is as much.

    Attributes:
        areas: Area under the curve of each example, float64 `[examples]`.
        accuracies: Share of right verdicts of each, at a likelihood ratio of 1, `[examples]`.
        worst_by_chance: Mean over drawn assignments of their worst 5 % of areas.
        mean_p_value: Of the mean area, in (0, 1].
        worst_p_value: Of the worst 5 %, in (0, 1].
        models: How many forgot, and how many never saw.
    """

    areas: Numbers
    accuracies: Numbers
    worst_by_chance: float
    mean_p_value: float
    worst_p_value: float
    models: tuple[int, int]

    @property
    def mean_area(self) -> float:
        """Over all examples."""
        return float(self.areas.mean())

    @property
    def mean_accuracy(self) -> float:
        """Over all examples."""
        return float(self.accuracies.mean())

    @property
    def worst_area(self) -> float:
        """Mean over the 5 % of examples, at least one, with the largest areas."""
        return _worst(self.areas)

    @property
    def worst_accuracy(self) -> float:
        """Mean over the 5 % of examples, at least one, with the largest accuracies."""
        return _worst(self.accuracies)

    @property
    def worst(self) -> npt.NDArray[np.int64]:
        """Those 5 % of examples, worst first, by their columns in the tables."""
        return np.argsort(-self.areas, kind="stable")[: _count(self.areas)].astype(np.int64)


def unlearning_lira(
    unlearned: Numbers, oracles: Numbers, *, permutations: int = 99, seed: int = 0
) -> UnlearningLiRA:
    """Judges every pair of a model that forgot and an oracle by laws of all the others.

    Neither of the two has gone into the laws, so that where all are alike the expected area and
    accuracy are exactly 1/2; with one left out at a time they would be below.

    Source: Hayes, Shumailov, Triantafillou, Khalifa, Papernot 2024, arXiv 2403.01218.

    Args:
        unlearned: How sure models that forgot are of each example, `[models, examples]`, at least
            4 models, as `margins` gives them; each forgot all of these examples, from a training of
            its own.
        oracles: The same of models that were trained without them, at least 4.
        permutations: Drawn assignments behind the p-values, at least 1; no p-value is below
            1 / (permutations + 1).
        seed: Of these, at least 0.

    Raises:
        UnlearningError: A table is not as said.

    Example:
        >>> random = np.random.default_rng(0)
        >>> never, forgot = random.normal(size=(8, 40)), random.normal(size=(8, 40))
        >>> forgot[:, 0] += 10  # one is not forgotten
        >>> found = unlearning_lira(forgot, never)
        >>> int(found.worst[0]), bool(found.areas[0] > 0.99), abs(found.mean_area - 0.5) < 0.1
        (0, True, True)
    """
    forgot, never = _table("unlearned", unlearned), _table("oracles", oracles)
    if forgot.shape[1] != never.shape[1]:
        raise UnlearningError(
            f"oracles: expected margins of the same {forgot.shape[1]} examples, got "
            f"{never.shape[1]}"
        )
    rows.whole("permutations", permutations, least=1)
    rows.whole("seed", seed, least=0)
    areas, accuracies = _judged(forgot, never)
    random, together = np.random.default_rng(seed), np.concatenate([forgot, never])
    means, worsts = np.empty(permutations), np.empty(permutations)
    for turn in range(permutations):
        order = random.permutation(len(together))
        drawn = _judged(together[order[: len(forgot)]], together[order[len(forgot) :]])[0]
        means[turn], worsts[turn] = drawn.mean(), _worst(drawn)
    return UnlearningLiRA(
        areas=areas,
        accuracies=accuracies,
        worst_by_chance=float(worsts.mean()),
        mean_p_value=_p_value(float(areas.mean()), means),
        worst_p_value=_p_value(_worst(areas), worsts),
        models=(len(forgot), len(never)),
    )


def _judged(forgot: Numbers, never: Numbers) -> tuple[Numbers, Numbers]:
    """Areas and accuracies `[examples]`, over all pairs of the two."""
    least = _LEAST * float(np.concatenate([forgot - forgot.mean(0), never - never.mean(0)]).std())
    size = max(1, _PLACES // (len(forgot) * len(never)))
    found = [
        _judged_part(forgot[:, start : start + size], never[:, start : start + size], least)
        for start in range(0, forgot.shape[1], size)
    ]
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _judged_part(forgot: Numbers, never: Numbers, least: float) -> tuple[Numbers, Numbers]:
    """All laws are without one model of either kind: `[unlearned, oracles, examples]`."""
    of_forgot = [each[:, None] for each in _laws(forgot, least)]
    of_never = [each[None, :] for each in _laws(never, least)]
    of_pair = [
        _log_density(signals, *of_forgot) - _log_density(signals, *of_never)
        for signals in (forgot[:, None], never[None, :])
    ]
    ahead = of_pair[0] - of_pair[1]
    areas = (ahead > 0).mean((0, 1)) + (ahead == 0).mean((0, 1)) / 2
    hits = [(turn > 0).mean((0, 1)) + (turn == 0).mean((0, 1)) / 2 for turn in of_pair]
    accuracies = (hits[0] + 1 - hits[1]) / 2
    return np.asarray(areas), np.asarray(accuracies)


def _laws(signals: Numbers, least: float) -> tuple[Numbers, Numbers]:
    """For each model the mean and the deviation of all others, `[models, examples]`."""
    count = len(signals) - 1
    middle = signals.mean(0)
    moved = signals - middle
    means = -moved / count
    squares = np.maximum(0.0, np.square(moved).sum(0) - np.square(moved) - count * np.square(means))
    return middle + means, np.maximum(np.sqrt(squares / (count - 1)), max(least, _TINY))


def _log_density(signals: Numbers, means: Numbers, deviations: Numbers) -> Numbers:
    found: Numbers = -np.square((signals - means) / deviations) / 2 - np.log(deviations)
    return found


def _count(figures: Numbers) -> int:
    return max(1, round(_WORST * len(figures)))


def _worst(figures: Numbers) -> float:
    return float(np.sort(figures)[-_count(figures) :].mean())


def _p_value(found: float, drawn: Numbers) -> float:
    return float((1 + (drawn >= found - 1e-12).sum()) / (1 + len(drawn)))


def _table(name: str, value: Any) -> Numbers:
    try:
        arguments.scores(name, value, axes=2)
    except LeakageError as error:
        raise UnlearningError(str(error)) from None
    found = np.asarray(value, dtype=np.float64)
    if len(found) < _FEWEST or not found.shape[1] or not np.isfinite(found).all():
        raise UnlearningError(
            f"{name}: expected finite margins [models, examples] of at least {_FEWEST} models and "
            f"1 example, got {shown(list(found.shape))}"
        )
    return found
