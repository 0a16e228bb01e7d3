"""Certified removal from a logistic head: one Newton step, and what it leaves behind is counted.

Guo, Goldstein, Hannun, van der Maaten 2020, arXiv 1911.03030. A head is trained on a loss with a
random linear term b'w, drawn once and forgotten. When rows leave, a Newton step on the loss of who
stays brings the weights near its minimum; the gradient that is left there is as if b had been
another by that much, and b's own spread hides it as long as all that was left behind adds up to no
more than a budget. Beyond it the head is to be trained anew.

What a step v leaves behind is the integral over it of (Hessian there - Hessian here) v. The
curvature of a row's loss changes by gamma |x'v| at most along it, gamma = 1 / (6 sqrt(3)), half of
that on average, so that its norm is at most

    gamma / 2 * ||X||_2 * ||(Xv)^2||_2,

with the squares row by row. For rows of a length up to 1 this is never more than the paper's
gamma ||X||_2 ||v|| ||Xv||, and it holds for rows of any length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
from scipy import linalg, special

from privacy import validate
from privacy.errors import PlanError, UnlearningError
from privacy.noise import SecureGenerator
from privacy.statistics import Numbers, gdp_mu
from privacy.unlearning.rows import (
    Labels,
    array_of,
    checked_features,
    checked_labels,
    positive,
    whole,
)

__all__ = ["LogisticHead", "residual_bound"]

_GAMMA = 1 / (6 * math.sqrt(3))
"""Of the third derivative of the logistic loss, the largest magnitude."""
_ROUNDING = 1e-9
_BLOCK = 4096
_MOST_STEPS = 100
_ENOUGH = 1e-6
"""Share of the budget that a training may leave of its gradient."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a removal replaces as one."""

    weights: Numbers
    """[width + 1, classes]."""
    present: npt.NDArray[np.bool_]
    spent: float


def residual_bound(along: Numbers, *, spectral_norm: float) -> float:
    """The largest norm of the gradient that a Newton step can leave behind.

    Args:
        along: Xv, how far the step moves the log-odds of each row that stays, `[n]`.
        spectral_norm: Of X, or of a matrix that X is some rows of.

    Example:
        >>> round(residual_bound(np.array([0.3, -0.4]), spectral_norm=2.0), 4)
        0.0177
    """
    change = float(np.linalg.norm(np.square(along)))
    return _GAMMA / 2 * spectral_norm * change * (1 + _ROUNDING)


