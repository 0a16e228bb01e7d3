"""A ridge head on fixed features, from which people are removed exactly: their sums are subtracted.

Least squares with one-hot targets is a function of two sums over rows, X'X and X'Y. Features are
rounded to whole multiples of 2^-17 of a bound that is fixed beforehand, so that products and sums
are whole numbers below 2^53: float64 holds them exactly, in whatever order a library adds them.
Subtracting a row gives, number for number, the sums of a training without it, after any number of
removals; a factor that is down-dated instead (Cholesky) drifts, and has to be watched. The head is
then solved for anew, from nothing but the sums, as a training does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import blas, lapack

from privacy.errors import UnlearningError
from privacy.statistics import Numbers
from privacy.unlearning.rows import (
    Labels,
    Present,
    checked_features,
    checked_labels,
    positive,
    tensor_in,
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

    _width: int
    _classes: int
    _sums: _Sums

    def __init__(
        self, features: Any, labels: Any, *, classes: int, bound: float, penalty: float = 1.0
    ) -> None:
        rows = checked_features(features)
        _check_count(len(rows))
        targets = checked_labels(labels, rows=len(rows), classes=whole("classes", classes, least=2))
        parts = (slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK))
        blocks = ((rows[part], targets[part]) for part in parts)
        self._fill(blocks, classes=classes, bound=bound, penalty=penalty)

    @classmethod
    def of_blocks(
        cls,
        blocks: Iterable[tuple[Any, Any]],
        *,
        classes: int,
        bound: float,
        penalty: float = 1.0,
    ) -> "RidgeHead":
        """Trains on features and labels that come some rows at a time, and are not kept.

        Guarantee: the same head as of all rows at once, however they are cut.

        Args:
            blocks: Pairs of features and labels, each as for `RidgeHead`.
            classes, bound, penalty: As for `RidgeHead`.

        Raises:
            UnlearningError: An argument is not as said.

        Example:
            >>> features, labels = np.eye(6)[:, :4], np.arange(6) % 2
            >>> blocks = ((features[part], labels[part]) for part in (slice(2), slice(2, 6)))
            >>> head = RidgeHead.of_blocks(blocks, classes=2, bound=1.0)
            >>> whole = RidgeHead(features, labels, classes=2, bound=1.0)
            >>> bool((head.weights == whole.weights).all())
            True
        """
        head = cls.__new__(cls)
        head._fill(blocks, classes=classes, bound=bound, penalty=penalty)
        return head

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RidgeHead":
        """The head that `state` was of: the same sums, so that the same rows can leave it.

        Raises:
            UnlearningError: It is not such a state, or says what cannot be true together. Whether
                its sums are those of the rows that its digests are of cannot be told.

        Example:
            >>> features, labels = np.eye(6)[:, :4], np.arange(6) % 2
            >>> head = RidgeHead(features, labels, classes=2, bound=1.0)
            >>> again = RidgeHead.from_state(head.state())
            >>> again.remove(features[:1], labels[:1])
            >>> len(head), len(again)
            (6, 5)
        """
        head = cls.__new__(cls)
        head._width = whole("width", state.get("width"), least=1)
        head._classes = whole("classes", state.get("classes"), least=2)
        head._bound = positive("bound", state.get("bound"))
        head._penalty = positive("penalty", state.get("penalty"))
        size = head._width + 1
        packed = tensor_in(state, "gram", torch.float64, (size * (size + 1) // 2,)).numpy()
        moments = tensor_in(state, "moments", torch.float64, (size, head._classes)).numpy()
        per_class = _checked_sums(packed, moments)
        present = Present.from_state(state, per_class)
        head._sums = head._solved(_unpacked(packed, size), moments.copy(), present)
        return head

    def state(self) -> dict[str, Any]:
        """The sums, the digests of the rows and their key, as tensors and numbers; no weights.

        They tell of the rows: whoever has a row and this can tell whether it is in the training,
        and who has all other rows can compute the last. So it is kept as the rows are, and
        destroyed with them. It takes 4 * (width + 1)^2 bytes, and 24 for each row.
        """
        sums = self._sums
        return {
            "width": self._width,
            "classes": self._classes,
            "bound": self._bound,
            "penalty": self._penalty,
            "gram": torch.from_numpy(_packed(sums.gram)),
            "moments": torch.from_numpy(sums.moments.copy()),
            **sums.present.state(),
        }

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

    def _fill(
        self, blocks: Iterable[tuple[Any, Any]], *, classes: int, bound: float, penalty: float
    ) -> None:
        """Sums over the rows, and the head that they have."""
        self._classes = whole("classes", classes, least=2)
        self._bound, self._penalty = positive("bound", bound), positive("penalty", penalty)
        present = Present.nobody(classes=classes)
        gram, moments = np.zeros((0, 0)), np.zeros((0, classes))
        for features, labels in blocks:
            rows = checked_features(features, width=self._width if len(gram) else None)
            targets = checked_labels(labels, rows=len(rows), classes=classes)
            if not len(gram):
                self._width, size = rows.shape[1], rows.shape[1] + 1
                gram, moments = np.zeros((size, size), order="F"), np.zeros((size, classes))
            _check_count(int(present.per_class.sum()) + len(rows))
            whole_numbers = self._on_grid(rows)
            gram, moments = self._added(gram, moments, whole_numbers, targets, sign=1.0)
            present = present.joined(whole_numbers.astype(np.int32), targets)
        missing = np.flatnonzero(present.per_class == 0)
        if len(missing):
            raise UnlearningError(
                f"labels: expected somebody of each of {classes} classes, got nobody of class "
                f"{missing[0]}"
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


def _check_count(rows: int) -> None:
    if rows > _MOST_ROWS:
        raise UnlearningError(
            f"features: expected at most {_MOST_ROWS} rows, whose sums are exact, got {rows}"
        )


def _packed(gram: Numbers) -> Numbers:
    """The lower half, column by column."""
    return np.concatenate([gram[column:, column] for column in range(len(gram))])


def _unpacked(packed: Numbers, size: int) -> Numbers:
    gram, start = np.zeros((size, size), order="F"), 0
    for column in range(size):
        gram[column:, column] = packed[start : start + size - column]
        start += size - column
    return gram


def _checked_sums(packed: Numbers, moments: Numbers) -> Labels:
    """How many rows of each class sums are of, if they can be those of any."""
    size = len(moments)
    lengths = np.arange(size, 0, -1)
    ends = np.cumsum(lengths)
    counts = moments[-1] / _GRID
    fits = np.isfinite(counts).all() and (counts == np.rint(counts)).all() and counts.min() >= 1
    rows = float(counts.sum()) if fits else 0.0
    most = rows * _GRID**2
    if (
        not 0 < rows <= _MOST_ROWS
        or not all(
            np.array_equal(each, np.rint(each)) and float(np.abs(each).max()) <= most
            for each in (packed, moments)
        )
        # The last column of X is a constant: its products are sums of the others.
        or not np.array_equal(packed[ends - 1], moments.sum(1) * _GRID)
        or float(packed[ends - lengths].min()) < 0
    ):
        raise UnlearningError(
            "state: expected the sums of a ridge head, whole numbers that agree with each other, "
            "got others"
        )
    found: Labels = counts.astype(np.int64)
    return found
