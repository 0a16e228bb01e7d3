"""Layers that are linear in their parameters: Linear, Embedding and PReLU.

An Embedding is a Linear layer on one-hot rows, of which an example moves only those that it looks
up; a PReLU multiplies what is negative by a slope (He et al. 2015, arXiv 1502.01852).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.clipping.gradients import (
    GhostNorm,
    Instantiated,
    Parts,
    PerExampleGradients,
    Saved,
    row_squared_norms,
)
from privacy.clipping.tuner import Kernel, Tuner
from privacy.errors import UnsupportedLayer

__all__ = ["Affine", "EmbeddingRule", "LinearRule", "PReLURule"]

_CACHE = 1 << 20
"""Bytes of products written at a time: they fit a core's own cache, with some of it left."""


@dataclass(frozen=True)
class Affine:
    """Weight [out, in] and bias [out] of a linear map that is no layer of its own."""

    weight: nn.Parameter
    bias: nn.Parameter | None


class LinearRule:
    """The rule of one linear layer, on any leading dimensions.

    No per-example gradient of a plain row is formed: its norm is |x| |dy| (Goodfellow 2015, arXiv
    1510.01799). With positions between example and features, the tuner chooses among keeping the
    gradients, forming them for their norms only, and Gram matrices (Li et al. 2022, arXiv
    2110.05679).
    """

    def __init__(self, layer: nn.Linear | Affine, name: str, tuner: Tuner) -> None:
        self.layer, self.name, self.tuner = layer, name, tuner
        own = layer.weight, layer.bias
        self.parameters = tuple(each for each in own if isinstance(each, nn.Parameter))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer itself."""
        return F.linear(inputs, self.layer.weight, self.layer.bias), ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The output gradient times the weight matrix."""
        weight: Tensor = self.layer.weight
        return output_gradient @ weight.to(output_gradient.dtype)

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Norms alone for a batch of rows; the fastest kernel where there are positions to add."""
        layer, parts = self.layer, Parts()
        # Norms of gradients that were rounded to bfloat16 would be too small.
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        x, dy = inputs.to(dtype), output_gradient.to(dtype)
        if layer.weight.requires_grad:
            parts.append((cast(nn.Parameter, layer.weight), self._weight_part(x, dy)))
        if layer.bias is not None and layer.bias.requires_grad:
            positions = tuple(range(1, dy.dim() - 1))
            parts.append((layer.bias, Instantiated([dy.sum(positions) if positions else dy])))
        return parts

    def gradients_of_copies(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor, *, copies: int
    ) -> Parts:
        """Copies of an example are positions of it: the same products add them up."""
        x, dy = (torch.unflatten(t, 0, (-1, copies)) for t in (inputs, output_gradient))
        return self.per_example_gradients(x, saved, dy)

    def _weight_part(self, inputs: Tensor, output_gradient: Tensor) -> PerExampleGradients:
        if inputs.dim() == 2:
            squares = row_squared_norms(inputs) * row_squared_norms(output_gradient)
            return GhostNorm(squares, inputs, output_gradient, _weight_gradient, _instantiated)
        x, dy = (values.flatten(1, -2) for values in (inputs, output_gradient))
        return self.tuner.run(self.name, _kernels(x, dy), x, dy)


def _kernels(inputs: Tensor, output_gradient: Tensor) -> list[Kernel]:
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
            peak_bytes=examples * one,
            work=product,
        ),
        _ghost("product", _product_squares, peak_bytes=one, work=2 * product),
        _ghost("gram", _gram_squares, peak_bytes=2 * pairs, work=gram),
    ]


def _ghost(
    name: str, squares: Callable[[Tensor, Tensor], Tensor], *, peak_bytes: int, work: float
) -> Kernel:
    """A kernel that finds norms only, and leaves the clipped sum to one matrix product."""

    def run(inputs: Tensor, output_gradient: Tensor) -> PerExampleGradients:
        found = squares(inputs, output_gradient)
        return GhostNorm(found, inputs, output_gradient, _weight_gradient, _instantiated)

    return Kernel(name=f"{name}, then native", run=run, peak_bytes=peak_bytes, work=work)


def _instantiated(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Per-example weight gradients [n, out, in], summed over positions."""
    if inputs.dim() == 2:
        inputs, output_gradient = inputs.unsqueeze(1), output_gradient.unsqueeze(1)
    return torch.bmm(output_gradient.mT, inputs)


def _weight_gradient(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """The weight gradient [out, in], summed over examples and positions."""
    return output_gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)


