"""Per-example weight gradients of dense two-dimensional convolutions, from patches of the input.

Writing all patches down costs kernel-size times the input; here those of a few examples at a time
are written into memory that stays in the processor's cache, and multiplied there. Norms alone also
come from Gram matrices (Goodfellow 2015, arXiv 1510.01799; for convolutions Rochette, Manoel and
Tramel 2019, arXiv 1912.06015), which pays where positions are few and channels many.

Everywhere here `images` is a convolution's input [n * copies, c, h, w], and `output_gradient` the
gradient at its output [n * copies, outputs, *positions]. Copies are more positions of an example.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from privacy.clipping.gradients import LONGEST_SUM, Instantiated

__all__ = [
    "CACHE",
    "Columns",
    "Geometry",
    "PatchLayout",
    "Rows",
    "gram_squares",
    "instantiated",
    "rounded_up",
    "squares",
]

CACHE = 1 << 21
"""Bytes copied at a time: they fit a core's own cache, with some of it left."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A dense convolution's sizes, one number a dimension: (vertical, horizontal) of images.

    Of one example there are so many `copies`, in adjacent rows of the batch.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    copies: int = 1

    @property
    def plain(self) -> bool:
        """Whether neighbouring outputs see neighbouring patches: no stride, no dilation."""
        return set(self.stride) == set(self.dilation) == {1}


@dataclass(frozen=True)
class Columns:
    """Every patch as one row of all its pixels: one wide product an example."""

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """How many pieces a gradient has and the shape of one: [outputs, height * width * inputs].

        Channels come last: a pixel's channels lie side by side in memory and are copied together.
        """
        height, width = self.geometry.kernel
        return 1, outputs, height * width * inputs

    def join(self, pieces: list[Tensor], inputs: int) -> Tensor:
        """From pieces, leading dimensions kept, to [..., outputs, inputs, height, width]."""
        return torch.unflatten(pieces[0], -1, (*self.geometry.kernel, inputs)).movedim(-1, -3)

    def scratch(self, images: Tensor, positions: tuple[int, int]) -> list[Tensor]:
        """Padded images, and patches [m, copies, *positions, *kernel, c]."""
        (examples, copies, height, width, channels), padding = images.shape, self.geometry.padding
        padded = (height + 2 * padding[0], width + 2 * padding[1])
        patches = (*positions, *self.geometry.kernel)
        return [
            images.new_zeros(examples, copies, *padded, channels),
            images.new_empty(examples, copies, *patches, channels),
        ]

    def multiply(
        self, images: Tensor, gradient: Tensor, scratch: list[Tensor], pieces: Sequence[Tensor]
    ) -> None:
        """Writes gradients to `pieces` [m, ...]: copies the patches, then multiplies.

        Images are [m, copies, h, w, c] here, and the gradient [m, copies * positions, outputs].
        """
        torch.bmm(gradient.mT, self.patches(images, scratch), out=pieces[0])

    def patches(self, images: Tensor, scratch: list[Tensor]) -> Tensor:
        """The patches, [m, copies * positions, patch]."""
        padded, patches = scratch
        # The border stays zero from example to example: only the middle is written.
        (top, left), (height, width) = self.geometry.padding, images.shape[2:4]
        padded[:, :, top : top + height, left : left + width].copy_(images)
        example, copy, down, right, channel = padded.stride()
        step_down, step_right = self.geometry.stride
        apart_down, apart_right = self.geometry.dilation
        # All patches as a view, in which a pixel occurs once for each patch that it is in.
        positions = (down * step_down, right * step_right)
        within = (down * apart_down, right * apart_right, channel)
        patches.copy_(padded.as_strided(patches.shape, (example, copy, *positions, *within)))
        return patches.flatten(4).flatten(1, 3)


@dataclass(frozen=True)
class Rows:
    """Patches one kernel row high, so a third of the copying for a kernel of three rows.

    The other rows are the same memory, one image row further down. Needs no stride, no dilation.
    """

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """For each kernel row a piece of [outputs, width * inputs]."""
        height, width = self.geometry.kernel
        return height, outputs, width * inputs

    def join(self, pieces: list[Tensor], inputs: int) -> Tensor:
        """The input channels come last here, the rows are pieces."""
        width = self.geometry.kernel[1]
        return torch.stack([torch.unflatten(p, -1, (width, inputs)).mT for p in pieces], dim=-2)

    def scratch(self, images: Tensor, positions: tuple[int, int]) -> list[Tensor]:
        """Patches [m, copies, padded image height, horizontal positions, width, c]."""
        rows = images.shape[2] + 2 * self.geometry.padding[0]
        shape = (*images.shape[:2], rows, positions[1], self.geometry.kernel[1], images.shape[-1])
        return [images.new_zeros(shape)]

    def multiply(
        self, images: Tensor, gradient: Tensor, scratch: list[Tensor], pieces: Sequence[Tensor]
    ) -> None:
        """Copies the row patches, then multiplies once for each kernel row."""
        (patches,) = scratch
        (down, right), (high, wide) = self.geometry.padding, images.shape[2:4]
        inner, positions = patches[:, :, down : down + high], patches.shape[3]
        for column in range(patches.shape[4]):
            # Position p sees image column p + column - right; what lies outside stays zero.
            first, last = max(0, right - column), min(positions, wide + right - column)
            if first < last:
                seen = images[:, :, :, first + column - right : last + column - right]
                inner[:, :, :, first:last, column].copy_(seen)
        lines, transposed = patches.flatten(4), gradient.mT
        height = patches.shape[2] - self.geometry.kernel[0] + 1
        for row, piece in enumerate(pieces):
            torch.bmm(transposed, lines[:, :, row : row + height].flatten(1, 3), out=piece)


