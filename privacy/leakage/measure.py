"""Three lines for a training function of one's own: how well are its members told?"""

import secrets
from collections.abc import Callable, Mapping

import numpy as np

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.promise import Promise
from privacy.leakage.report import (
    MEMBERSHIP_ATTACKS,
    LeakageReport,
    checked_attacks,
    membership_report,
)
from privacy.leakage.shadows import ShadowDesign, Train, copies, score_tables
from privacy.leakage.signals import Question
from privacy.leakage.table import ScoreTable
from privacy.sampling import MapStyle
from privacy.statistics import Numbers
from privacy.validate import check_dataset

__all__ = ["membership"]

_FEWEST_EXAMPLES = 8
_QUESTION = Question()
_SPLIT = 1
"""Keeps what draws the target's half apart from what draws those of its shadow models."""


def membership(
    train: Train,
    dataset: MapStyle,
    *,
    shadows: int = 16,
    pool: int | None = None,
    question: Question = _QUESTION,
    attacks: Mapping[str, Callable[[ScoreTable], Numbers]] = MEMBERSHIP_ATTACKS,
    promise: Promise | None = None,
    key: bytes | None = None,
    seed: int = 0,
) -> LeakageReport:
    """Trains a target on half of a data set and shadow models on other halves, and attacks it.

    What it says is of models that `train` makes of half as many examples: those of more give away
    no more, as a rule. `train` is called `shadows` + 1 times. For a target that is there already,
    or to go on after an interruption, see `ShadowDesign.around` and `score_tables`.

    Args:
        train: Called with the indices of some examples, int64 `[n]`, and a `seed`; gives a model
            in evaluation mode that was trained on those alone.
        dataset: Map-style, of pairs of an image and a label; at least 8 examples.
        shadows: Even, at least 2. 16 tell well; with 4 the strongest attacks are a little weaker.
        pool: Examples that are guessed about, at most; None takes nine tenths of all. Of the rest
            every model is trained on half, and none on the other half. Examples that are in the
            data set more than once are never in it.
        question: What models are asked.
        attacks: By name.
        promise: What was promised of such a training; None where nothing was.
        key: At least 16 secret bytes, by which the most exposed examples are told; None draws one
            that nobody knows.
        seed: Of who is trained on what, and of the models.

    Raises:
        LeakageError: There are too few examples or shadow models, an argument is none, or a model
            does not answer.
        PlanError: The data set is none, or its examples cannot be put into one batch.
    """
    examples = check_dataset(dataset)
    if examples < _FEWEST_EXAMPLES:
        raise LeakageError(
            f"dataset: expected at least {_FEWEST_EXAMPLES} examples, got {examples}"
        )
    arguments.whole("seed", seed, least=0)
    if promise is not None:
        arguments.instance("promise", promise, Promise)
    order = np.random.default_rng([seed, _SPLIT]).permutation(examples)
    secret = arguments.secret("key", secrets.token_bytes(32) if key is None else key)
    members, others = np.split(order, [len(order) // 2])
    design = ShadowDesign.around(
        members, others, shadows=shadows, pool=pool, seed=seed, apart=copies(dataset)
    )
    # Asked here as well as by the report: that comes when all models are trained.
    asks_all = arguments.instance("question", question, Question).most is None
    checked_attacks(attacks, population=asks_all and len(design.population) > 0)
    table = score_tables(train, dataset, design, recipe="train", questions={"": question})[""]
    return membership_report(table, key=secret, attacks=attacks, promise=promise)