def _product_squares(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Squared norms of gradients that are formed a few at a time, float64 [n]."""
    found = []
    for x, dy in _chunks(inputs, output_gradient, inputs.shape[2] * output_gradient.shape[2]):
        found.append(row_squared_norms(_instantiated(x, dy).flatten(1)))
    # The clipped sum is made by another product, which rounds otherwise: the norm is rounded up by
    # as much as its additions can lose, so that no released gradient is longer than it was said.
    rounding = inputs.shape[1] * _unit(inputs) * _most(inputs, output_gradient)
    return (torch.cat(found).sqrt() + rounding).square()


def _gram_squares(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Squared norms as inner products of two Gram matrices, rounded up likewise, float64 [n]."""
    found = []
    for x, dy in _chunks(inputs, output_gradient, inputs.shape[1] ** 2):
        product = torch.bmm(x, x.mT).mul_(torch.bmm(dy, dy.mT))
        found.append(product.flatten(1).sum(1, dtype=torch.float64))
    terms = inputs.shape[2] + output_gradient.shape[2] + 2
    rounding = terms * _unit(inputs) * _most(inputs, output_gradient).square()
    return torch.cat(found).clamp(min=0) + rounding


def _most(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """The norm if no position cancelled another, float64 [n]: what rounding is in proportion to."""
    rows = [values.flatten(0, 1) for values in (inputs, output_gradient)]
    squares = row_squared_norms(rows[0]) * row_squared_norms(rows[1])
    return squares.sqrt().view(inputs.shape[:2]).sum(1)


def _unit(values: Tensor) -> float:
    """The largest relative error of one operation in the values' dtype."""
    return torch.finfo(values.dtype).eps / 2


def _chunks(inputs: Tensor, output_gradient: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """A few examples at a time, whose products of `size` values each fit the cache."""
    few = max(1, _CACHE // (size * inputs.element_size()))
    return list(zip(torch.split(inputs, few), torch.split(output_gradient, few), strict=True))


class EmbeddingRule:
    """The rule of one embedding layer, for indices of any trailing dimensions.

    No table is formed for an example: the rows that it looks up are added up, each once. Refused is
    a layer that writes to its table in forward, whose gradients depend on how often the whole batch
    looks a row up, or whose gradients are sparse.
    """

    def __init__(self, layer: nn.Embedding, name: str) -> None:
        cures = {
            "max_norm": "it rescales the rows that examples look up, without noise",
            "scale_grad_by_freq": "it divides a gradient by a count over the whole batch",
            "sparse": "noise goes to every row, so no gradient is sparse",
        }
        for setting, reason in cures.items():
            if getattr(layer, setting):
                raise UnsupportedLayer(
                    f"{name}: Embedding with {setting} cannot be clipped by example: {reason}; "
                    f"make the layer without {setting}, or freeze it"
                )
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer itself."""
        return F.embedding(inputs, self.layer.weight, self.layer.padding_idx), ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """Never asked for: indices have no gradient."""
        raise AssertionError("indices have no gradient")

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Norms now, the clipped sum by the native kernel."""
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        dy = output_gradient.to(dtype)
        squares = self._squares(inputs, dy)
        part = GhostNorm(squares, inputs, dy, self._weight_gradient, self._instantiated)
        return [(cast(nn.Parameter, self.layer.weight), part)]

    def _squares(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Squared norms, float64 [n], of the rows that an example looks up; sums rounded up."""
        examples, rows = self._rows(inputs)
        dy = output_gradient.reshape(len(rows), -1)
        if rows.numel() == len(inputs):
            return row_squared_norms(dy) * self._counts(inputs.reshape(-1))
        keys = examples * self.layer.num_embeddings + rows
        places, where = torch.unique(keys, return_inverse=True)
        totals = dy.new_zeros(len(places), dy.shape[1]).index_add_(0, where, dy)
        lengths = row_squared_norms(dy).sqrt()
        most = lengths.new_zeros(len(places)).index_add_(0, where, lengths)
        rounding = most * (len(rows) // len(inputs)) * _unit(dy)
        norms = (row_squared_norms(totals).sqrt() + rounding).square()
        norms *= self._counts(places % self.layer.num_embeddings)
        owners = places // self.layer.num_embeddings
        return norms.new_zeros(len(inputs)).index_add_(0, owners, norms)

    def _instantiated(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Every example's whole table, [n, rows, width]: for a table that another layer shares."""
        examples, rows = self._rows(inputs)
        dy = output_gradient.reshape(len(rows), -1)
        dy = dy * self._counts(rows).unsqueeze(1)
        tables = dy.new_zeros(len(inputs) * self.layer.num_embeddings, dy.shape[1])
        tables.index_add_(0, examples * self.layer.num_embeddings + rows, dy)
        return tables.view(len(inputs), *self.layer.weight.shape)

    def _weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        padding = -1 if self.layer.padding_idx is None else self.layer.padding_idx
        gradient: Tensor = torch.ops.aten.embedding_dense_backward(
            output_gradient, inputs, self.layer.num_embeddings, padding, False
        )
        return gradient

    def _rows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """For each position of the batch its example and the row that it looks up, int64 both."""
        rows = inputs.reshape(-1).long()
        numbers = torch.arange(len(inputs), device=inputs.device)
        return numbers.repeat_interleave(inputs[:1].numel()), rows

    def _counts(self, rows: Tensor) -> Tensor:
        """Whether a row has a gradient: the padding has none."""
        padding = self.layer.padding_idx
        return torch.ones_like(rows, dtype=torch.bool) if padding is None else rows != padding


class PReLURule:
    """The rule of one PReLU layer, with one slope or one a channel."""

    def __init__(self, layer: nn.PReLU) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer itself."""
        return F.prelu(inputs, self.layer.weight), ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The output gradient, times the slope where the input is not positive."""
        slope: Tensor = self.layer.weight
        if slope.numel() > 1:
            slope = slope.view(-1, *[1] * (inputs.dim() - 2))
        sloped = output_gradient * slope
        return torch.where(inputs > 0, output_gradient, sloped).to(inputs.dtype)

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Output gradient times negative input, added over everything that shares a slope."""
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        product = output_gradient.to(dtype) * inputs.clamp(max=0)
        kept = 2 if self.layer.num_parameters > 1 else 1
        shared = product.reshape(*product.shape[:kept], -1).sum(-1)
        return [(self.layer.weight, Instantiated([shared.view(len(inputs), -1)]))]