@final
class LogisticHead:
    """Logistic heads, one class against the rest, that forget rows by Newton steps within a budget.

    Guarantee: as long as `remove` does not refuse, the weights of all classes together are
    (epsilon, delta)-indistinguishable from those of an exact training, with a random term of its
    own, on the rows that stay: by theorem 3 of Guo et al. for requests that do not follow from the
    weights, with the exact curve of a Gaussian in the place of its tail bound. Like that theorem it
    takes what is left behind for a shift of the random term. The shift follows the term, and what
    that changes of volumes is not counted: where it was computed, on a line, the promise held; in
    more dimensions it is neither proven nor refuted, and a certificate must say so.

    What the caller answers for: the features are those of a function that never saw the people who
    leave, and no other argument was chosen by them. `spent` follows from the data and is covered by
    nothing: it is for whoever keeps the head.

    Rows that stay are kept, since each step needs them; those of a row that left are overwritten.
    A removal costs a Hessian a class: rows * width^2 multiplications for each.

    Args:
        features: `[rows, width]`; a constant 1 is added to each row.
        labels: `[rows]`, classes from 0.
        classes: How many, at least 2; each must have somebody.
        penalty: lambda: half of it times the number of rows is the factor of the squared weights.
        noise_deviation: Standard deviation of the random term. More leaves a larger budget and a
            less accurate head.
        epsilon: > 0.
        delta: In (0, 1).

    Raises:
        UnlearningError: An argument is not as said, or no training comes near enough to a minimum.

    Example:
        >>> features, labels = np.eye(4)[np.arange(40) % 4], np.arange(40) % 2
        >>> settings = {"penalty": 0.1, "noise_deviation": 1.0, "epsilon": 1.0, "delta": 1e-5}
        >>> head = LogisticHead(features, labels, classes=2, **settings)
        >>> head.remove([0, 7])
        >>> len(head), head.spent < head.budget
        (38, True)
    """

    def __init__(
        self,
        features: Any,
        labels: Any,
        *,
        classes: int,
        penalty: float,
        noise_deviation: float,
        epsilon: float,
        delta: float,
    ) -> None:
        self._classes = whole("classes", classes, least=2)
        self._penalty = positive("penalty", penalty)
        self._budget = positive("noise_deviation", noise_deviation) * _mu(epsilon, delta)
        given = checked_features(features)
        self._labels = checked_labels(labels, rows=len(given), classes=self._classes)
        _check_classes(self._labels, self._classes)
        # A copy: rows that leave are overwritten in it.
        self._rows = np.hstack([given.astype(np.float64), np.ones((len(given), 1))])
        self._spectral_norm = _spectral_norm(self._rows)
        size = self._rows.shape[1]
        noise = SecureGenerator().normal(size * classes).numpy().reshape(size, classes)
        weights, left = self._trained(noise * noise_deviation)
        if not left < self._budget:
            raise UnlearningError(
                f"penalty: expected one with which a minimum is found, got {self._penalty:g}, with "
                f"a gradient of {left:.3g} left and a budget of {self._budget:.3g}; give a larger "
                "one, or more noise, or smaller features"
            )
        present = np.ones(len(given), dtype=np.bool_)
        self._state = _State(weights=weights, present=present, spent=left)

    def __len__(self) -> int:
        """Rows that are in it."""
        return int(self._state.present.sum())

    def __repr__(self) -> str:
        return (
            f"LogisticHead(rows={len(self)}, width={self._rows.shape[1] - 1}, "
            f"classes={self._classes})"
        )

    @property
    def weights(self) -> Numbers:
        """Float64 `[width + 1, classes]`; the last row has the intercepts."""
        return self._state.weights.copy()

    @property
    def budget(self) -> float:
        """The largest norm of a gradient left behind that the random term hides."""
        return self._budget

    @property
    def spent(self) -> float:
        """What was left behind at most, by the training and by all removals."""
        return self._state.spent

    def scores(self, features: Any) -> Numbers:
        """Log-odds of each class against the rest, float64 `[rows, classes]`.

        Raises:
            UnlearningError: The features are not `[rows, width]`, or not finite.
        """
        rows = checked_features(features, width=self._rows.shape[1] - 1).astype(np.float64)
        found: Numbers = rows @ self._state.weights[:-1] + self._state.weights[-1]
        return found

    def remove(self, indices: Any) -> None:
        """Takes rows out, by their indices in the training; all of them, or none.

        Several at once leave more behind than one, and less than as many one after the other cost
        time.

        Raises:
            UnlearningError: An index is not of a row that is in it, or is there twice, or nobody of
                a class would be left, or the budget would be exceeded; nothing was changed.
        """
        state = self._state
        leave = _checked_indices(indices, state.present)
        present = state.present.copy()
        present[leave] = False
        _check_classes(self._labels[present], self._classes)
        steps = [self._step(state, present, leave, k) for k in range(self._classes)]
        spent = state.spent + math.hypot(*(left for _, left in steps))
        if not spent <= self._budget:
            raise UnlearningError(
                f"indices: expected a removal within the budget of {self._budget:.3g}, got one "
                f"after which {spent:.3g} would be spent; train a head anew on the rows that stay"
            )
        weights = state.weights + np.stack([step for step, _ in steps], axis=1)
        self._state = _State(weights=weights, present=present, spent=spent)
        self._rows[leave] = 0.0

    def _step(
        self, state: _State, present: npt.NDArray[np.bool_], leave: Labels, k: int
    ) -> tuple[Numbers, float]:
        """The Newton step of a class, and what it leaves behind at most."""
        weights, rows = state.weights[:, k], self._rows[leave]
        slopes = _slopes(rows @ weights, self._labels[leave] == k)
        removed = rows.T @ slopes + len(leave) * self._penalty * weights
        hessian = self._hessian(weights, present)
        step = _solved(hessian, removed)
        unsolved = float(np.linalg.norm(hessian @ step - removed))
        along = (self._rows @ step)[present]
        return step, unsolved + residual_bound(along, spectral_norm=self._spectral_norm)

    def _hessian(self, weights: Numbers, present: npt.NDArray[np.bool_]) -> Numbers:
        """Of the loss of a class, of the rows that are present."""
        shares = special.expit(self._rows @ weights)
        curvature = shares * (1 - shares) * present
        size = self._rows.shape[1]
        found = np.zeros((size, size))
        for part in _parts(len(self._rows)):
            found += self._rows[part].T @ (curvature[part, None] * self._rows[part])
        found[np.diag_indices(size)] += self._penalty * int(present.sum())
        return found

    def _trained(self, noise: Numbers) -> tuple[Numbers, float]:
        """Weights near the minimum, and the norm of all gradients that are left there together."""
        enough = _ENOUGH * self._budget / math.sqrt(self._classes)
        found = [self._minimised(k, noise[:, k], enough) for k in range(self._classes)]
        return np.stack([weights for weights, _ in found], axis=1), math.hypot(
            *(n for _, n in found)
        )

    def _minimised(self, k: int, noise: Numbers, enough: float) -> tuple[Numbers, float]:
        """By Newton steps, each as long as it still shortens the gradient."""
        present = np.ones(len(self._rows), dtype=np.bool_)
        weights = np.zeros(len(noise))
        gradient = self._gradient(weights, k, noise)
        for _ in range(_MOST_STEPS):
            norm, length = float(np.linalg.norm(gradient)), 1.0
            if norm <= enough:
                break
            step = _solved(self._hessian(weights, present), gradient)
            while length > _ROUNDING:
                tried = weights - length * step
                there = self._gradient(tried, k, noise)
                if float(np.linalg.norm(there)) <= (1 - length / 4) * norm:
                    break
                length /= 2
            else:
                break
            weights, gradient = tried, there
        return weights, float(np.linalg.norm(gradient))

    def _gradient(self, weights: Numbers, k: int, noise: Numbers) -> Numbers:
        slopes = _slopes(self._rows @ weights, self._labels == k)
        found: Numbers = self._rows.T @ slopes + len(self._rows) * self._penalty * weights + noise
        return found


