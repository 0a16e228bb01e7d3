"""Copies of one example, each with other augmentation: their gradients are added before clipping.

A row of the batch is then no example, K rows that follow one another are. Convolutions and linear
layers add them up in their products; this folds them after the kernel of any other layer has run,
so that its rule knows nothing of copies.
"""

from dataclasses import dataclass

import torch

from privacy.clipping.gradients import (
    Instantiated,
    PerExampleGradients,
    in_rows,
    row_squared_norms,
)

__all__ = ["OfCopies", "of_copies"]

_AT_A_TIME = 2**23
"""Numbers of per-row gradients formed at a time where a layer has formed none."""


def of_copies(part: PerExampleGradients, copies: int, *, size: int) -> PerExampleGradients:
    """Per-example gradients [n] out of those of `n * copies` rows, an example's rows adjacent.

    Args:
        copies: Rows an example, at least 1.
    """
    if copies == 1:
        return part
    if isinstance(part, Instantiated):
        return Instantiated([_added(piece, copies) for piece in part.pieces], part.join)
    return OfCopies(part, copies, _squared_norms(part, copies, size))


@dataclass(frozen=True)
class OfCopies:
    """Gradients that are held by nobody: the rows' own form, and the examples' squared norms.

    Attributes:
        rows: The gradients of every row.
        copies: Rows an example.
        squares: Squared norms of the examples' gradients, float64 [n].
    """

    rows: PerExampleGradients
    copies: int
    squares: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """The norms of the sums over copies."""
        return self.squares

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """Each copy has its example's factor."""
        return self.rows.weighted_sum(factors.repeat_interleave(self.copies))

    def instantiate(self) -> torch.Tensor:
        """The gradients themselves, added over copies."""
        return _added(self.rows.instantiate(), self.copies)

    def select(self, rows: torch.Tensor) -> "OfCopies":
        """The same of some examples."""
        copied = rows[:, None] * self.copies + torch.arange(self.copies, device=rows.device)
        return OfCopies(self.rows.select(copied.flatten()), self.copies, self.squares[rows])


def _added(rows: torch.Tensor, copies: int) -> torch.Tensor:
    """Sums over adjacent rows, in float32 or better."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.view(-1, copies, *rows.shape[1:]).sum(1, dtype=dtype)


def _squared_norms(part: PerExampleGradients, copies: int, size: int) -> torch.Tensor:
    """Norms of the sums over copies, a few examples' gradients at a time, float64 [n]."""
    rows = torch.arange(len(part.squared_norms()), device=part.squared_norms().device)
    few = max(1, _AT_A_TIME // (copies * size)) * copies
    return torch.cat(
        [
            row_squared_norms(in_rows(_added(part.select(some).instantiate(), copies)))
            for some in torch.split(rows, few)
        ]
    )
