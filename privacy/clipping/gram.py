"""Norms of per-example weight gradients from Gram matrices, without any gradient.

The squared norm of a sum of outer products is the inner product of two Gram matrices (Goodfellow
2015, arXiv 1510.01799; for convolutions Rochette, Manoel and Tramel 2019, arXiv 1912.06015). It
pays where positions are few and channels many. For dense two-dimensional convolutions.
"""

import torch
import torch.nn.functional as F

from privacy.clipping.patches import Columns, Geometry, chunks

__all__ = ["alignment", "gram_squares", "rounded_up"]


def alignment(
    geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """What a gradient's norm would be were all positions to agree: sum of |patch| |dy|.

    Rounding is relative to it, not to the norm: where positions cancel, it can be far larger.

    Args:
        images: Its input, [n * copies, c, h, w].
        output_gradient: The gradient at its output, [n * copies, outputs, *positions].

    Returns:
        A float64 tensor [n].
    """
    pixels = images.square().sum(1, keepdim=True)
    patches = F.conv2d(
        pixels,
        pixels.new_ones(1, 1, *geometry.kernel),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
    )
    squares = patches[:, 0] * output_gradient.square().sum(1)
    rows = squares.clamp_(min=0).sqrt_().flatten(1).sum(1, dtype=torch.float64)
    return rows.view(-1, copies).sum(1)


def rounded_up(
    squares: torch.Tensor,
    geometry: Geometry,
    copies: int,
    images: torch.Tensor,
    output_gradient: torch.Tensor,
    *,
    gram: bool,
) -> torch.Tensor:
    """Squared norms that no rounding can make too small for the gradient that is released.

    The norm is measured by one kernel and the clipped sum made by another, which rounds otherwise;
    a Gram product of cancelling positions loses more still. Each error is bounded by the number of
    additions, half a unit of rounding, and `alignment` (Higham 2002, section 3.1).

    Args:
        squares: Squared norms as measured, float64 [n].
        images: Its input, [n * copies, c, h, w].
        output_gradient: The gradient at its output, [n * copies, outputs, *positions].
        gram: Whether the norms come from Gram products.

    Returns:
        A float64 tensor [n].
    """
    half_unit = torch.finfo(images.dtype).eps / 2
    whole = alignment(geometry, copies, images, output_gradient)
    if gram:
        patch = images.shape[1] * geometry.kernel[0] * geometry.kernel[1]
        additions = patch + output_gradient.shape[1] + 2
        squares = squares + additions * half_unit * whole.square()
    positions = copies * output_gradient[0, 0].numel()
    return (squares.sqrt() + positions * half_unit * whole).square()


def gram_squares(
    geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """Squared norms as the product of two Gram matrices, of patches and of output gradients.

    Cheap where positions are few: it grows with their square.

    Returns:
        A float64 tensor [n].
    """
    layout, found = Columns(geometry), []
    for some, gradient, room in chunks(layout, copies, images, output_gradient):
        patches = layout.patches(some, room)
        found.append(_inner(torch.bmm(patches, patches.mT), torch.bmm(gradient, gradient.mT)))
    return torch.cat(found)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner products of two batches of matrices, never below zero, float64 [m]."""
    product = (first * second).flatten(1)
    return product.sum(1, dtype=torch.float64).clamp_(min=0)
