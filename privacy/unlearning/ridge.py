"""A ridge head on fixed features, from which people are removed exactly: their sums are subtracted.

Least squares with one-hot targets is a function of two sums over rows, X'X and X'Y. Features are
rounded to whole multiples of 2^-17 of a bound that is fixed beforehand, so that products and sums
are whole numbers below 2^53: float64 holds them exactly, in whatever order a library adds them.
Subtracting a row gives, number for number, the sums of a training without it, after any number of
removals; a factor that is down-dated instead (Cholesky) drifts, and has to be watched. The head is
then solved for anew, from nothing but the sums, as a training does.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, lapack

from privacy.errors import UnlearningError
from privacy.statistics import Numbers
from privacy.unlearning.rows import (
    Labels,
    Present,
    checked_features,
    checked_labels,
    positive,
    whole,
)

__all__ = ["RidgeHead"]

_GRID = 2**17
"""Whole numbers on each side of 0 that a feature is rounded to."""
_MOST_ROWS = 2**53 // _GRID**2
_BLOCK = 4096
"""Rows that are worked on at a time, so that memory is that of the sums."""


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """All that is kept of the rows: replaced as one, so that an interruption leaves the old."""

    gram: Numbers
    """Lower half of X'X in units of the grid, [width + 1, width + 1]; the last column is ones."""
    moments: Numbers
    """X'Y in units of the grid, [width + 1, classes]."""
    present: Present
    weights: Numbers


@final
class RidgeHead:
    """Least squares with one-hot targets on fixed features; a class because it owns its sums.

    Guarantee: after `remove` the sums are number for number those of a training without the rows
    removed, whoever left before and in whatever order; and so are the weights, bit for bit on one
    machine with one number of threads, else to rounding. Nothing else of a removed row is kept.

    What the caller answers for: the features are those of a function that never saw the people who
    leave (formulas, public data), and neither `bound` nor `penalty` was chosen by them.

    Args:
        features: `[rows, width]`, at most 524,288 rows. Values beyond `bound` are set to it.
        labels: `[rows]`, classes from 0.
        classes: How many, at least 2; each must have somebody.
        bound: Largest magnitude of a feature; rounding is to 2^-17 of it.
        penalty: Of the squares of the weights, > 0, beside the sum of the squared errors of all
            rows; the intercepts are free.

    Raises:
        UnlearningError: An argument is not as said.

    Example:
        >>> features = np.eye(6)[:, :4]
        >>> head = RidgeHead(features, [0, 1, 0, 1, 0, 1], classes=2, bound=1.0)
        >>> head.remove(features[:1], [0])
        >>> again = RidgeHead(features[1:], [1, 0, 1, 0, 1], classes=2, bound=1.0)
        >>> bool((head.weights == again.weights).all()), len(head)
        (True, 5)
    """

    def __init__(
        self, features: Any, labels: Any, *, classes: int, bound: float, penalty: float = 1.0
    ) -> None:
        self._classes = whole("classes", classes, least=2)
        self._bound, self._penalty = positive("bound", bound), positive("penalty", penalty)
        rows = checked_features(features)
        if len(rows) > _MOST_ROWS:
            raise UnlearningError(
                f"features: expected at most {_MOST_ROWS} rows, whose sums are exact, got "
                f"{len(rows)}"
            )
        targets = checked_labels(labels, rows=len(rows), classes=classes)
        self._width = rows.shape[1]
        size = self._width + 1
        gram, moments = np.zeros((size, size), order="F"), np.zeros((size, classes))
        present = Present.nobody(classes=classes)
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            whole_numbers = self._on_grid(rows[part])
            gram, moments = self._added(gram, moments, whole_numbers, targets[part], sign=1.0)
            present = present.joined(whole_numbers.astype(np.int32), targets[part])
        missing = np.flatnonzero(present.per_class == 0)
        if len(missing):
            raise UnlearningError(
                f"labels: expected somebody of each of {classes} classes, got nobody of class "
                f"{missing[0]}"
            )
        self._sums = self._solved(gram, moments, present)

    def __len__(self) -> int:
        """Rows that are in it."""
        return int(self._sums.present.per_class.sum())

    def __repr__(self) -> str:
        return f"RidgeHead(rows={len(self)}, width={self._width}, classes={self._classes})"

    @property
    def weights(self) -> Numbers:
        """Float64 `[width + 1, classes]`; the last row has the intercepts."""
        return self._sums.weights.copy()

    def scores(self, features: Any) -> Numbers:
        """Of each class, float64 `[rows, classes]`; the largest is the answer.

        Raises:
            UnlearningError: The features are not `[rows, width]`, or not finite.
        """
        rows = self._on_grid(checked_features(features, width=self._width))
        rows[:, :-1] *= self._bound / _GRID
        rows[:, -1] = 1.0
        found: Numbers = rows @ self._sums.weights
        return found

    def remove(self, features: Any, labels: Any) -> None:
        """Takes rows out: the very features and labels that the training got.

        Several at once cost little more than one. All are removed, or none.

        Raises:
            UnlearningError: A row is not in the training, or was removed before, or nobody of a
                class would be left; nothing was changed.
        """
        rows = checked_features(features, width=self._width)
        targets = checked_labels(labels, rows=len(rows), classes=self._classes)
        sums, whole_numbers = self._sums, self._on_grid(rows)
        present = sums.present.without(whole_numbers.astype(np.int32), targets)
        gram, moments = self._added(
            sums.gram.copy(order="F"), sums.moments, whole_numbers, targets, sign=-1.0
        )
        self._sums = self._solved(gram, moments, present)

    def _on_grid(self, rows: npt.NDArray[np.floating[Any]]) -> Numbers:
        """Features as whole numbers, and a last column that stands for 1."""
        found = np.full((len(rows), self._width + 1), float(_GRID))
        inside = np.clip(rows.astype(np.float64), -self._bound, self._bound)
        np.rint(inside * (_GRID / self._bound), out=found[:, :-1])
        return found

    def _added(
        self, gram: Numbers, moments: Numbers, rows: Numbers, labels: Labels, *, sign: float
    ) -> tuple[Numbers, Numbers]:
        """The sums with the rows, or without them; `gram` is written to."""
        gram = blas.dsyrk(sign, rows.T, beta=1.0, c=gram, lower=1, overwrite_c=1)
        chosen = np.eye(self._classes)[labels]
        return gram, moments + sign * (rows.T @ chosen)

    def _solved(self, gram: Numbers, moments: Numbers, present: Present) -> _Sums:
        """The head that these sums have: a function of them alone."""
        unit = self._bound / _GRID
        system = gram * unit**2
        inside = np.arange(self._width)
        system[inside, inside] += self._penalty
        factor, failed = lapack.dpotrf(system, lower=1, clean=0, overwrite_a=1)
        if failed:
            raise UnlearningError(
                f"penalty: expected one that features of this bound can be told beside, got "
                f"{self._penalty:g}; give a larger one"
            )
        weights, _ = lapack.dpotrs(factor, moments * unit, lower=1)
        weights[-1] *= self._bound
        return _Sums(gram=gram, moments=moments, present=present, weights=weights)
