"""A check: one test that the gate consists of; and those of the claimed and the whole noise."""

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

__all__ = ["Check", "check_epsilon", "check_freshness", "check_noise", "check_nothing_else"]

_TOLERANCE = 0.01
"""How far the measured deviation may lie from the plan's beyond chance: rounding, low precision."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test that the gate consists of.

    Attributes:
        name: What is tested.
        passed: Whether the training may be what the plan says.
        measured: What was found.
        limit: What it was compared with.
        says: The comparison in words.

    Example:
        >>> Check(name="noise", passed=True, measured=1.0, limit=0.99, says="...").passed
        True
    """

    name: str
    passed: bool
    measured: float
    limit: float
    says: str


def check_epsilon(method: str, bound: float, *, claimed: float) -> Check:
    """No lower bound may exceed the claim."""
    return Check(
        name=f"epsilon ({method})",
        passed=bound <= claimed,
        measured=bound,
        limit=claimed,
        says="lower bound on the epsilon of one step, at most the claimed one",
    )


def check_noise(residuals: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """The noise may not be less than the plan's.

    Args:
        residuals: What the clipped sums leave unexplained, in clipping norms, [steps, d].
    """
    measured = _deviation(residuals)
    limit = (1 - _TOLERANCE) * noise_multiplier * _quantile(residuals.numel(), error)
    return Check(
        name="noise",
        passed=measured >= limit,
        measured=measured,
        limit=noise_multiplier,
        says="deviation of what no clipped gradient explains, at least the noise multiplier",
    )


def check_nothing_else(residuals: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """Nothing but clipped gradients and the plan's noise may be in the gradient.

    Noise larger than planned fails too: from outside it looks like something that depends on data.
    """
    measured = _deviation(residuals)
    limit = (1 + _TOLERANCE) * noise_multiplier * _quantile(residuals.numel(), 1 - error)
    return Check(
        name="nothing else",
        passed=measured <= limit,
        measured=measured,
        limit=noise_multiplier,
        says="deviation of what no clipped gradient explains, at most the noise multiplier",
    )


def check_freshness(residuals: Tensor, *, error: float) -> Check:
    """The noise of two steps may not be alike: the difference of the two would be without noise.

    The largest correlation over all pairs of steps; of independent noise each follows
    Student's law, and the bound is corrected for their number.
    """
    steps, size = residuals.shape
    rows = torch.nn.functional.normalize(residuals.double(), dim=1)
    alike = (rows @ rows.T).fill_diagonal_(0.0).abs()
    # By steps so near to no noise at all that rounding is all there is, another check fails.
    measured = float(alike.max()) if steps > 1 else 0.0
    pairs = max(1, steps * (steps - 1) // 2)
    student = float(stats.t.isf(error / (2 * pairs), max(1, size - 1)))
    limit = student / math.sqrt(student**2 + max(1, size - 1))
    return Check(
        name="freshness",
        passed=measured <= limit,
        measured=measured,
        limit=limit,
        says="largest correlation between the noise of two steps",
    )


def _deviation(residuals: Tensor) -> float:
    """Root mean square of everything: the noise has mean zero."""
    return float(residuals.double().square().mean().sqrt())


def _quantile(count: int, probability: float) -> float:
    """Of the root mean square of so many standard normal numbers."""
    return math.sqrt(float(stats.chi2.ppf(probability, count)) / count)
