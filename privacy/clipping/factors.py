"""How much of each example's gradient is kept: the deciding line of DP-SGD, pure and alone."""

import torch

__all__ = ["clip_factors"]

_ROUNDING = 1e-5
"""Relative error allowed for in a norm: each is taken this much larger, so that none passes C."""


def clip_factors(squared_norms: torch.Tensor, *, max_grad_norm: float) -> torch.Tensor:
    """Flat clipping: min(1, C / norm), and 0 for a norm that is not finite.

    Guarantee: factor times true norm is at most `max_grad_norm`, given squared norms that are
    right to one part in 10^5: norms are rounded up before the division.

    Source: Abadi et al. 2016, arXiv 1607.00133.

    Args:
        squared_norms: Squared L2 norm of each example's whole gradient, float32 or float64 [n].
        max_grad_norm: C, > 0.

    Returns:
        Factors in [0, 1], of the dtype of `squared_norms`, [n].

    Example:
        >>> clip_factors(torch.tensor([0.25, 4.0, float("nan")]), max_grad_norm=1.0)
        tensor([1.0000, 0.5000, 0.0000])
    """
    norms = squared_norms.sqrt() * (1 + _ROUNDING)
    factors = (max_grad_norm / norms).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))
