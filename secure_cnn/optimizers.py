"""Muon: steps of equal length in every direction for filters, Nesterov's SGD for all else.

An optimizer turns gradients into a step and knows nothing of where they came from, so it may follow
a private step's noised gradient as well: what is done to that costs no epsilon.
"""

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from secure_cnn.errors import RunError

__all__ = ["Muon", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: singular values in (0, 1] end near 1, the small ones soon."""
_ITERATIONS = 3
_TINY = 1e-7


@final
class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton and Schulz's iteration (Jordan et al. 2024), for filters.

    A filter of a convolution is the matrix `[outputs, inputs * height * width]`. Those with more
    than one input channel are stepped by `filter_rate` times the rate, in parts of the filter's own
    length, and are then brought back to the length that they had at first: behind a normalising
    layer only their direction counts. All other parameters take steps of SGD with Nesterov's
    momentum and weight decay, filters that are 0 at first too: they have no length to keep.

    Both kinds are groups of this one optimizer, whose `lr` is the same, so that a schedule moves
    both.

    Args:
        model: Its parameters that are not frozen are trained.
        lr: The rate, > 0.
        filter_rate: Times the rate, for filters, > 0.
        momentum: In [0, 1).
        weight_decay: Of all but filters, at least 0.

    Raises:
        RunError: A number is outside its range, or nothing of the model is to be trained.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
        >>> [len(group["params"]) for group in Muon(model, lr=0.1).param_groups]
        [1, 3]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        filter_rate: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("filter_rate", filter_rate)):
            if not (math.isfinite(value) and value > 0):
                raise RunError(f"{name}: expected a finite number > 0, got {value}")
        if not 0 <= momentum < 1:
            raise RunError(f"momentum: expected a number in [0, 1), got {momentum}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise RunError(f"weight_decay: expected a finite number >= 0, got {weight_decay}")
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        if not trained:
            raise RunError("model: expected parameters to train, got none that is not frozen")
        filters = {id(layer.weight) for layer in model.modules() if _has_matrix(layer)}
        split = [
            {"params": [w for w in trained if id(w) in filters], "filter_rate": filter_rate},
            {"params": [w for w in trained if id(w) not in filters], "filter_rate": 0.0},
        ]
        groups = [group for group in split if group["params"]]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there; a parameter without one stays as it is.

        Raises:
            RunError: There is a closure: the loss is not computed anew here.
        """
        if closure is not None:
            raise RunError("closure: expected none, a step takes the gradients that are there")
        for group in self.param_groups:
            take = _filter_step if group["filter_rate"] else _other_step
            for weight in group["params"]:
                if weight.grad is not None:
                    take(weight, self.state[weight], group)


def orthogonalized(matrix: Tensor, *, iterations: int = _ITERATIONS) -> Tensor:
    """The nearest matrix whose singular values are all 1, roughly: they end between 0.5 and 1.3.

    Args:
        matrix: Float `[rows, columns]`.
        iterations: At least 1; with few, singular values far below the largest stay below that.

    Source: Newton and Schulz's iteration with the coefficients of Jordan et al. (2024).

    Example:
        >>> found = orthogonalized(torch.diag(torch.tensor([3.0, 2.0])), iterations=5)
        >>> bool(((found.diag() > 0.5) & (found.diag() < 1.3)).all())
        True
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    first, second, third = _COEFFICIENTS
    found: Tensor = wide / (wide.norm() + _TINY)
    for _ in range(iterations):
        square = found @ found.T
        found = first * found + (second * square + third * square @ square) @ found
    return found if wide is matrix else found.T


def _has_matrix(layer: nn.Module) -> bool:
    """Whether a layer's weights are filters over several channels, and have a length to keep."""
    if not isinstance(layer, nn.Conv2d) or layer.weight.shape[1] == 1:
        return False
    return bool(layer.weight.detach().any())


def _direction(weight: Tensor, gradient: Tensor, state: Any, momentum: float) -> Tensor:
    """Nesterov's: the gradient and the momentum that it has become part of."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    state["momentum"].mul_(momentum).add_(gradient)
    moved: Tensor = gradient + momentum * state["momentum"]
    return moved


def _filter_step(weight: Tensor, state: Any, group: dict[str, Any]) -> None:
    gradient = weight.grad
    assert gradient is not None, "the caller has looked"
    if "length" not in state:
        state["length"] = weight.norm()
    matrix = _direction(weight, gradient, state, group["momentum"]).reshape(len(weight), -1)
    step = orthogonalized(matrix).reshape(weight.shape)
    part = group["lr"] * group["filter_rate"] / math.sqrt(min(matrix.shape))
    weight.sub_(step * (part * state["length"]))
    weight.mul_(state["length"] / (weight.norm() + _TINY))


def _other_step(weight: Tensor, state: Any, group: dict[str, Any]) -> None:
    assert weight.grad is not None, "the caller has looked"
    gradient = weight.grad + group["weight_decay"] * weight
    weight.sub_(_direction(weight, gradient, state, group["momentum"]), alpha=group["lr"])
