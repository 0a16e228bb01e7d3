"""Shadow models: others trained as the target was, on examples that are known, and what they say.

Which examples each of them is trained on is drawn first. All have those that a design says all
have, and of its *pool* each has one half, so that each example of the pool is in half of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from privacy.errors import LeakageError
from privacy.leakage.table import Flags, ScoreTable, balanced_halves, confidence
from privacy.sampling import MapStyle, PhysicalBatch, read
from privacy.statistics import Numbers

__all__ = ["Answer", "Indices", "ShadowDesign", "Train", "score_table", "signals_of"]

Indices = npt.NDArray[np.int64]
_BATCH = 500


class Answer(Protocol):
    """A model, or what else gives logits `[n, classes]` for images `[n, ...]`."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """The logits."""


class Train(Protocol):
    """Trains a model as the target was trained, on these examples alone."""

    def __call__(self, indices: Indices, /, *, seed: int) -> Answer:
        """A finished model, which answers as it will in use."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShadowDesign:
    """Who is trained on what.

    Attributes:
        always: Indices of the examples that every model is trained on.
        pool: Indices of those whose membership is guessed.
        population: Indices of those that no model is trained on.
        halves: bool `[pool, 1 + shadows]`: who of the pool each model is trained on, the target
            first.
        seed: The target's; the shadow models' are drawn from it.

    Raises:
        LeakageError: An example is in two of the lists, or twice in one; or there are fewer than
            two shadow models.
    """

    always: Indices
    pool: Indices
    population: Indices
    halves: Flags
    seed: int = 0

    def __post_init__(self) -> None:
        every = np.concatenate([self.always, self.pool, self.population])
        if len(np.unique(every)) != len(every):
            raise LeakageError(
                "members: expected each example once, in one of always, pool and population, got "
                f"{len(every) - len(np.unique(every))} more than once; a member among those who "
                "are none makes every figure wrong"
            )
        if self.halves.ndim != 2 or len(self.halves) != len(self.pool):
            raise LeakageError(
                f"halves: expected a row for each of {len(self.pool)} examples of the pool, got "
                f"{list(self.halves.shape)}"
            )

    @classmethod
    def around(
        cls, members: Indices, others: Indices, *, shadows: int, pool: int | None, seed: int
    ) -> "ShadowDesign":
        """Around a target that was trained on all of `members` and on none of `others`.

        The pool is drawn from both, as many from each, so that a shadow model has as many examples
        as the target; what is left of the members all of them have, and of the others none.

        Args:
            members: What the target was trained on.
            others: Examples of the same kind that it was not.
            shadows: Even, at least 2.
            pool: Examples in it, at most; None takes nine tenths of what there is of both.
            seed: What draws them; the target's too.

        Raises:
            LeakageError: There are too few of either, or one is in both.
        """
        least = min(len(members), len(others))
        each = least * 9 // 10 if pool is None else min(pool // 2, least)
        if each < 1:
            raise LeakageError(
                f"members: expected some and some others for a pool, got {len(members)} and "
                f"{len(others)}"
            )
        random = np.random.default_rng(seed)
        mine, theirs = random.permutation(members), random.permutation(others)
        target = np.arange(2 * each)[:, None] < each
        halves = np.concatenate([target, balanced_halves(2 * each, shadows, random)], 1)
        return cls(
            always=mine[each:],
            pool=np.concatenate([mine[:each], theirs[:each]]),
            population=theirs[each:],
            halves=halves,
            seed=seed,
        )

    @property
    def asked(self) -> Indices:
        """Indices of the rows of the table: the pool, then the population."""
        return np.concatenate([self.pool, self.population])

    @property
    def models(self) -> int:
        """The target and its shadow models."""
        return int(self.halves.shape[1])

    def trained_on(self, model: int) -> Indices:
        """Indices, rising, of what a model is trained on; 0 is the target."""
        return np.sort(np.concatenate([self.always, self.pool[self.halves[:, model]]]))

    def seeds(self) -> tuple[int, ...]:
        """A seed for each model; the target's is the design's own."""
        drawn = np.random.SeedSequence(self.seed).generate_state(self.models - 1)
        return (self.seed, *(int(each) for each in drawn))

    def members(self) -> Flags:
        """Of the rows of the table: bool `[asked, models]`."""
        none = np.zeros((len(self.population), self.models), dtype=np.bool_)
        return np.concatenate([self.halves, none])


