"""Shadow models: others trained as the target was, on examples that are known, and what they say.

Which examples each of them is trained on is drawn first. All have those that a design says all
have, and of its *pool* each has one half, so that each example of the pool is in half of them.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.signals import Answer, Question, Signal
from privacy.leakage.table import Flags, ScoreTable, balanced_halves
from privacy.sampling import MapStyle, PhysicalBatch, read
from privacy.statistics import Numbers
from privacy.validate import check_dataset, shown

__all__ = ["Indices", "ShadowDesign", "Train", "copies", "score_tables"]

Indices = npt.NDArray[np.int64]
_BATCH = 500
_FEWEST_SHADOWS = 2
_NOBODY: Indices = np.empty(0, dtype=np.int64)
_A_MODEL = "a model, or what else gives logits of images"


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
        arguments.whole("seed", self.seed, least=0)
        parts = [arguments.indices(n, getattr(self, n)) for n in ("always", "pool", "population")]
        every = np.concatenate(parts)
        if len(np.unique(every)) != len(every):
            raise LeakageError(
                "members: expected each example once, in one of always, pool and population, got "
                f"{len(every) - len(np.unique(every))} more than once; a member among those who "
                "are none makes every figure wrong"
            )
        arguments.instance("halves", self.halves, np.ndarray)
        whole = self.halves.dtype == np.bool_ and self.halves.ndim == 2
        if not whole or len(self.halves) != len(self.pool):
            raise LeakageError(
                f"halves: expected bool with a row for each of {len(self.pool)} examples of the "
                f"pool, got {self.halves.dtype} {list(self.halves.shape)}"
            )
        if self.halves.shape[1] < 1 + _FEWEST_SHADOWS:
            raise LeakageError(
                f"halves: expected a target and at least {_FEWEST_SHADOWS} shadow models, got "
                f"{self.halves.shape[1]} models"
            )

    @classmethod
    def around(
        cls,
        members: Indices,
        others: Indices,
        *,
        shadows: int,
        pool: int | None,
        seed: int,
        apart: Indices = _NOBODY,
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
            apart: Examples that nobody is asked about, as `copies` of others are: of a copy it is
                not so that a model has seen it or has not. Of the members among them all models
                are trained on them, of the others none.

        Raises:
            LeakageError: There are too few of either, or one is in both.
        """
        arguments.whole("shadows", shadows, least=0)
        arguments.whole("seed", seed, least=0)
        if pool is not None:
            arguments.whole("pool", pool, least=1)
        members = arguments.indices("members", members)
        others = arguments.indices("others", others)
        apart = arguments.indices("apart", apart)
        always = members[np.isin(members, apart)]
        members, others = members[~np.isin(members, apart)], others[~np.isin(others, apart)]
        least = min(len(members), len(others))
        each = least * 9 // 10 if pool is None else min(pool // 2, least)
        if each < 1:
            raise LeakageError(
                f"members: expected some and some others for a pool, got {len(members)} and "
                f"{len(others)}{' beside those apart' if len(apart) else ''}"
            )
        random = np.random.default_rng(seed)
        mine, theirs = random.permutation(members), random.permutation(others)
        target = np.arange(2 * each)[:, None] < each
        halves = np.concatenate([target, balanced_halves(2 * each, shadows, random)], 1)
        return cls(
            always=np.concatenate([mine[each:], always]),
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

    def rows(self, most: int | None) -> Indices:
        """Rows of the table, rising, that a question asks about which limits them to `most`."""
        if most is None:
            return np.arange(len(self.asked))
        mine = self.halves[:, 0]
        sides = [np.flatnonzero(side)[: most // 2] for side in (mine, ~mine)]
        return np.sort(np.concatenate(sides))


def copies(dataset: MapStyle) -> Indices:
    """Indices, rising, of examples whose images are in the data set more than once, bit for bit.

    Who has seen one has seen its copies, so that nobody can be told by them.

    Raises:
        PlanError: The data set is none, or its examples cannot be put into one batch.

    Example:
        >>> images = torch.tensor([[1.0], [2.0], [1.0]])
        >>> copies([(image, 0) for image in images])
        array([0, 2])
    """
    every = np.arange(check_dataset(dataset))
    digests: list[bytes] = []
    for images, _ in _batches(dataset, every):
        rows = images.detach().cpu().reshape(len(images), -1).contiguous().view(torch.uint8).numpy()
        digests += [hashlib.sha256(row.tobytes()).digest() for row in rows]
    found = Counter(digests)
    return every[[found[digest] > 1 for digest in digests]]


def score_tables(
    train: Train,
    dataset: MapStyle,
    design: ShadowDesign,
    *,
    recipe: str,
    questions: Mapping[str, Question],
    target: Answer | None = None,
    known: Mapping[int, Mapping[str, Numbers]] | None = None,
    keep: Callable[[int, Mapping[str, Numbers]], None] = lambda _model, _signals: None,
) -> dict[str, ScoreTable]:
    """Trains the models of a design, one after the other, and asks each every question.

    Guarantee: what is in `known` is not trained again, and no model is held any longer than it is
    asked; the same seeds go to the same models, whatever was known.

    Args:
        train: Trains one of them.
        dataset: Of pairs of an image and a label.
        design: Who is trained on what.
        recipe: A digest of how `train` trains.
        questions: At least one, by name. A question that limits its rows gets a table of those
            rows alone, without a population.
        target: The first model, where it is there already; otherwise it is trained too.
        known: What models said in an earlier call that was interrupted, by their number and by
            question, a number for each of `design.rows(question.most)`. A model of which the
            answer to a question is missing is trained again.
        keep: Gets the number of each model and what it said as soon as that is known.

    Returns:
        A table for each question.

    Raises:
        LeakageError: A model does not answer with the classes of the data, or with numbers; the
            design is of another data set; or a question has too few rows for each model to have
            members and others among them.
        PlanError: The data set is none, or its examples cannot be put into one batch.
    """
    _check_callers(train, dataset, design, recipe, target, keep)
    rows = _rows(design, questions)
    said = _checked({} if known is None else known, design, rows)
    asked, seeds = design.asked, design.seeds()
    labels = _labels(dataset, asked)
    for model in range(design.models):
        if model in said:
            continue
        own = target if model == 0 and target is not None else None
        answer = train(design.trained_on(model), seed=seeds[model]) if own is None else own
        arguments.called("target" if own is not None else "train", answer, _A_MODEL, takes=1)
        try:
            said[model] = {
                name: _ask(answer, dataset, asked[rows[name]], question.signal)
                for name, question in questions.items()
            }
        except LeakageError as error:
            raise LeakageError(f"model {model}: {error}") from error
        keep(model, said[model])
    return {
        name: ScoreTable(
            signals=np.stack([said[model][name] for model in range(design.models)], 1),
            members=design.members()[chosen],
            labels=labels[chosen],
            recipes=(recipe,) * design.models,
            seeds=seeds,
            examples=asked[chosen],
        )
        for name, chosen in rows.items()
    }


def _check_callers(
    train: Train,
    dataset: MapStyle,
    design: ShadowDesign,
    recipe: str,
    target: Answer | None,
    keep: object,
) -> None:
    """Refuses what is of another kind, before any model is trained."""
    told = "a function of indices and a seed that gives a model, train(indices, *, seed)"
    if isinstance(train, nn.Module):
        raise LeakageError(f"train: expected {told}, got a model")
    arguments.called("train", train, told, takes=1, seed=True)
    arguments.called("keep", keep, "a function that gets what a model said")
    if target is not None:
        arguments.called("target", target, _A_MODEL, takes=1)
    arguments.instance("recipe", recipe, str)
    arguments.instance("design", design, ShadowDesign)
    every = np.concatenate([design.always, design.pool, design.population])
    examples = check_dataset(dataset)
    if len(every) and int(every.max()) >= examples:
        raise LeakageError(
            f"design: expected indices of the {examples} examples of the data set, got "
            f"{int(every.max())}; it is of another data set"
        )


def _rows(design: ShadowDesign, questions: Mapping[str, Question]) -> dict[str, Indices]:
    """The rows of each question's table, before any model is trained for one that cannot be."""
    for name, question in arguments.named("questions", questions, "questions").items():
        arguments.instance(f"questions: {name}", question, Question)
    rows = {name: design.rows(question.most) for name, question in questions.items()}
    for name, chosen in rows.items():
        count = design.members()[chosen].sum(0)
        if not ((count > 0) & (count < len(chosen))).all():
            raise LeakageError(
                f"most: expected members and others of every model among the {len(chosen)} rows "
                f"that {name} asks about, got none of model "
                f"{int(np.argmin((count > 0) & (count < len(chosen))))}; ask about more"
            )
    return rows


def _checked(
    known: Mapping[int, Mapping[str, Numbers]], design: ShadowDesign, rows: Mapping[str, Indices]
) -> dict[int, Mapping[str, Numbers]]:
    """What is known of models that answered every question."""
    for model, said in arguments.instance("known", known, Mapping).items():  # type: ignore[type-abstract]  # is asked alone
        arguments.instance(f"known: of model {shown(model)}", said, Mapping)  # type: ignore[type-abstract]  # as above
        for name in rows.keys() & said.keys():
            own = said[name]
            whole = isinstance(own, np.ndarray) and own.dtype == np.float64
            of_one = type(model) is int and model in range(design.models)
            if not whole or not of_one or own.shape != rows[name].shape:
                got = f"{own.dtype} {list(own.shape)}" if whole else shown(own)
                raise LeakageError(
                    f"known: expected signals of {len(rows[name])} examples, float64, from models "
                    f"0 to {design.models - 1}, got {got} from model {shown(model)} for {name}; "
                    "they are of another design, leave them out"
                )
            if not np.isfinite(own).all():
                raise LeakageError(
                    f"known: expected finite numbers, got others from model {model} for {name}; "
                    "leave that model out, and it is trained anew"
                )
    return {model: said for model, said in known.items() if rows.keys() <= said.keys()}


def _ask(answer: Answer, dataset: MapStyle, indices: Indices, signal: Signal) -> Numbers:
    """What a model says of these examples, asked as it will be in use."""
    if isinstance(answer, nn.Module) and any(layer.training for layer in answer.modules()):
        raise LeakageError(
            "expected a model that answers as it will in use, got one in training mode; return "
            "model.eval()"
        )
    with torch.no_grad():
        parts = [signal(answer, *batch) for batch in _batches(dataset, indices)]
    for part in parts:
        arguments.instance("signal", part, np.ndarray)
    said = np.concatenate(parts) if all(part.ndim for part in parts) else parts[0]
    if said.dtype != np.float64 or said.shape != indices.shape:
        raise LeakageError(
            f"signal: expected float64 for each of {len(indices)} examples, got {said.dtype} "
            f"{list(said.shape)}"
        )
    if not np.isfinite(said).all():
        row = int(np.argmin(np.isfinite(said)))
        raise LeakageError(
            f"signal: expected finite numbers, got {said[row]} of example {indices[row]} of the "
            "data set; that training diverged, train it anew"
        )
    return said


def _batches(dataset: MapStyle, indices: Indices) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(indices), _BATCH):
        chosen = torch.from_numpy(indices[start : start + _BATCH])
        pair = read(dataset, PhysicalBatch(indices=chosen, rows=len(chosen), last=True))
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise LeakageError(
                "dataset: expected pairs of an image and a label, got "
                f"{len(pair) if isinstance(pair, (tuple, list)) else type(pair).__name__} of each "
                "example"
            )
        yield pair[0], arguments.labels(pair[1])


def _labels(dataset: MapStyle, indices: Indices) -> Indices:
    found: Indices = np.concatenate(
        [labels.cpu().numpy().astype(np.int64) for _, labels in _batches(dataset, indices)]
    )
    return found
