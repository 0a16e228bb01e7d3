"""Per-example weight gradients of dense two-dimensional convolutions, from patches of the input.

A weight gradient is a product of output gradients and input patches. Writing all patches down costs
kernel-size times the input; here a few examples at a time are written down into room that stays in
the processor's cache, and multiplied there. Two layouts differ in what is copied and how wide the
products are. Copies of one example are more positions of it: one product adds them up.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from privacy.clipping.gradients import LONGEST_SUM, Instantiated

__all__ = [
    "CACHE",
    "Columns",
    "Geometry",
    "PatchLayout",
    "Rows",
    "chunks",
    "instantiated",
    "squares",
]

CACHE = 1 << 21
"""Bytes laid out anew at a time: what a core's own cache holds with room to spare."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A dense convolution's sizes, one number a dimension: (vertical, horizontal) of images."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether neighbouring outputs see neighbouring patches: no stride, no dilation."""
        return set(self.stride) == set(self.dilation) == {1}


class PatchLayout(Protocol):
    """How patches lie in memory, and with them the gradients made from them.

    A layout may cut one gradient into pieces of one shape, each the product of one matrix
    multiplication.
    """

    @property
    def geometry(self) -> Geometry:
        """The convolution's sizes."""

    def pieces(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """How many pieces a gradient has, and the shape of one, given the channels."""

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """From pieces, leading dimensions kept, to [..., outputs, inputs, height, width]."""

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> list[torch.Tensor]:
        """Room to work in for as many examples as `images` [m, copies, h, w, c] has, m first."""

    def multiply(
        self,
        images: torch.Tensor,
        gradient: torch.Tensor,
        room: list[torch.Tensor],
        pieces: Sequence[torch.Tensor],
    ) -> None:
        """Writes gradients to `pieces`, each [m, ...].

        Args:
            images: Of shape [m, copies, h, w, c].
            gradient: Of shape [m, copies * positions, outputs].
            room: As `room` made it for so many examples.
        """


@dataclass(frozen=True)
class Columns:
    """Every patch as one row of all its pixels: one wide product an example."""

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """One of [outputs, height * width * inputs]."""
        height, width = self.geometry.kernel
        return 1, outputs, height * width * inputs

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """The input channels come last here."""
        return torch.unflatten(pieces[0], -1, (*self.geometry.kernel, inputs)).movedim(-1, -3)

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> list[torch.Tensor]:
        """Padded images, and patches [m, copies, *positions, *kernel, c]."""
        shape = (*images.shape[:2], *positions, *self.geometry.kernel, images.shape[-1])
        patches = images.new_empty(shape)
        return [_padded_room(images, self.geometry.padding), patches]

    def multiply(
        self,
        images: torch.Tensor,
        gradient: torch.Tensor,
        room: list[torch.Tensor],
        pieces: Sequence[torch.Tensor],
    ) -> None:
        """Copies the patches, then multiplies."""
        torch.bmm(gradient.mT, self.patches(images, room), out=pieces[0])

    def patches(self, images: torch.Tensor, room: list[torch.Tensor]) -> torch.Tensor:
        """The patches in their room, [m, copies * positions, patch]."""
        padded, patches = room
        _pad(images, padded, self.geometry.padding)
        example, copy, down, right, channel = padded.stride()
        (step_down, step_right), (apart_down, apart_right) = (
            self.geometry.stride,
            self.geometry.dilation,
        )
        strides = (
            example,
            copy,
            down * step_down,
            right * step_right,
            down * apart_down,
            right * apart_right,
            channel,
        )
        patches.copy_(padded.as_strided(patches.shape, strides))
        return patches.flatten(4).flatten(1, 3)


@dataclass(frozen=True)
class Rows:
    """Patches one kernel row high, so a third of the copying for a kernel of three rows.

    The other rows are the same memory, one image row further down. Needs no stride, no dilation.
    """

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """For each kernel row [outputs, width * inputs]."""
        height, width = self.geometry.kernel
        return height, outputs, width * inputs

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """The input channels come last here, the rows are pieces."""
        width = self.geometry.kernel[1]
        return torch.stack(
            [torch.unflatten(piece, -1, (width, inputs)).mT for piece in pieces], dim=-2
        )

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> list[torch.Tensor]:
        """Patches [m, copies, padded image height, horizontal positions, width, c]."""
        rows = images.shape[2] + 2 * self.geometry.padding[0]
        shape = (*images.shape[:2], rows, positions[1], self.geometry.kernel[1], images.shape[-1])
        return [images.new_zeros(shape)]

    def multiply(
        self,
        images: torch.Tensor,
        gradient: torch.Tensor,
        room: list[torch.Tensor],
        pieces: Sequence[torch.Tensor],
    ) -> None:
        """Copies the row patches, then multiplies once for each kernel row."""
        (patches,) = room
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


def instantiated(
    layout: PatchLayout, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> Instantiated:
    """Per-example weight gradients, kept.

    Args:
        images: The convolution's input, [n * copies, c, h, w].
        output_gradient: The gradient at its output, [n * copies, outputs, *positions].
    """
    channels = images.shape[1]
    count, *shape = layout.pieces(channels, output_gradient.shape[1])
    # A block of memory for each piece: one for all costs a few percent of a whole step.
    kept = [images.new_empty(len(images) // copies, *shape) for _ in range(count)]
    norms = _multiplied(layout, copies, images, output_gradient, kept)
    return Instantiated(kept, join=lambda pieces: layout.join(pieces, channels), squares=norms)


def squares(
    layout: PatchLayout, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """Squared norms of the per-example weight gradients, which are not kept.

    Args:
        layout: As for `instantiated`.
        copies: As for `instantiated`.
        images: As for `instantiated`.
        output_gradient: As for `instantiated`.

    Returns:
        A float64 tensor [n].
    """
    return _multiplied(layout, copies, images, output_gradient, None)


def _multiplied(
    layout: PatchLayout,
    copies: int,
    images: torch.Tensor,
    output_gradient: torch.Tensor,
    kept: list[torch.Tensor] | None,
) -> torch.Tensor:
    """Squared norms, chunk by chunk while the gradients are in the cache; keeps them if asked."""
    count, *shape = layout.pieces(images.shape[1], output_gradient.shape[1])
    examples, size = len(images) // copies, math.prod(shape)
    block = _block_length(size)
    norms = images.new_empty(count, examples, size // block)
    done, scratch = 0, kept
    for some, gradient, room in chunks(layout, copies, images, output_gradient):
        if scratch is None:
            scratch = [images.new_empty(len(some), *shape) for _ in range(count)]
        part = slice(done, done + len(some))
        own = slice(len(some)) if kept is None else part
        pieces = [piece[own] for piece in scratch]
        layout.multiply(some, gradient, room, pieces)
        for piece, norm in zip(pieces, norms, strict=True):
            blocks = piece.view(len(some), -1, block)
            torch.linalg.vector_norm(blocks, dim=2, out=norm[part])
        done = part.stop
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    vanished = count * size * torch.finfo(images.dtype).tiny
    return norms.double().square().sum((0, 2)) + vanished


def chunks(
    layout: PatchLayout, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Examples by the few whose patches fit the cache, as many for each thread.

    Gives their images [m, copies, h, w, c], output gradients [m, copies * positions, outputs] and
    room to work in.
    """
    positions = (output_gradient.shape[2], output_gradient.shape[3])
    examples, threads = len(images) // copies, torch.get_num_threads()
    gradient = output_gradient.permute(0, 2, 3, 1).reshape(
        examples, copies * math.prod(positions), -1
    )
    source = torch.unflatten(images.permute(0, 2, 3, 1), 0, (examples, copies))
    one = sum(part.numel() * part.element_size() for part in layout.room(source[:1], positions))
    fit = max(threads, min(64, CACHE // max(1, one)))
    # The last chunk should be as long as the others, and the threads have as many examples each.
    even = -(-examples // -(-examples // fit))
    size = -(-even // threads) * threads
    room = layout.room(source[:size], positions)
    for start in range(0, examples, size):
        some = source[start : start + size]
        yield some, gradient[start : start + size], [part[: len(some)] for part in room]


def _padded_room(images: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """Zeros [m, copies, h, w, c] of the padded size."""
    examples, copies, height, width, channels = images.shape
    down, right = padding
    return images.new_zeros(examples, copies, height + 2 * down, width + 2 * right, channels)


def _pad(images: torch.Tensor, padded: torch.Tensor, padding: tuple[int, ...]) -> None:
    """Writes [m, copies, h, w, c] into the middle of its padded room; the border stays zero."""
    (down, right), (height, width) = padding, images.shape[2:4]
    padded[:, :, down : down + height, right : right + width].copy_(images)


def _block_length(size: int) -> int:
    """Values to add up in float32 before float64 takes over: a divisor of `size`."""
    return next(block for block in range(min(size, LONGEST_SUM), 0, -1) if size % block == 0)
