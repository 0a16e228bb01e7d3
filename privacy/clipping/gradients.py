"""Per-example gradients of one parameter, in the forms that a clipped sum can be made from.

`Instantiated` holds them. `GhostNorm` knows only their norms and makes the clipped sum in a second
pass over the layer's input and output gradient (ghost clipping: Goodfellow 2015, arXiv 1510.01799;
Li et al. 2022, arXiv 2110.05679). `AfterBackward` forms them when the backward pass is over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "LONGEST_SUM",
    "AfterBackward",
    "GhostNorm",
    "Instantiated",
    "Parts",
    "PerExampleGradients",
    "Saved",
    "combine",
    "in_rows",
    "row_squared_norms",
    "sum_copies",
]

LONGEST_SUM = 1024
"""Squares added up in float32 before float64 takes over. Ten million of them in float32 come out
up to one percent too small, and with them the norm that clipping bounds.
"""
_AT_A_TIME = 2**23
"""Numbers of per-row gradients formed at a time where a layer has formed none."""


class PerExampleGradients(Protocol):
    """What the private step needs of one parameter's per-example gradients."""

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each example's gradient, float64 [n]."""

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Sum over examples of factor times gradient, of the parameter's shape; factors are [n].

        A tensor of its own: the noise is added in its place.
        """

    def instantiate(self) -> Tensor:
        """The gradients themselves, [n, *parameter.shape]."""

    def select(self, rows: Tensor) -> "PerExampleGradients":
        """The same for the examples in `rows` only, an int64 tensor of indices."""


Parts = list[tuple[nn.Parameter, PerExampleGradients]]
"""What a layer's rule gives: each trainable parameter and its per-example gradients."""

Saved = Sequence[Tensor]
"""What a rule's `forward` kept for the backward pass beside the layer's input."""


def _only(pieces: list[Tensor]) -> Tensor:
    """The one piece of a gradient that was not cut."""
    return pieces[0]


@dataclass(frozen=True)
class Instantiated:
    """Per-example gradients that are held, in pieces [n, ...] of a kernel's own layout.

    `join` makes of pieces, each example's or their sum's, the parameter's shape; `squares` are the
    squared norms [n] where the kernel knows them already.
    """

    pieces: list[Tensor]
    join: Callable[[list[Tensor]], Tensor] = _only
    squares: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """What the kernel found, or one pass over the gradients."""
        if self.squares is not None:
            return self.squares
        norms = [row_squared_norms(in_rows(piece)) for piece in self.pieces]
        return torch.stack(norms).sum(0)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """A matrix-vector product, in float32 or better: a rounded factor would clip too little."""
        sums = []
        for piece in self.pieces:
            flat = in_rows(piece)
            dtype = torch.promote_types(flat.dtype, torch.float32)
            total = torch.mv(flat.to(dtype).t(), factors.to(dtype))
            sums.append(total.view(piece.shape[1:]))
        return self.join(sums)

    def instantiate(self) -> Tensor:
        """The gradients in the parameter's shape."""
        return self.join(self.pieces)

    def select(self, rows: Tensor) -> "Instantiated":
        """The gradients of the examples in `rows`."""
        known = None if self.squares is None else self.squares[rows]
        return Instantiated([piece[rows] for piece in self.pieces], self.join, known)


@dataclass(frozen=True)
class GhostNorm:
    """Per-example gradients that were never formed: their norms, and the second pass to their sum.

    `squares` are squared norms [n], of `copies` adjacent rows of inputs and output gradients [n *
    copies, ...] each. Of these two `weight_gradient` makes the parameter's gradient, summed over
    rows, and `instantiation` the per-row gradients.
    """

    squares: Tensor
    inputs: Tensor
    output_gradients: Tensor
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    instantiation: Callable[[Tensor, Tensor], Tensor]
    copies: int = 1

    def squared_norms(self) -> Tensor:
        """The norms that were found in the backward pass."""
        return self.squares

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The second pass: the layer's own weight gradient, of scaled output gradients."""
        dtype = torch.promote_types(self.output_gradients.dtype, torch.float32)
        dy, each = self.output_gradients.to(dtype), factors.to(dtype)
        each = each.repeat_interleave(self.copies) if self.copies > 1 else each
        scaled = dy * each.view(-1, *[1] * (dy.dim() - 1))
        # Indices stay integers: a large one has no exact float32.
        indices = not self.inputs.is_floating_point()
        return self.weight_gradient(self.inputs if indices else self.inputs.to(dtype), scaled)

    def instantiate(self) -> Tensor:
        """Forms the gradients after all: a shared parameter's are added before the norm."""
        rows = self.instantiation(self.inputs, self.output_gradients)
        return rows if self.copies == 1 else _added(rows, self.copies)

    def select(self, rows: Tensor) -> "GhostNorm":
        """The same for the examples in `rows`."""
        copies = torch.arange(self.copies, device=rows.device)
        copied = (rows[:, None] * self.copies + copies).flatten()
        inputs, output_gradients = self.inputs[copied], self.output_gradients[copied]
        squares = self.squares[rows]
        return replace(self, squares=squares, inputs=inputs, output_gradients=output_gradients)


