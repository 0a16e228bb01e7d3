"""Checks of a private training that its scores alone cannot make, each a test with a known error.

A defect that never shows in scores (noise that repeats itself) or that hides among other parts (a
contribution that is too large under noise that is too large as well) has its own check here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from privacy.audit.scores import CanaryScoreAuditor

__all__ = [
    "Check",
    "check_clipped_sum",
    "check_contribution",
    "check_epsilon",
    "check_freshness",
    "check_noise",
    "check_nothing_else",
    "check_sampling",
    "check_sum",
]

_MISMATCH = 0.02
"""Largest part of a clipped sum that need not be that of the definition: rounding makes 1e-5."""
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
    """No lower bound may exceed the claim.

    Example:
        >>> check_epsilon("gdp", 5.0, claimed=3.0).passed
        False
    """
    return Check(
        name=f"epsilon ({method})",
        passed=bound <= claimed,
        measured=bound,
        limit=claimed,
        says="lower bound on the epsilon of one step, at most the claimed one",
    )


def check_contribution(auditor: CanaryScoreAuditor, *, error: float) -> Check:
    """One example may move the clipped sum by the clipping norm and no further.

    Args:
        auditor: Of scores in units of the clipping norm.
        error: Chance with which an honest training fails.

    Example:
        >>> check_contribution(CanaryScoreAuditor([9.0, 9.1], [0.0, 0.1]), error=0.01).passed
        False
    """
    moved = auditor.mean_difference(confidence=1 - error)
    return Check(
        name="contribution",
        passed=moved <= 1 + _TOLERANCE,
        measured=moved,
        limit=1.0,
        says="clipping norms by which one example moves the sum, at least",
    )


def check_noise(residuals: torch.Tensor, *, noise_multiplier: float, error: float) -> Check:
    """The noise may not be less than the plan's.

    Args:
        residuals: What the clipped sums leave unexplained, in clipping norms, [steps, d].
        noise_multiplier: The plan's.
        error: Chance with which an honest training fails.

    Example:
        >>> halved = 0.5 * torch.randn(10, 1000)
        >>> check_noise(halved, noise_multiplier=1.0, error=1e-6).passed
        False
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


def check_nothing_else(residuals: torch.Tensor, *, noise_multiplier: float, error: float) -> Check:
    """Nothing but clipped gradients and the plan's noise may be in the gradient.

    Noise larger than planned fails too: from outside it looks like something that depends on data.

    Example:
        >>> coupled = torch.randn(10, 1000) + torch.linspace(-1, 1, 10)[:, None]
        >>> check_nothing_else(coupled, noise_multiplier=1.0, error=1e-6).passed
        False
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


def check_sum(
    sums: torch.Tensor, excess: torch.Tensor, *, noise_multiplier: float, error: float
) -> Check:
    """No more may be added up than the definition's clipped sum, less may.

    Many small excesses of all examples together show here, where none of them shows alone.

    Args:
        sums: Norms of the definition's sums, [steps, k] of k kinds.
        excess: What was added beyond them along their own directions, noise with it, [steps, k].
        noise_multiplier: The plan's.
        error: Chance with which an honest training fails.

    Example:
        >>> doubled = torch.full((50, 1), 8.0)
        >>> check_sum(doubled, doubled, noise_multiplier=1.0, error=1e-6).passed
        False
    """
    steps, kinds = sums.shape
    beyond = (excess - _TOLERANCE * sums).double().sum(0) / (noise_multiplier * math.sqrt(steps))
    measured = float(beyond.max())
    limit = float(stats.norm.isf(error / kinds))
    return Check(
        name="sum",
        passed=measured <= limit,
        measured=measured,
        limit=limit,
        says="what is added up beyond the clipped gradients, in deviations of the noise",
    )


def check_clipped_sum(
    residuals: Sequence[torch.Tensor], totals: Sequence[torch.Tensor], *, noise_multiplier: float
) -> Check:
    """With hardly any noise, what is added up must be the definition's sum, or less of it.

    Whatever couples examples or bends a gradient shows here, however many parameters there are.

    Args:
        residuals: What each step added up beyond the definition's sum, noise with it; [d] each.
        totals: The definition's sums; [d] each.
        noise_multiplier: Of these steps, far below 1.

    Example:
        >>> total = torch.tensor([1.0, 0.0])
        >>> turned, shrunk = torch.tensor([-1.0, 1.0]), torch.tensor([-0.5, 0.0])
        >>> check_clipped_sum([turned], [total], noise_multiplier=1e-4).passed
        False
        >>> check_clipped_sum([shrunk], [total], noise_multiplier=1e-4).passed
        True
    """
    measured = 0.0
    for residual, total in zip(residuals, totals, strict=True):
        size = float(total.norm())
        along = min(0.0, float(residual @ total) / size**2)
        rest = float((residual - along * total).square().sum())
        noise = noise_multiplier**2 * residual.numel()
        measured = max(measured, math.sqrt(max(0.0, rest - noise)) / size)
    return Check(
        name="clipped sum",
        passed=measured <= _MISMATCH,
        measured=measured,
        limit=_MISMATCH,
        says="share of the sum that is not the definition's, in steps with hardly any noise",
    )


def check_freshness(residuals: torch.Tensor, *, error: float) -> Check:
    """The noise of two steps may not be alike: the difference of the two would be without noise.

    The largest correlation over all pairs of steps; of independent noise each is normal with
    deviation 1 / sqrt(d), and the bound is corrected for their number.

    Example:
        >>> noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> check_freshness(torch.stack([noise, noise, -noise]), error=1e-6).passed
        False
    """
    steps, size = residuals.shape
    rows = torch.nn.functional.normalize(residuals.double(), dim=1)
    alike = (rows @ rows.T).fill_diagonal_(0.0).abs()
    # By steps so near to no noise at all that rounding is all there is, another check fails.
    measured = float(alike.max()) if steps > 1 else 0.0
    pairs = max(1, steps * (steps - 1) // 2)
    limit = min(1.0, float(stats.norm.isf(error / (2 * pairs))) / math.sqrt(size))
    return Check(
        name="freshness",
        passed=measured <= limit,
        measured=measured,
        limit=limit,
        says="largest correlation between the noise of two steps",
    )


def check_sampling(were_in: Sequence[bool], *, sampling_rate: float, error: float) -> Check:
    """Canaries are in as often as the sampling rate says, neither more nor less.

    Example:
        >>> check_sampling([True] * 99 + [False], sampling_rate=0.5, error=1e-6).passed
        False
    """
    found = sum(were_in)
    p_value = float(stats.binomtest(found, len(were_in), sampling_rate).pvalue)
    return Check(
        name="sampling",
        passed=p_value >= error,
        measured=found / len(were_in),
        limit=sampling_rate,
        says="share of the canaries in the samples, as the sampling rate",
    )


def _deviation(residuals: torch.Tensor) -> float:
    """Root mean square of everything: the noise has mean zero."""
    return float(residuals.double().square().mean().sqrt())


def _quantile(count: int, probability: float) -> float:
    """Of the root mean square of so many standard normal numbers."""
    return math.sqrt(float(stats.chi2.ppf(probability, count)) / count)
