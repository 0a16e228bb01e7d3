"""Norms of per-example weight gradients from Gram matrices, without any gradient.

The squared norm of a sum of outer products is the inner product of two Gram matrices (Goodfellow
2015, arXiv 1510.01799; for convolutions Rochette, Manoel and Tramel 2019, arXiv 1912.06015). It
pays where positions are few and channels many. For dense two-dimensional convolutions.
"""

import torch
import torch.nn.functional as F

from privacy.clipping.patches import Columns, Geometry, chunks, pad

__all__ = ["gram_squares", "shifted_gram_squares"]


def gram_squares(
    geometry: Geometry, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """Squared norms as the product of two Gram matrices, of patches and of output gradients.

    Cheap where positions are few: it grows with their square.

    Returns:
        A float64 tensor [n].

    Example:
        >>> geometry = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> gram_squares(geometry, torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)).tolist()
        [768.0, 768.0]
    """
    layout, found = Columns(geometry), []
    for some, gradient, room in chunks(layout, images, output_gradient):
        patches = layout.patches(some, room)
        found.append(_inner(torch.bmm(patches, patches.mT), torch.bmm(gradient, gradient.mT)))
    return torch.cat(found)


def shifted_gram_squares(
    geometry: Geometry, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """The same from one Gram matrix of pixels: a patch's is a sum of shifted pieces of it.

    With the image's rows laid end to end, moving both patches by one kernel position moves both
    indices of the pixels' Gram matrix by the same distance. Needs no stride, no dilation.

    Returns:
        A float64 tensor [n].

    Example:
        >>> geometry = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> shifted_gram_squares(geometry, torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)).tolist()
        [768.0, 768.0]
    """
    height, width = geometry.kernel
    found = []
    for some, gradient, (padded, _) in chunks(Columns(geometry), images, output_gradient):
        pad(some, padded, geometry.padding)
        line = padded.shape[2]
        pixels = F.pad(padded.flatten(1, 2), (0, 0, 0, width - 1))
        lines = torch.unflatten(gradient, 1, (-1, line - width + 1))
        # Output rows get the length of image rows; the positions added have no gradient.
        outputs = F.pad(lines, (0, 0, 0, width - 1)).flatten(1, 2)
        whole, length = torch.bmm(pixels, pixels.mT), outputs.shape[1]
        moved = [row * line + column for row in range(height) for column in range(width)]
        total = whole[:, :length, :length].clone()
        for distance in moved[1:]:
            end = distance + length
            total += whole[:, distance:end, distance:end]
        found.append(_inner(total, torch.bmm(outputs, outputs.mT)))
    return torch.cat(found)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner products of two batches of matrices, never below zero, float64 [m]."""
    product = (first * second).flatten(1)
    return product.sum(1, dtype=torch.float64).clamp_(min=0)