class AfterBackward:
    """Per-example gradients that are formed once the backward pass has freed its activations.

    At the first question; what they are made of is freed then. So gradients are kept after all that
    do not fit beside the activations.
    """

    def __init__(
        self,
        inputs: Tensor,
        output_gradient: Tensor,
        form: Callable[[Tensor, Tensor], PerExampleGradients],
    ) -> None:
        self._form: Callable[[], PerExampleGradients] = partial(form, inputs, output_gradient)
        self._formed: PerExampleGradients | None = None

    def squared_norms(self) -> Tensor:
        """Squared norms of the gradients."""
        return self._now().squared_norms()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The gradients' weighted sum."""
        return self._now().weighted_sum(factors)

    def instantiate(self) -> Tensor:
        """The gradients."""
        return self._now().instantiate()

    def select(self, rows: Tensor) -> PerExampleGradients:
        """The gradients of the examples in `rows`."""
        return self._now().select(rows)

    def _now(self) -> PerExampleGradients:
        if self._formed is None:
            self._formed = self._form()
            del self._form
        return self._formed


def sum_copies(part: PerExampleGradients, copies: int, *, size: int) -> PerExampleGradients:
    """Per-example gradients [n] out of those of `n * copies` rows, an example's rows adjacent.

    Copies are one example with different augmentations: their gradients, of `size` values each, are
    added before clipping. Convolutions and linear layers add them up in their products.
    """
    if copies == 1:
        return part
    if isinstance(part, Instantiated):
        return Instantiated([_added(piece, copies) for piece in part.pieces], part.join)
    if not isinstance(part, GhostNorm):
        return Instantiated([_added(part.instantiate(), copies)])
    rows = torch.arange(len(part.squares), device=part.squares.device)
    few = max(1, _AT_A_TIME // (copies * size)) * copies
    squares = [
        row_squared_norms(in_rows(_added(part.select(some).instantiate(), copies)))
        for some in torch.split(rows, few)
    ]
    return replace(part, squares=torch.cat(squares), copies=copies)


def _added(rows: Tensor, copies: int) -> Tensor:
    """Sums over adjacent rows, in float32 or better."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.view(-1, copies, *rows.shape[1:]).sum(1, dtype=dtype)


def combine(parts: list[PerExampleGradients]) -> PerExampleGradients:
    """Adds the parts that several uses of one parameter contributed: norms are taken of the sum."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].instantiate().clone()
    for part in parts[1:]:
        total += part.instantiate()
    return Instantiated([total])


def in_rows(gradients: Tensor) -> Tensor:
    """Per-example gradients as rows, [n, m]: those of a scalar have no other dimension."""
    return gradients.flatten(1) if gradients.dim() > 1 else gradients.unsqueeze(1)


def row_squared_norms(rows: Tensor) -> Tensor:
    """Squared L2 norm of each row [n, m], float64 [n]: right to one part in 10^5 for any m."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    whole = rows.shape[1] // LONGEST_SUM * LONGEST_SUM
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    total: Tensor = rest.double().square() + rows.shape[1] * torch.finfo(dtype).tiny
    if whole:
        blocks = rows[:, :whole].view(len(rows), whole // LONGEST_SUM, LONGEST_SUM)
        norms = torch.linalg.vector_norm(blocks, dim=2, dtype=dtype)
        total += norms.double().square().sum(1)
    return total
