"""Per-example gradients of one parameter, in the forms that a clipped sum can be made from.

`Instantiated` holds them, `Postponed` will; `Deferred` knows only their norms and makes the
weighted sum from the layer's input and output gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "LONGEST_SUM",
    "Deferred",
    "Instantiated",
    "PerExampleGradients",
    "Postponed",
    "combine",
    "in_rows",
    "row_squared_norms",
]

LONGEST_SUM = 1024
"""Squares added up in float32 before float64 takes over. Ten million of them in float32 come out
up to one percent too small, and with them the norm that clipping bounds.
"""


class PerExampleGradients(Protocol):
    """What the private step needs of one parameter's per-example gradients."""

    def squared_norms(self) -> torch.Tensor:
        """Squared L2 norm of each example's gradient, float64 [n]."""

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """Sum over examples of factor times gradient, of the parameter's shape; factors are [n].

        A tensor of its own: the noise is added in its place.
        """

    def instantiate(self) -> torch.Tensor:
        """The gradients themselves, [n, *parameter.shape]."""

    def select(self, rows: torch.Tensor) -> "PerExampleGradients":
        """The same of the examples in `rows` only, an int64 tensor of indices."""


def _only(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The one piece of a gradient that was not cut."""
    return pieces[0]


@dataclass(frozen=True)
class Instantiated:
    """Per-example gradients that are held, as one tensor or as pieces in a kernel's own layout.

    Attributes:
        pieces: Each [n, ...].
        join: From pieces, each example's or their sum's, to the parameter's shape.
        squares: Squared norms [n], where the kernel knows them already.
    """

    pieces: list[torch.Tensor]
    join: Callable[[list[torch.Tensor]], torch.Tensor] = _only
    squares: torch.Tensor | None = None

    def squared_norms(self) -> torch.Tensor:
        """What the kernel found, or one pass over the gradients."""
        if self.squares is not None:
            return self.squares
        norms = [row_squared_norms(in_rows(piece)) for piece in self.pieces]
        return torch.stack(norms).sum(0)

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """A matrix-vector product, in float32 or better: a rounded factor would clip too little."""
        sums = []
        for piece in self.pieces:
            flat = in_rows(piece)
            dtype = torch.promote_types(flat.dtype, torch.float32)
            total = torch.mv(flat.to(dtype).t(), factors.to(dtype))
            sums.append(total.view(piece.shape[1:]))
        return self.join(sums)

    def instantiate(self) -> torch.Tensor:
        """The gradients in the parameter's shape."""
        return self.join(self.pieces)

    def select(self, rows: torch.Tensor) -> "Instantiated":
        """The gradients of the examples in `rows`."""
        known = None if self.squares is None else self.squares[rows]
        return Instantiated([piece[rows] for piece in self.pieces], self.join, known)


@dataclass(frozen=True)
class Deferred:
    """Per-example gradients that were never formed: their norms, and what makes their weighted sum.

    Attributes:
        squares: Squared norms [n].
        inputs: The layer's input [n, ...].
        output_gradients: The gradient at the layer's output [n, ...].
        weight_gradient: Makes the parameter's gradient, summed over examples, of an input and an
            output gradient.
        instantiation: Makes the per-example gradients of an input and an output gradient.
    """

    squares: torch.Tensor
    inputs: torch.Tensor
    output_gradients: torch.Tensor
    weight_gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    instantiation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def squared_norms(self) -> torch.Tensor:
        """The norms that were computed when the layer was passed."""
        return self.squares

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """The layer's own weight gradient, of output gradients scaled by the factors."""
        dtype = torch.promote_types(self.output_gradients.dtype, torch.float32)
        dy = self.output_gradients.to(dtype)
        scaled = dy * factors.to(dtype).view(-1, *[1] * (dy.dim() - 1))
        # Indices stay whole: a large one has no exact float32.
        indices = not self.inputs.is_floating_point()
        return self.weight_gradient(self.inputs if indices else self.inputs.to(dtype), scaled)

    def instantiate(self) -> torch.Tensor:
        """Forms the gradients after all: a shared parameter's are added before the norm."""
        return self.instantiation(self.inputs, self.output_gradients)

    def select(self, rows: torch.Tensor) -> "Deferred":
        """The same of the examples in `rows`."""
        return Deferred(
            self.squares[rows],
            self.inputs[rows],
            self.output_gradients[rows],
            self.weight_gradient,
            self.instantiation,
        )


class Postponed:
    """Per-example gradients that are formed once the backward pass has let its activations go.

    A class because it forms them at the first question, and then lets go what it made them from.

    Args:
        inputs: The layer's input [n, ...].
        output_gradient: The gradient at the layer's output [n, ...].
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        output_gradient: torch.Tensor,
        form: Callable[[torch.Tensor, torch.Tensor], PerExampleGradients],
    ) -> None:
        self._source: tuple[torch.Tensor, torch.Tensor] | None = (inputs, output_gradient)
        self._form = form
        self._formed: PerExampleGradients | None = None

    def squared_norms(self) -> torch.Tensor:
        """Of the gradients, formed now if not before."""
        return self._now().squared_norms()

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """Of the gradients, formed now if not before."""
        return self._now().weighted_sum(factors)

    def instantiate(self) -> torch.Tensor:
        """The gradients, formed now if not before."""
        return self._now().instantiate()

    def select(self, rows: torch.Tensor) -> PerExampleGradients:
        """The gradients of the examples in `rows`, formed now if not before."""
        return self._now().select(rows)

    def _now(self) -> PerExampleGradients:
        """The gradients."""
        if self._formed is None:
            assert self._source is not None, "it is kept until the gradients are formed"
            self._formed = self._form(*self._source)
            self._source = None
        return self._formed


def combine(parts: list[PerExampleGradients]) -> PerExampleGradients:
    """Adds the parts that several uses of one parameter contributed: norms are taken of the sum."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].instantiate().clone()
    for part in parts[1:]:
        total += part.instantiate()
    return Instantiated([total])


def in_rows(gradients: torch.Tensor) -> torch.Tensor:
    """Per-example gradients as rows, [n, m]: those of a scalar have no other dimension."""
    return gradients.flatten(1) if gradients.dim() > 1 else gradients.unsqueeze(1)


def row_squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of each row, right to one part in 10^5 whatever the number of columns.

    Args:
        rows: Any floating dtype, [n, m].

    Returns:
        A float64 tensor [n].
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    whole = rows.shape[1] // LONGEST_SUM * LONGEST_SUM
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    total: torch.Tensor = rest.double().square() + rows.shape[1] * torch.finfo(dtype).tiny
    if whole:
        blocks = rows[:, :whole].view(len(rows), whole // LONGEST_SUM, LONGEST_SUM)
        norms = torch.linalg.vector_norm(blocks, dim=2, dtype=dtype)
        total += norms.double().square().sum(1)
    return total