PatchLayout = Columns | Rows
"""How patches lie in memory, and with them the gradients made from them: a gradient may be cut into
pieces of one shape, each the product of one matrix multiplication."""


def instantiated(layout: PatchLayout, images: Tensor, output_gradient: Tensor) -> Instantiated:
    """Per-example weight gradients, kept."""
    channels = images.shape[1]
    count, *shape = layout.pieces(channels, output_gradient.shape[1])
    # A block of memory for each piece: one for all costs a few percent of a whole step.
    examples = len(images) // layout.geometry.copies
    kept = [images.new_empty(examples, *shape) for _ in range(count)]
    norms = squares(layout, images, output_gradient, kept)
    return Instantiated(kept, join=lambda pieces: layout.join(pieces, channels), squares=norms)


def squares(
    layout: PatchLayout, images: Tensor, output_gradient: Tensor, kept: list[Tensor] | None = None
) -> Tensor:
    """Squared norms of the per-example weight gradients, float64 [n]; these go to `kept` if given.

    Norms are taken chunk by chunk, while the gradients are in the cache.
    """
    count, *shape = layout.pieces(images.shape[1], output_gradient.shape[1])
    examples, size = len(images) // layout.geometry.copies, math.prod(shape)
    # Values to add up in float32 before float64 takes over: a divisor of the size.
    block = next(n for n in range(min(size, LONGEST_SUM), 0, -1) if size % n == 0)
    norms = images.new_empty(count, examples, size // block)
    done, written = 0, kept
    for some, gradient, scratch in _chunks(layout, images, output_gradient):
        if written is None:
            written = [images.new_empty(len(some), *shape) for _ in range(count)]
        part = slice(done, done + len(some))
        own = slice(len(some)) if kept is None else part
        pieces = [piece[own] for piece in written]
        layout.multiply(some, gradient, scratch, pieces)
        for piece, norm in zip(pieces, norms, strict=True):
            blocks = piece.view(len(some), -1, block)
            torch.linalg.vector_norm(blocks, dim=2, out=norm[part])
        done = part.stop
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    vanished = count * size * torch.finfo(images.dtype).tiny
    return norms.double().square().sum((0, 2)) + vanished


def _chunks(
    layout: PatchLayout, images: Tensor, output_gradient: Tensor
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """A few examples at a time whose patches fit the cache, as many for each thread.

    Gives their images [m, copies, h, w, c], output gradients [m, copies * positions, outputs] and
    memory to work in.
    """
    positions = (output_gradient.shape[2], output_gradient.shape[3])
    copies, threads = layout.geometry.copies, torch.get_num_threads()
    examples = len(images) // copies
    gradient = output_gradient.permute(0, 2, 3, 1).reshape(
        examples, copies * math.prod(positions), -1
    )
    source = torch.unflatten(images.permute(0, 2, 3, 1), 0, (examples, copies))
    one = sum(part.numel() * part.element_size() for part in layout.scratch(source[:1], positions))
    fit = max(threads, min(64, CACHE // max(1, one)))
    # The last chunk should be as long as the others, and the threads have as many examples each.
    even = -(-examples // -(-examples // fit))
    size = -(-even // threads) * threads
    scratch = layout.scratch(source[:size], positions)
    for start in range(0, examples, size):
        some = source[start : start + size]
        yield some, gradient[start : start + size], [part[: len(some)] for part in scratch]


def gram_squares(geometry: Geometry, images: Tensor, output_gradient: Tensor) -> Tensor:
    """Squared norms, float64 [n], as the product of two Gram matrices: of patches and of gradients.

    Its cost grows with the square of the number of positions.
    """
    layout, found = Columns(geometry), []
    for some, gradient, scratch in _chunks(layout, images, output_gradient):
        patches = layout.patches(some, scratch)
        product = torch.bmm(patches, patches.mT) * torch.bmm(gradient, gradient.mT)
        found.append(product.flatten(1).sum(1, dtype=torch.float64).clamp_(min=0))
    return torch.cat(found)


def rounded_up(
    squares: Tensor, geometry: Geometry, images: Tensor, output_gradient: Tensor, *, gram: bool
) -> Tensor:
    """Squared norms [n] that no rounding can make too small for the gradient that is released.

    The norm is measured by one kernel and the clipped sum made by another, which rounds otherwise;
    a Gram product of cancelling positions loses more still (`gram`). Each error is bounded by the
    number of additions, half a unit of rounding, and `_alignment` (Higham 2002, section 3.1).
    """
    half_unit = torch.finfo(images.dtype).eps / 2
    whole = _alignment(geometry, images, output_gradient)
    if gram:
        patch = images.shape[1] * geometry.kernel[0] * geometry.kernel[1]
        additions = patch + output_gradient.shape[1] + 2
        squares = squares + additions * half_unit * whole.square()
    positions = geometry.copies * output_gradient[0, 0].numel()
    return (squares.sqrt() + positions * half_unit * whole).square()


def _alignment(geometry: Geometry, images: Tensor, output_gradient: Tensor) -> Tensor:
    """What a norm would be were all positions to agree: sum of |patch| |dy|, float64 [n].

    Rounding is relative to it, not to the norm: where positions cancel, it can be far larger.
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
    return rows.view(-1, geometry.copies).sum(1)