def signals_of(answer: Answer, dataset: MapStyle, indices: Indices) -> tuple[Numbers, Indices]:
    """How sure a model is of the own class of each of these examples, and the classes.

    Raises:
        LeakageError: It does not answer with one row of classes for each image, or is a module in
            training mode.
        PlanError: The data set does not give pairs of an image and a label.
    """
    if isinstance(answer, nn.Module) and answer.training:
        raise LeakageError(
            "expected a model that answers as it will in use, got one in training mode; return "
            "model.eval()"
        )
    signals, labels = [], []
    with torch.no_grad():
        for start in range(0, len(indices), _BATCH):
            chosen = torch.from_numpy(indices[start : start + _BATCH])
            batch = PhysicalBatch(indices=chosen, rows=len(chosen), last=True)
            images, classes = read(dataset, batch)
            signals.append(confidence(answer(images), classes))
            labels.append(classes.cpu().numpy().astype(np.int64))
    return np.concatenate(signals), np.concatenate(labels)


def score_table(
    train: Train,
    dataset: MapStyle,
    design: ShadowDesign,
    *,
    recipe: str,
    target: Answer | None = None,
    known: Mapping[int, Numbers] | None = None,
    keep: Callable[[int, Numbers], None] = lambda _model, _signals: None,
) -> ScoreTable:
    """Trains the models of a design, one after the other, and asks each for all examples.

    Guarantee: what is in `known` is not trained again, and no model is held any longer than it is
    asked; the same seeds go to the same models, whatever was known.

    Args:
        train: Trains one of them.
        dataset: Of pairs of an image and a label.
        design: Who is trained on what.
        recipe: A digest of how `train` trains.
        target: The first model, where it is there already; otherwise it is trained too.
        known: Signals of models from an earlier call that was interrupted, by their number.
        keep: Gets the number and the signals of each model as soon as they are known.

    Raises:
        LeakageError: A model does not answer with the classes of the data, or with numbers.
    """
    columns, labels = dict(known or {}), np.zeros(0, dtype=np.int64)
    seeds, asked = design.seeds(), design.asked
    for model, signals in columns.items():
        if model not in range(design.models) or signals.shape != asked.shape:
            raise LeakageError(
                f"known: expected signals of {len(asked)} examples from models 0 to "
                f"{design.models - 1}, got {list(signals.shape)} from model {model}; they are of "
                "another design, leave them out"
            )
    for model in range(design.models):
        if model in columns:
            continue
        own = target if model == 0 and target is not None else None
        answer = own or train(design.trained_on(model), seed=seeds[model])
        try:
            columns[model], labels = signals_of(answer, dataset, asked)
        except LeakageError as error:
            raise LeakageError(f"model {model}: {error}") from error
        keep(model, columns[model])
    if not len(labels):
        labels = _labels(dataset, asked)
    return ScoreTable(
        signals=np.stack([columns[model] for model in range(design.models)], 1),
        members=design.members(),
        labels=labels,
        recipes=(recipe,) * design.models,
        seeds=seeds,
    )


def _labels(dataset: MapStyle, indices: Indices) -> Indices:
    """The classes alone, where every model's signals were known."""
    chosen = torch.from_numpy(indices)
    labels = read(dataset, PhysicalBatch(indices=chosen, rows=len(chosen), last=True))[1]
    found: Indices = labels.cpu().numpy().astype(np.int64)
    return found
