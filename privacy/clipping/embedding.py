"""Embedding: a table of which an example moves only the rows that it looks up."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from privacy.clipping.gradients import Deferred, PerExampleGradients, row_squared_norms
from privacy.errors import UnsupportedLayer

__all__ = ["EmbeddingRule"]


class EmbeddingRule:
    """The rule of one embedding layer, for indices of any trailing dimensions.

    No table is formed for an example: the rows that it looks up are added up, each once, and their
    norms are the gradient's.

    Args:
        layer: The layer; without `max_norm`, `sparse` and `scale_grad_by_freq`.

    Raises:
        UnsupportedLayer: The layer writes to its table in forward, or its gradients depend on how
            often the whole batch looks a row up, or are sparse.
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

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer itself."""
        return F.embedding(inputs, self.layer.weight, self.layer.padding_idx), ()

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """Never asked for: indices have no gradient."""
        raise AssertionError("indices have no gradient")

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Norms now, the clipped sum by the native kernel."""
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        dy = output_gradient.to(dtype)
        squares = self._squares(inputs, dy)
        part = Deferred(squares, inputs, dy, self._weight_gradient, self._instantiated)
        return [(cast(nn.Parameter, self.layer.weight), part)]

    def _squares(self, inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
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
        rounding = most * (len(rows) // len(inputs)) * torch.finfo(dy.dtype).eps / 2
        norms = (row_squared_norms(totals).sqrt() + rounding).square()
        norms *= self._counts(places % self.layer.num_embeddings)
        owners = places // self.layer.num_embeddings
        return norms.new_zeros(len(inputs)).index_add_(0, owners, norms)

    def _instantiated(self, inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
        """Every example's whole table, [n, rows, width]: for a table that another layer shares."""
        examples, rows = self._rows(inputs)
        dy = output_gradient.reshape(len(rows), -1)
        dy = dy * self._counts(rows).unsqueeze(1)
        tables = dy.new_zeros(len(inputs) * self.layer.num_embeddings, dy.shape[1])
        tables.index_add_(0, examples * self.layer.num_embeddings + rows, dy)
        return tables.view(len(inputs), *self.layer.weight.shape)

    def _weight_gradient(self, inputs: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
        """The native kernel's gradient, summed over the examples."""
        padding = -1 if self.layer.padding_idx is None else self.layer.padding_idx
        gradient: torch.Tensor = torch.ops.aten.embedding_dense_backward(
            output_gradient, inputs, self.layer.num_embeddings, padding, False
        )
        return gradient

    def _rows(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each position of the batch its example and the row that it looks up, int64 both."""
        rows = inputs.reshape(-1).long()
        numbers = torch.arange(len(inputs), device=inputs.device)
        return numbers.repeat_interleave(inputs[:1].numel()), rows

    def _counts(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether a row has a gradient: the padding has none."""
        padding = self.layer.padding_idx
        return torch.ones_like(rows, dtype=torch.bool) if padding is None else rows != padding