def _solved(hessian: Numbers, vector: Numbers) -> Numbers:
    factor, failed = linalg.lapack.dpotrf(hessian, lower=1)
    if failed:
        raise UnlearningError(
            "penalty: expected one that features of this size can be told beside; give a larger "
            "one, or smaller features"
        )
    found: Numbers = linalg.lapack.dpotrs(factor, vector, lower=1)[0]
    return found


def _slopes(log_odds: Numbers, own: npt.NDArray[np.bool_]) -> Numbers:
    """Derivative of each row's loss in its log-odds."""
    found: Numbers = special.expit(log_odds) - own
    return found


def _mu(epsilon: float, delta: float) -> float:
    try:
        return gdp_mu(validate.positive("epsilon", epsilon), validate.probability("delta", delta))
    except PlanError as error:
        raise UnlearningError(str(error)) from None


def _spectral_norm(rows: Numbers) -> float:
    """The largest singular value, rounded up."""
    gram = sum((rows[part].T @ rows[part] for part in _parts(len(rows))), start=np.zeros(()))
    return math.sqrt(float(linalg.eigvalsh(gram)[-1])) * (1 + _ROUNDING)


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK))


def _check_classes(labels: Labels, classes: int) -> None:
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(missing):
        raise UnlearningError(
            f"labels: expected somebody of each of {classes} classes, got nobody of class "
            f"{missing[0]}; train anew with the classes that remain"
        )


def _checked_indices(indices: Any, present: npt.NDArray[np.bool_]) -> Labels:
    """Indices of rows that are present, each once."""
    found = array_of(indices)
    if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size:
        raise UnlearningError(
            f"indices: expected whole numbers [n] of rows of the training, got "
            f"{validate.shown(indices)}"
        )
    if int(found.min()) < 0 or int(found.max()) >= len(present):
        raise UnlearningError(
            f"indices: expected 0 to {len(present) - 1}, got {found.min()} to {found.max()}"
        )
    values, times = np.unique(found.astype(np.int64), return_counts=True)
    gone = values[(times > 1) | ~present[values]]
    if len(gone):
        raise UnlearningError(
            f"indices: expected each row once, and none that was removed before, got {gone[0]}"
        )
    return values
