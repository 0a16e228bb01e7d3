"""What all methods without a guarantee have in common: how they are called, and their settings."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn

from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.learner import Change, Learner, learning

__all__ = ["Descent", "Heuristic"]


@dataclass(frozen=True, kw_only=True)
class Heuristic(ABC):
    """A method without a guarantee: it is called as `method(model, retain, forget)`.

    No guarantee: nothing bounds what is still told about the people who leave. What it did is
    measured against models that were really trained without them (`oracle_gap`), and not known
    otherwise.

    Attributes:
        seed: Of the order of examples, of drawn labels and of dropout, at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        rows.whole("seed", self.seed, least=0)
        self._check()

    def __call__(self, model: nn.Module, retain: Any, forget: Any) -> Change:
        """Changes the model, in place.

        Only parameters that require a gradient are trained, and the statistics of normalising
        layers among them. Modes, `.grad` and global random states are afterwards as they were.

        Args:
            model: A module that gives logits `[n, classes]` for images `[n, ...]`.
            retain: Who stays: a map-style data set of pairs of image and label, or a list of
                batches (images `[n, ...]`, labels `[n]`).
            forget: Who leaves, in either form.

        Returns:
            How far the weights moved, and in how many steps.

        Raises:
            UnlearningError: Model or examples are not as said, there is nobody to stay or to leave,
                the weights did not move or are not finite. The model is as it was before, as it is
                on any other error, and when it is interrupted.
        """
        staying, leaving = Examples.of("retain", retain), Examples.of("forget", forget)
        with learning(model, seed=self.seed) as learner:
            self._forget(learner, staying, leaving)
            return learner.change()

    @abstractmethod
    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        """Takes the steps."""

    @abstractmethod
    def _check(self) -> None:
        """Refuses settings that are out of their range."""


@dataclass(frozen=True, kw_only=True)
class Descent(Heuristic):
    """A method of stochastic gradient descent with momentum.

    Attributes:
        epochs: How often the examples are gone through, at least 1.
        learning_rate: > 0.
        momentum: In [0, 1).
        weight_decay: At least 0.
        batch_size: Examples of who stays in a step, at least 1.
    """

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256

    def _check(self) -> None:
        rows.whole("epochs", self.epochs, least=1)
        rows.whole("batch_size", self.batch_size, least=1)
        rows.positive("learning_rate", self.learning_rate)
        rows.within("momentum", self.momentum, "a number from 0 to below 1", lambda x: 0 <= x < 1)
        rows.within("weight_decay", self.weight_decay, "a number >= 0", lambda x: x >= 0)

    def _descend(self, learner: Learner) -> None:
        learner.descend(
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
