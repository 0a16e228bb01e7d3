"""The diagonal of the Fisher information: the mean of each example's own squared gradient.

Squares of a batch's mean gradient, which published code takes for it, are others: they shrink as
batches grow, and cancel where examples disagree.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics.learner import Learner

__all__ = ["fisher_diagonal"]

_MOST_NUMBERS = 2**24
"""Numbers of per-example gradients at once."""

Squares = Callable[[Tensor, Tensor], list[Tensor]]
"""Sums over examples of their squared gradients, from images and labels on the model's device."""


def fisher_diagonal(learner: Learner, examples: Examples, *, batch_size: int) -> list[Tensor]:
    """Mean squared gradient of each trained weight, float64, in the order of the parameters.

    Of the cross-entropy of each example's own label, in evaluation mode. `batch_size` bounds the
    memory and nothing else: the result does not depend on it.

    Raises:
        UnlearningError: The model cannot take the images, or gives no logits of their labels.
    """
    learner.model.eval()
    weights = learner.parameters
    totals = [torch.zeros_like(each, dtype=torch.float64) for each in weights.values()]
    numbers = sum(each.numel() for each in weights.values())
    size = max(1, min(batch_size, _MOST_NUMBERS // numbers))
    squares: Squares | None = None
    for images, labels in examples.batches(size):
        with torch.no_grad():
            learner.logits(images, labels)  # says what does not fit in plain words
        here, own = images.to(learner.device), labels.to(learner.device)
        if squares is None:
            squares = _fastest(learner.model, weights, here, own)
        for total, found in zip(totals, squares(here, own), strict=True):
            total += found
    return [total / len(examples) for total in totals]


def _fastest(
    model: nn.Module, weights: dict[str, nn.Parameter], images: Tensor, labels: Tensor
) -> Squares:
    """All examples at once where the model lets itself be vectorised, else one after the other."""

    def together(images: Tensor, labels: Tensor) -> list[Tensor]:
        values = {name: each.detach() for name, each in weights.items()}
        found = vmap(grad(loss), in_dims=(None, 0, 0))(values, images, labels)
        return [found[name].double().square().sum(0) for name in weights]

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        said = functional_call(model, values, (image[None],))
        return F.cross_entropy(said, label[None])

    def apart(images: Tensor, labels: Tensor) -> list[Tensor]:
        sums = [torch.zeros_like(each, dtype=torch.float64) for each in weights.values()]
        for row in range(len(labels)):
            own = F.cross_entropy(model(images[row : row + 1]), labels[row : row + 1])
            gradients = torch.autograd.grad(own, list(weights.values()), allow_unused=True)
            for total, found in zip(sums, gradients, strict=True):
                if found is not None:
                    total += found.double().square()
        return sums

    try:
        together(images[:1], labels[:1])
    except Exception:  # what cannot be vectorised says so in many ways
        return apart
    return together
