"""Linear layers on any leading dimensions."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from privacy.clipping.gradients import (
    Deferred,
    Instantiated,
    PerExampleGradients,
    row_squared_norms,
)

__all__ = ["LinearRule"]


class LinearRule:
    """The rule of one linear layer.

    On a plain batch of rows no per-example gradient is formed: its norm is |x| |dy| (Goodfellow
    2015, arXiv 1510.01799).

    Example:
        >>> LinearRule(nn.Linear(3, 2)).forward(torch.zeros(4, 3))[0].shape
        torch.Size([4, 2])
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer itself."""
        return F.linear(inputs, self.layer.weight, self.layer.bias), ()

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """Dy W."""
        return output_gradient @ self.layer.weight.to(output_gradient.dtype)

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Norms alone for a batch of rows; gradients where there are positions to add over."""
        layer, parts = self.layer, list[tuple[nn.Parameter, PerExampleGradients]]()
        inputs = inputs.to(output_gradient.dtype)
        if layer.weight.requires_grad:
            weight = cast(nn.Parameter, layer.weight)
            parts.append((weight, _weight_part(inputs, output_gradient)))
        if layer.bias is not None and layer.bias.requires_grad:
            positions = tuple(range(1, output_gradient.dim() - 1))
            total = output_gradient.sum(positions) if positions else output_gradient
            parts.append((layer.bias, Instantiated([total])))
        return parts


def _weight_part(inputs: torch.Tensor, output_gradient: torch.Tensor) -> PerExampleGradients:
    """The weight's part, by the cheapest exact way for the number of positions."""
    if inputs.dim() > 2:
        return Instantiated([_instantiated(inputs, output_gradient)])
    squares = row_squared_norms(inputs) * row_squared_norms(output_gradient)
    return Deferred(squares, inputs, output_gradient, lambda x, dy: dy.mT @ x, _instantiated)


def _instantiated(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """Per-example weight gradients [n, out, in], summed over positions."""
    examples = inputs.shape[0]
    x = inputs.reshape(examples, -1, inputs.shape[-1])
    dy = output_gradient.reshape(examples, -1, output_gradient.shape[-1])
    return torch.bmm(dy.mT, x)
