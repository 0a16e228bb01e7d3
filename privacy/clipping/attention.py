"""Attention of several heads (Vaswani et al. 2017, arXiv 1706.03762), written out.

Its projections are linear maps with gradients of their own; what is between them, dropout too, is
plain autograd. The three input projections may lie in one parameter, each in some of its rows.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.clipping.gradients import Parts, PerExampleGradients, Saved
from privacy.clipping.linear import Affine, LinearRule
from privacy.clipping.rules import Record
from privacy.clipping.tuner import Tuner
from privacy.errors import UnsupportedLayer

__all__ = ["AttentionRule"]


class AttentionRule:
    """The rule of one MultiheadAttention layer, with the batch in the first or second dimension.

    The values are those of torch's own layer up to rounding. Refused are a sequence without a batch
    and `add_bias_kv`.
    """

    def __init__(self, layer: nn.MultiheadAttention, name: str, tuner: Tuner) -> None:
        if layer.bias_k is not None:
            raise UnsupportedLayer(
                f"{name}: MultiheadAttention with add_bias_kv has no rule; make the layer without "
                "it, or freeze it"
            )
        self.layer, self.name, self.tuner = layer, name, tuner
        self.parameters = tuple(layer.parameters())
        self._out = LinearRule(layer.out_proj, name, tuner)

    def compose(
        self,
        record: Record,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What `MultiheadAttention.forward` gives: outputs, and weights where they are asked for.

        As there, `is_causal` is a hint: the mask itself must be given, and is what counts.
        """
        sizes = [tuple(each.shape) for each in (query, key, value)]
        if any(len(size) != 3 for size in sizes) or query.is_nested or key.is_nested:
            raise UnsupportedLayer(
                f"{self.name}: expected query, key and value as batches of sequences, 3 dimensions "
                f"each, got {sizes}; give one example as a batch of one"
            )
        if is_causal and attn_mask is None:
            raise UnsupportedLayer(
                f"{self.name}: is_causal is a hint that needs the mask; give attn_mask="
                "torch.nn.Transformer.generate_square_subsequent_mask(length)"
            )
        layer = self.layer
        heads = [
            torch.unflatten(each, 2, (layer.num_heads, layer.head_dim)).transpose(1, 2)
            for each in self._projected(record, query, key, value)
        ]
        masks = _added(attn_mask, key_padding_mask, heads[0])
        if layer.add_zero_attn:
            heads[1:] = [F.pad(each, (0, 0, 0, 1)) for each in heads[1:]]
            masks = None if masks is None else F.pad(masks, (0, 1))
        dropout = layer.dropout if layer.training else 0.0
        if need_weights:
            attended, weights = _with_weights(heads, masks, dropout)
            shown = weights.mean(1) if average_attn_weights else weights
        else:
            q, k, v = heads
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=masks, dropout_p=dropout)
            shown = None
        outputs = record(self._out, attended.transpose(1, 2).flatten(2))
        return outputs if layer.batch_first else outputs.transpose(0, 1), shown

    def _projected(self, record: Record, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value, [n, length, width], the same one multiplied only once."""
        layer, width = self.layer, self.layer.embed_dim
        bias = cast(nn.Parameter | None, layer.in_proj_bias)
        inputs = [x if layer.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        if not layer._qkv_same_embed_dim:
            weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
            return [
                record(self._rows(weight, bias, 0, number, 1), x)
                for number, (weight, x) in enumerate(zip(weights, inputs, strict=True))
            ]
        packed = layer.in_proj_weight
        projected: list[Tensor] = []
        for start, count in _runs(query, key, value):
            rows = self._rows(packed, bias, start, start, count)
            projected += torch.split(record(rows, inputs[start]), width, 2)
        return projected

    def _rows(
        self, weight: Tensor, bias: nn.Parameter | None, of_weight: int, of_bias: int, count: int
    ) -> "_RowsRule":
        """The rule of so many of the three projections, from the given ones on."""
        width = self.layer.embed_dim
        return _RowsRule(
            weight=cast(nn.Parameter, weight),
            bias=bias,
            of_weight=slice(of_weight * width, (of_weight + count) * width),
            of_bias=slice(of_bias * width, (of_bias + count) * width),
            name=self.name,
            tuner=self.tuner,
        )


def _runs(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[int, int]]:
    """Which of the three are one tensor, so that one product gives them: (first, how many)."""
    if query is key and key is value:
        return [(0, 3)]
    return [(0, 1), (1, 2)] if key is value else [(0, 1), (1, 1), (2, 1)]


def _added(attention: Tensor | None, padding: Tensor | None, queries: Tensor) -> Tensor | None:
    """Both masks in one, added to the products: broadcast to [n, heads, length, length]."""
    found = None
    if attention is not None:
        found = _as_numbers(attention, queries)
        if found.dim() == 3:
            found = found.view(len(queries), -1, *found.shape[1:])
    if padding is not None:
        more = _as_numbers(padding, queries)[:, None, None, :]
        found = more if found is None else found + more
    return found


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of bool, True where nothing may be seen, as one that is added."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _with_weights(
    heads: list[Tensor], mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The attended values, [n, heads, length, width], and the weights by which they are."""
    query, key, value = heads
    products = query * math.sqrt(1.0 / query.shape[-1]) @ key.mT
    weights = F.dropout((products if mask is None else products + mask).softmax(-1), dropout)
    return weights @ value, weights


@dataclass(kw_only=True)
class _RowsRule:
    """The rule of a linear map that is some rows of a weight, and some of a bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    of_weight: slice
    of_bias: slice
    name: str
    tuner: Tuner

    def __post_init__(self) -> None:
        own = self.weight, self.bias
        self.parameters = tuple(each for each in own if each is not None)

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        bias = None if self.bias is None else self.bias[self.of_bias]
        return F.linear(inputs, self.weight[self.of_weight], bias), ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        return output_gradient @ self.weight[self.of_weight].to(output_gradient.dtype)

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        whole = LinearRule(Affine(self.weight, self.bias), self.name, self.tuner)
        parts = whole.per_example_gradients(inputs, saved, output_gradient)
        rows = {self.weight: self.of_weight, self.bias: self.of_bias}
        return [
            (parameter, _among_others(part, rows[parameter], len(parameter)))
            for parameter, part in parts
        ]


def _among_others(part: PerExampleGradients, rows: slice, total: int) -> PerExampleGradients:
    """The gradient of a parameter of which only some rows have one."""
    return part if rows == slice(0, total) else _Rows(part, rows, total)


@dataclass(frozen=True)
class _Rows:
    """Per-example gradients of some rows of a parameter; those of the others are zero."""

    part: PerExampleGradients
    rows: slice
    total: int

    def squared_norms(self) -> Tensor:
        return self.part.squared_norms()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        found = self.part.weighted_sum(factors)
        whole = found.new_zeros(self.total, *found.shape[1:])
        whole[self.rows] = found
        return whole

    def instantiate(self) -> Tensor:
        found = self.part.instantiate()
        whole = found.new_zeros(len(found), self.total, *found.shape[2:])
        whole[:, self.rows] = found
        return whole

    def select(self, rows: Tensor) -> "_Rows":
        return replace(self, part=self.part.select(rows))
