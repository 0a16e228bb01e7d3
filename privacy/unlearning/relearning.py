"""Relearning time: how soon a model knows again who left, beside models that never knew them.

What was only covered comes back in a few steps. An oracle that is taught the same people takes as
long as it takes to learn them for the first time.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from privacy.errors import UnlearningError
from privacy.trial import twin
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.learner import learning
from privacy.unlearning.models import Answers, checked_models
from privacy.validate import shown

__all__ = ["Relearning", "relearning_time"]


@final
@dataclass(frozen=True, kw_only=True)
class Relearning:
    """Steps until who left is known again; None where that took more than `most`.

    Attributes:
        unlearned: Of the model that forgot.
        oracles: Of models that never knew them.
        most: After how many steps a training was ended.

    Example:
        >>> Relearning(unlearned=5, oracles=(40, 60, None), most=100).ratio
        0.08333333333333333
    """

    unlearned: int | None
    oracles: tuple[int | None, ...]
    most: int

    @property
    def ratio(self) -> float:
        """The model's steps over the oracles' median; far below 1 they were never forgotten.

        Whoever did not arrive counts as `most`, so that it is a bound where one did not.
        """
        own = self._counted(self.unlearned)
        return own / max(1, statistics.median(self._counted(each) for each in self.oracles))

    @property
    def faster(self) -> bool:
        """Whether the model knew them again before any oracle did."""
        return self._counted(self.unlearned) < min(self._counted(each) for each in self.oracles)

    def _counted(self, steps: int | None) -> int:
        return self.most if steps is None else steps


def relearning_time(
    unlearned: nn.Module,
    oracles: Sequence[nn.Module],
    *,
    forget: Any,
    accuracy: float,
    learning_rate: float = 0.01,
    batch_size: int = 64,
    most: int = 1000,
    seed: int = 0,
) -> Relearning:
    """Trains copies of the models on who left, all alike, until they know them.

    Plain stochastic gradient descent, without momentum; after each step the accuracy on all of who
    left is looked at. No model is changed.

    Args:
        unlearned: The model that forgot.
        oracles: At least one that was trained without them.
        forget: Who left, as for a `Heuristic`.
        accuracy: What is waited for, in (0, 1]: that of the model before it forgot.
        learning_rate: > 0.
        batch_size: At least 1.
        most: Steps after which a training ends, at least 1.
        seed: Of the order of examples, at least 0.

    Raises:
        UnlearningError: An argument is not as said, or a training diverged.
    """
    models = [unlearned, *checked_models(oracles, least=1)]
    for each in models:
        if not isinstance(each, nn.Module):
            raise UnlearningError(f"model: expected a torch.nn.Module, got {shown(each)}")
    examples = Examples.of("forget", forget)
    rows.within("accuracy", accuracy, "a share in (0, 1]", lambda x: 0 < x <= 1)
    rows.positive("learning_rate", learning_rate)
    for name, value in (("batch_size", batch_size), ("most", most)):
        rows.whole(name, value, least=1)
    rows.whole("seed", seed, least=0)
    found = [
        _steps(twin(each), examples, accuracy, learning_rate, batch_size, most, seed)
        for each in models
        if isinstance(each, nn.Module)
    ]
    return Relearning(unlearned=found[0], oracles=tuple(found[1:]), most=most)


def _steps(
    model: nn.Module,
    examples: Examples,
    accuracy: float,
    learning_rate: float,
    batch_size: int,
    most: int,
    seed: int,
) -> int | None:
    """How many until the accuracy is there; None if it is not after `most`."""
    steps = 0
    if Answers(model).accuracy(examples) >= accuracy:
        return steps
    with learning(model, seed=seed) as learner:
        learner.descend(learning_rate=learning_rate, momentum=0.0, weight_decay=0.0)
        while True:
            for images, labels in examples.batches(batch_size, learner.generator):
                learner.step(learner.loss(images, labels))
                steps += 1
                if Answers(model).accuracy(examples) >= accuracy:
                    return steps
                if steps >= most:
                    return None
