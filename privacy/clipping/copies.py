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
        part: One parameter's gradients of every row.
        copies: Rows an example, at least 1.
        size: How many numbers the parameter has.

    Example:
        >>> rows = Instantiated([torch.tensor([[1.0], [2.0], [10.0], [20.0]])])
        >>> of_copies(rows, 2, size=1).instantiate()
        tensor([[ 3.],
                [30.]])
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

    Example:
        >>> rows = Instantiated([torch.tensor([[1.0], [2.0]])])
        >>> OfCopies(rows, 2, torch.tensor([9.0])).weighted_sum(torch.tensor([0.5]))
        tensor([1.5000])
    """

    rows: PerExampleGradients
    copies: int
    squares: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """The norms of the sums over copies.

        Example:
            >>> OfCopies(Instantiated([torch.ones(2, 1)]), 2, torch.tensor([4.0])).squared_norms()
            tensor([4.])
        """
        return self.squares

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """Each copy has its example's factor.

        Example:
            >>> of_one = OfCopies(Instantiated([torch.ones(2, 1)]), 2, torch.tensor([4.0]))
            >>> of_one.weighted_sum(torch.tensor([0.5]))
            tensor([1.])
        """
        return self.rows.weighted_sum(factors.repeat_interleave(self.copies))

    def instantiate(self) -> torch.Tensor:
        """The gradients themselves, added over copies.

        Example:
            >>> OfCopies(Instantiated([torch.ones(2, 1)]), 2, torch.tensor([4.0])).instantiate()
            tensor([[2.]])
        """
        return _added(self.rows.instantiate(), self.copies)

    def select(self, rows: torch.Tensor) -> "OfCopies":
        """The same of some examples.

        Example:
            >>> two = OfCopies(Instantiated([torch.ones(4, 1)]), 2, torch.tensor([4.0, 4.0]))
            >>> two.select(torch.tensor([1])).instantiate()
            tensor([[2.]])
        """
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
