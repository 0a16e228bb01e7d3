"""How sure models are of examples, and which of them were trained on which: a table of scores.

Every membership attack is a function of it (see `attacks`), so that shadow models are trained once
and asked as often as one likes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.statistics import Numbers

__all__ = ["Flags", "ScoreTable", "balanced_halves"]

Flags = npt.NDArray[np.bool_]
_FEWEST_MODELS = 3
"""A target and two shadow models."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """A row an example, a column a model: the target first, then its shadow models.

    Examples that no model was trained on are the *population*: some attacks hold others against
    them. All other rows are of the *pool*, and are what is guessed.

    Attributes:
        signals: float64 `[examples, models]`, what a `Signal` says of each example; a copy that
            cannot be written to, as `members` and `labels` are.
        members: bool `[examples, models]`: whether the model was trained on the example.
        labels: int64 `[examples]`: the classes of the examples.
        recipes: For each model a digest of how it was trained; all alike.
        seeds: For each model the seed that it was trained with.
        examples: int64 `[examples]`: their indices in the data set, by which they are told; None
            tells them by their rows.

    Raises:
        LeakageError: Shapes do not fit, a value is not finite, there are fewer than two shadow
            models, a model was trained otherwise than the target, or on no example or on all.

    Example:
        >>> members = np.array([[True, False, True], [False, True, False], [False] * 3])
        >>> table = ScoreTable(
        ...     signals=np.where(members, 2.0, 1.0),
        ...     members=members,
        ...     labels=np.zeros(3, dtype=np.int64),
        ...     recipes=("a",) * 3,
        ...     seeds=(0, 1, 2),
        ... )
        >>> table.population
        array([False, False,  True])
    """

    signals: Numbers
    members: Flags
    labels: npt.NDArray[np.int64]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    examples: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name, kind, axes in (
            ("signals", np.float64, 2),
            ("members", np.bool_, 2),
            ("labels", np.int64, 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != kind or value.ndim != axes:
                raise LeakageError(
                    f"{name}: expected an array of {np.dtype(kind).name} with {axes} axes, got "
                    f"{getattr(value, 'dtype', type(value).__name__)} "
                    f"{list(getattr(value, 'shape', ()))}"
                )
        examples, models = self.signals.shape
        if self.members.shape != (examples, models) or len(self.labels) != examples:
            raise LeakageError(
                f"table: expected {examples} rows and {models} columns in all parts, got members "
                f"{list(self.members.shape)} and {len(self.labels)} labels"
            )
        self._check_models(models)
        if self.examples is not None:
            told = arguments.indices("examples", self.examples)
            if len(told) != examples:
                raise LeakageError(
                    f"examples: expected the index of each of {examples} rows, got {len(told)}"
                )
            object.__setattr__(self, "examples", told)
        if not np.isfinite(self.signals).all():
            row, column = np.argwhere(~np.isfinite(self.signals))[0]
            raise LeakageError(
                f"signals: expected finite numbers, got {self.signals[row, column]} of example "
                f"{row} from model {column}; that training diverged, train it anew"
            )
        # An attack that works in place would change what the next one sees.
        for name in ("signals", "members", "labels"):
            kept = getattr(self, name).copy()
            kept.setflags(write=False)
            object.__setattr__(self, name, kept)

    @cached_property
    def population(self) -> Flags:
        """Which examples no model was trained on: bool `[examples]`."""
        found: Flags = np.logical_not(self.members.any(axis=1, keepdims=True))[:, 0]
        return found

    @property
    def told(self) -> npt.NDArray[np.int64]:
        """The number by which each example is told: int64 `[examples]`."""
        return np.arange(len(self.labels)) if self.examples is None else self.examples

    @cached_property
    def partners(self) -> npt.NDArray[np.int64]:
        """For each model the one that has the other half of the pool, or itself: `[models]`.

        Who knows a model's partner knows the model's own members, so that neither tells of the
        other.
        """
        inside = self.members[~self.population].astype(np.float64)
        # Where both have somebody, or neither, they are not the two halves.
        alike = inside.T @ inside + (1 - inside).T @ (1 - inside)
        found: npt.NDArray[np.int64] = np.where(
            (alike == 0).any(1), (alike == 0).argmax(1), np.arange(len(alike))
        )
        return found

    def _check_models(self, models: int) -> None:
        if models < _FEWEST_MODELS:
            raise LeakageError(
                f"table: expected a target and at least two shadow models, got {models} models"
            )
        for name in ("recipes", "seeds"):
            arguments.instance(name, getattr(self, name), tuple)
        if not len(self.recipes) == len(self.seeds) == models:
            raise LeakageError(
                f"table: expected a recipe and a seed for each of {models} models, got "
                f"{len(self.recipes)} and {len(self.seeds)}"
            )
        for column, recipe in enumerate(self.recipes):
            if recipe != self.recipes[0]:
                raise LeakageError(
                    f"recipes: expected shadow models that were trained as the target was, got "
                    f"another recipe for model {column}; what it remembers says nothing of it"
                )
        for column, count in enumerate(self.members.sum(0).tolist()):
            if not 0 < count < len(self.members):
                raise LeakageError(
                    f"members: expected models that were trained on some of {len(self.members)} "
                    f"examples and not on all, got {count} for model {column}"
                )


def balanced_halves(examples: int, models: int, random: np.random.Generator) -> Flags:
    """Whom each model is trained on: halves in pairs, so that each example is in half of them.

    Args:
        examples: At least 2.
        models: Even, at least 2.
        random: What draws them.

    Returns:
        bool `[examples, models]`: of each pair of columns the second has whom the first has not.

    Raises:
        LeakageError: There are too few, or `models` is odd.

    Example:
        >>> balanced_halves(4, 6, np.random.default_rng(0)).sum(1)
        array([3, 3, 3, 3])
    """
    arguments.whole("examples", examples, least=0)
    arguments.whole("shadows", models, least=0)
    if examples < 2 or models < 2 or models % 2:
        raise LeakageError(
            f"shadows: expected at least 2 examples and an even number of models, so that each "
            f"example is in half of them; got {examples} examples and {models} models"
        )
    half = np.arange(examples) < examples // 2
    drawn = np.stack([random.permutation(half) for _ in range(models // 2)], 1)
    both: Flags = np.stack([drawn, ~drawn], 2).reshape(examples, models)
    return both
