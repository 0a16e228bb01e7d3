"""SalUn: who leaves gets random labels, and only the weights that matter for them are trained."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from privacy.errors import UnlearningError
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.heuristic import Descent
from privacy.unlearning.heuristics.learner import Learner

__all__ = ["SalUn"]


@final
@dataclass(frozen=True, kw_only=True)
class SalUn(Descent):
    """Each epoch trains on who leaves with random other labels, then on who stays.

    Only the `share` of the trained weights moves whose gradient of the mean loss of who leaves is
    the largest in magnitude; all others stay bit for bit what they are. That gradient is of all of
    them at once, in evaluation mode, so that it depends on no batch size.

    No guarantee: the labels are hidden more than anything is forgotten, and a linear probe of the
    features often finds them again.

    Source: Fan et al. 2023, arXiv 2310.12508, with random labels that are never the true ones, as
    in the paper; the published code (github.com/OPTML-Group/Unlearn-Saliency) draws from all.
    Defaults: its settings for 10 % of CIFAR-10.

    Attributes:
        share: Of the trained weights that move, in (0, 1].
        epochs: How often both are gone through, at least 1.
        learning_rate: > 0.
        forget_batch_size: Examples of who leaves in a step, at least 1.

    Raises:
        UnlearningError: A setting is out of its range.

    Example:
        >>> SalUn().share
        0.5
    """

    epochs: int = 10
    learning_rate: float = 0.013
    share: float = 0.5
    forget_batch_size: int = 256

    def _check(self) -> None:
        super()._check()
        rows.within("share", self.share, "a number in (0, 1]", lambda x: 0 < x <= 1)
        rows.whole("forget_batch_size", self.forget_batch_size, least=1)

    def _forget(self, learner: Learner, retain: Examples, forget: Examples) -> None:
        masks = self._salient(learner, forget)
        learner.descend(
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            masks=masks,
        )
        for _ in range(self.epochs):
            for images, labels in forget.batches(self.forget_batch_size, learner.generator):
                said = learner.logits(images, labels)
                drawn = _others(labels, said.shape[1], learner.generator)
                learner.step(F.cross_entropy(said, drawn.to(said.device)))
            for images, labels in retain.batches(self.batch_size, learner.generator):
                learner.step(learner.loss(images, labels))

    def _salient(self, learner: Learner, forget: Examples) -> list[Tensor]:
        """Which weights move: bool, in the order of the parameters."""
        learner.model.eval()
        weights = list(learner.parameters.values())
        sums = [torch.zeros_like(each) for each in weights]
        for images, labels in forget.batches(self.forget_batch_size):
            loss = learner.loss(images, labels) * len(labels)
            if not loss.requires_grad:
                break
            for total, found in zip(
                sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
            ):
                if found is not None:
                    total += found
        sizes = torch.cat([each.abs().reshape(-1) for each in sums])
        most = max(1, round(self.share * len(sizes)))
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        chosen[sizes.topk(most).indices] = True
        parts = torch.split(chosen, [each.numel() for each in weights])
        return [part.view_as(each) for part, each in zip(parts, weights, strict=True)]


def _others(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For each label one of the other classes, all as likely."""
    if classes < 2:
        raise UnlearningError(f"model: expected logits of at least 2 classes, got {classes}")
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return (labels.cpu() + shift) % classes
