"""Linear layers on any leading dimensions."""

from collections.abc import Callable, Sequence
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
from privacy.clipping.tuner import Kernel, Tuner

__all__ = ["LinearRule"]

_CACHE = 1 << 20
"""Bytes of products written down at a time: what a core's own cache holds with room to spare."""


class LinearRule:
    """The rule of one linear layer.

    On a plain batch of rows no per-example gradient is formed: its norm is |x| |dy| (Goodfellow
    2015, arXiv 1510.01799). With positions between the example and the features, the tuner chooses
    among keeping the gradients, forming them for their norms only, and Gram matrices over positions
    (Li et al. 2022, arXiv 2110.05679).
    """

    def __init__(self, layer: nn.Linear, name: str, tuner: Tuner) -> None:
        self.layer = layer
        self.name = name
        self.tuner = tuner
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
        """Norms alone for a batch of rows; the fastest kernel where there are positions to add."""
        layer, parts = self.layer, list[tuple[nn.Parameter, PerExampleGradients]]()
        # Norms of gradients that were rounded to bfloat16 would be too small.
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        x, dy = inputs.to(dtype), output_gradient.to(dtype)
        if layer.weight.requires_grad:
            weight = cast(nn.Parameter, layer.weight)
            parts.append((weight, self._weight_part(x, dy)))
        if layer.bias is not None and layer.bias.requires_grad:
            positions = tuple(range(1, dy.dim() - 1))
            parts.append((layer.bias, Instantiated([dy.sum(positions) if positions else dy])))
        return parts

    def gradients_of_copies(
        self,
        inputs: torch.Tensor,
        saved: Sequence[torch.Tensor],
        output_gradient: torch.Tensor,
        *,
        copies: int,
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """The same of examples of so many adjacent rows each: copies are positions."""
        x, dy = (torch.unflatten(t, 0, (-1, copies)) for t in (inputs, output_gradient))
        return self.per_example_gradients(x, saved, dy)

    def _weight_part(
        self, inputs: torch.Tensor, output_gradient: torch.Tensor
    ) -> PerExampleGradients:
        """The weight's part, on a batch of rows or by the fastest kernel."""
        if inputs.dim() == 2:
            squares = row_squared_norms(inputs) * row_squared_norms(output_gradient)
            return Deferred(squares, inputs, output_gradient, _weight_gradient, _instantiated)
        x, dy = (values.flatten(1, -2) for values in (inputs, output_gradient))
        return self.tuner.run(self.name, _kernels(x, dy), x, dy)


def _kernels(inputs: torch.Tensor, output_gradient: torch.Tensor) -> list[Kernel]:
    """Every way to the weight's gradients from [n, positions, features], likely ones first."""
    examples, positions, features = inputs.shape
    outputs = output_gradient.shape[2]
    product = float(examples * positions * features * outputs)
    gram = float(examples * positions**2 * (features + outputs)) + product
    one, pairs = (count * inputs.element_size() for count in (features * outputs, positions**2))
    return [
        Kernel(
            name="product",
            run=lambda x, dy: Instantiated([_instantiated(x, dy)]),
            room=examples * one,
            work=product,
        ),
        _deferring("product", _product_squares, room=one, work=2 * product),
        _deferring("gram", _gram_squares, room=2 * pairs, work=gram),
    ]


def _deferring(
    name: str,
    squares: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    room: int,
    work: float,
) -> Kernel:
    """A kernel that finds norms only, and leaves the clipped sum to one matrix product."""

    def run(inputs: torch.Tensor, output_gradient: torch.Tensor) -> PerExampleGradients:
        found = squares(inputs, output_gradient)
        return Deferred(found, inputs, output_gradient, _weight_gradient, _instantiated)

    return Kernel(name=f"{name}, then native", run=run, room=room, work=work)


def _instantiated(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """Per-example weight gradients [n, out, in], summed over positions."""
    if inputs.dim() == 2:
        inputs, output_gradient = inputs.unsqueeze(1), output_gradient.unsqueeze(1)
    return torch.bmm(output_gradient.mT, inputs)


def _weight_gradient(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """The weight gradient [out, in], summed over examples and positions."""
    return output_gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)


def _product_squares(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """Squared norms of gradients that are formed a few at a time, rounded up, float64 [n]."""
    found = []
    for x, dy in _chunks(inputs, output_gradient, inputs.shape[2] * output_gradient.shape[2]):
        found.append(row_squared_norms(_instantiated(x, dy).flatten(1)))
    rounding = inputs.shape[1] * _unit(inputs) * _most(inputs, output_gradient)
    return (torch.cat(found).sqrt() + rounding).square()


def _gram_squares(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """Squared norms as inner products of two Gram matrices, rounded up, float64 [n]."""
    found = []
    for x, dy in _chunks(inputs, output_gradient, inputs.shape[1] ** 2):
        product = torch.bmm(x, x.mT).mul_(torch.bmm(dy, dy.mT))
        found.append(product.flatten(1).sum(1, dtype=torch.float64))
    terms = inputs.shape[2] + output_gradient.shape[2] + 2
    rounding = terms * _unit(inputs) * _most(inputs, output_gradient).square()
    return torch.cat(found).clamp(min=0) + rounding


def _most(inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """The norm if no position cancelled another, float64 [n]: what rounding is in proportion to."""
    rows = [values.flatten(0, 1) for values in (inputs, output_gradient)]
    squares = row_squared_norms(rows[0]) * row_squared_norms(rows[1])
    return squares.sqrt().view(inputs.shape[:2]).sum(1)


def _unit(values: torch.Tensor) -> float:
    """The largest relative error of one operation in the values' dtype."""
    return torch.finfo(values.dtype).eps / 2


def _chunks(
    inputs: torch.Tensor, output_gradient: torch.Tensor, size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Examples by the few, whose products of `size` values each fit the cache."""
    few = max(1, _CACHE // (size * inputs.element_size()))
    return list(zip(torch.split(inputs, few), torch.split(output_gradient, few), strict=True))
