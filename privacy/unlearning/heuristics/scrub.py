"""SCRUB: a student leaves its teacher on who leaves, and stays near it on who stays."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.errors import UnlearningError
from privacy.trial import twin
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.heuristic import Descent
from privacy.unlearning.heuristics.learner import Learner, logits_of
from privacy.validate import shown

__all__ = ["SCRUB"]


@final
@dataclass(frozen=True, kw_only=True)
class SCRUB(Descent):
    """Epochs of max-steps on who leaves, each followed by min-steps on who stays.

    A max-step raises the divergence KL(teacher || student) at a temperature, where the teacher is
    the model as it came; a min-step lowers gamma * cross-entropy + alpha * that divergence. After
    the first `max_epochs` there are min-steps alone.

    No guarantee. The published code's defaults are small steps: a model may come out hardly
    changed, and after too many max-steps people stand out by being answered worse than strangers.

    Source: Kurmanji et al. 2023, arXiv 2302.09880; defaults of its published code
    (github.com/meghdadk/SCRUB), without its rewinding.

    Attributes:
        gamma: Weight of the cross-entropy in min-steps, at least 0.
        alpha: Weight of the divergence in min-steps, at least 0.
        temperature: Of both sides of the divergence, > 0.
        epochs: How often who stays is gone through, at least 1.
        max_epochs: Before how many of these who leaves is gone through, at least 1.
        learning_rate: > 0.
        decay: Factor of the learning rate after each epoch of `decay_after`, in (0, 1].
        decay_after: Numbers of epochs.
        forget_batch_size: Examples of a max-step, at least 1.

    Raises:
        UnlearningError: A setting is out of its range.

    Example:
        >>> SCRUB().temperature, SCRUB().learning_rate
        (4.0, 0.0005)
    """

    epochs: int = 3
    learning_rate: float = 5e-4
    batch_size: int = 128
    gamma: float = 0.99
    alpha: float = 0.001
    temperature: float = 4.0
    max_epochs: int = 2
    decay: float = 0.1
    decay_after: tuple[int, ...] = (3, 5, 9)
    forget_batch_size: int = 32

    def _check(self) -> None:
        super()._check()
        for name in ("gamma", "alpha"):
            rows.within(name, getattr(self, name), "a number >= 0", lambda x: x >= 0)
        rows.positive("temperature", self.temperature)
        for name in ("max_epochs", "forget_batch_size"):
            rows.whole(name, getattr(self, name), least=1)
        rows.within("decay", self.decay, "a number in (0, 1]", lambda x: 0 < x <= 1)
        if not isinstance(self.decay_after, tuple):
            raise UnlearningError(
                f"decay_after: expected a tuple of numbers of epochs, got {shown(self.decay_after)}"
            )
        for each in self.decay_after:
            rows.whole("decay_after", each, least=1)

    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        teacher = twin(learner.model).eval()
        self._descend(learner)
        for epoch in range(1, self.epochs + 1):
            if epoch <= self.max_epochs:
                for images, labels in forget.batches(self.forget_batch_size, learner.generator):
                    said = learner.logits(images, labels)
                    learner.step(-self._apart(teacher, learner, images, labels, said))
            for images, labels in retain.batches(self.batch_size, learner.generator):
                said = learner.logits(images, labels)
                own = F.cross_entropy(said, labels.to(said.device))
                apart = self._apart(teacher, learner, images, labels, said)
                learner.step(self.gamma * own + self.alpha * apart)
            learner.scale_rate(self.decay ** self.decay_after.count(epoch))

    def _apart(
        self, teacher: nn.Module, learner: Learner, images: Tensor, labels: Tensor, said: Tensor
    ) -> Tensor:
        """KL(teacher || student) at the temperature, times its square: the mean of a batch."""
        with torch.no_grad():
            taught = logits_of(teacher, images.to(learner.device), labels)
        found = F.kl_div(
            F.log_softmax(said / self.temperature, dim=1),
            F.log_softmax(taught / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return found * self.temperature**2
