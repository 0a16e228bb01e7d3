"""Fine-tuning on who stays: the number that every other method has to beat."""

from dataclasses import dataclass
from typing import final

from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.heuristic import Descent
from privacy.unlearning.heuristics.learner import Learner

__all__ = ["FineTuning"]


@final
@dataclass(frozen=True, kw_only=True)
class FineTuning(Descent):
    """Trains on who stays alone, and hopes that the others are forgotten.

    No guarantee, and often hardly an effect: a model that fits its data has no reason to forget.
    Who leaves is only asked for so that nobody is in neither set by mistake.

    Defaults: those of the published code of SalUn for its fine-tuning (Fan et al. 2023, arXiv
    2310.12508; github.com/OPTML-Group/Unlearn-Saliency), 10 epochs of rate 0.01, batches of 256.

    Attributes:
        epochs: How often who stays is gone through, at least 1.
        learning_rate: > 0.

    Raises:
        UnlearningError: A setting is out of its range.

    Example:
        >>> import torch
        >>> images, labels = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 0, 1])
        >>> model = torch.nn.Linear(2, 2)
        >>> change = FineTuning(epochs=1)(
        ...     model, retain=[(images, labels)], forget=[(images[:1], labels[:1])]
        ... )
        >>> change.steps, change.weight_change > 0
        (1, True)
    """

    epochs: int = 10
    learning_rate: float = 0.01

    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        self._descend(learner)
        for _ in range(self.epochs):
            for images, labels in retain.batches(self.batch_size, learner.generator):
                learner.step(learner.loss(images, labels))
