"""Per-example weight gradients of dense two-dimensional convolutions, from patches of the input.

A weight gradient is a product of output gradients and input patches. Writing all patches down costs
kernel-size times the input; here a few examples at a time are written down into room that stays in
the processor's cache, and multiplied there. Three layouts differ in what is copied and how wide the
products are; two Gram products know the norms without any gradient (Goodfellow 2015,
arXiv 1510.01799; for convolutions Rochette, Manoel and Tramel 2019, arXiv 1912.06015).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from privacy.clipping.gradients import Instantiated

__all__ = [
    "Columns",
    "Geometry",
    "PatchLayout",
    "Rows",
    "Shifts",
    "gram_squares",
    "instantiated",
    "shifted_gram_squares",
    "squares",
]

_CACHE = 1 << 20
"""Bytes of patches written down at a time: what a core's own cache holds with room to spare."""
_LONGEST_SUM = 1024


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A dense convolution's sizes, all (vertical, horizontal).

    Example:
        >>> Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)).plain
        True
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def plain(self) -> bool:
        """Whether neighbouring outputs see neighbouring patches: no stride, no dilation.

        Example:
            >>> Geometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1)).plain
            False
        """
        return self.stride == (1, 1) and self.dilation == (1, 1)


class PatchLayout(Protocol):
    """How patches lie in memory, and with them the gradients made from them.

    A layout may cut one gradient into pieces, each the product of one matrix multiplication.
    """

    @property
    def geometry(self) -> Geometry:
        """The convolution's sizes."""

    def pieces(self, inputs: int, outputs: int) -> list[tuple[int, ...]]:
        """Shapes of one example's pieces, given the channels."""

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """From pieces, leading dimensions kept, to [..., outputs, inputs, height, width]."""

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> torch.Tensor:
        """Room for the patches of as many examples as `images` [m, c, h, w] has."""

    def multiply(
        self,
        padded: torch.Tensor,
        gradient: torch.Tensor,
        room: torch.Tensor,
        pieces: list[torch.Tensor],
    ) -> None:
        """Writes gradients to `pieces`, from padded [m, h, w, c] and `gradient` [m, T, outputs]."""


@dataclass(frozen=True)
class Columns:
    """Every patch as one row of all its pixels: one wide product an example.

    Example:
        >>> same = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> Columns(same).pieces(2, 4)
        [(4, 18)]
    """

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> list[tuple[int, ...]]:
        """[outputs, height * width * inputs]."""
        height, width = self.geometry.kernel
        return [(outputs, height * width * inputs)]

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """The input channels come last here."""
        return torch.unflatten(pieces[0], -1, (*self.geometry.kernel, inputs)).movedim(-1, -3)

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> torch.Tensor:
        """[m, positions, patch]."""
        examples, channels = images.shape[:2]
        return images.new_empty(examples, *positions, *self.geometry.kernel, channels)

    def multiply(
        self,
        padded: torch.Tensor,
        gradient: torch.Tensor,
        room: torch.Tensor,
        pieces: list[torch.Tensor],
    ) -> None:
        """Copies the patches, then multiplies."""
        torch.bmm(gradient.mT, self.patches(padded, room), out=pieces[0])

    def patches(self, padded: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """The patches in `room`, [m, positions, patch]."""
        example, down, right, channel = padded.stride()
        (step_down, step_right), (apart_down, apart_right) = (
            self.geometry.stride,
            self.geometry.dilation,
        )
        strides = (
            example,
            down * step_down,
            right * step_right,
            down * apart_down,
            right * apart_right,
            channel,
        )
        return room.copy_(padded.as_strided(room.shape, strides)).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Rows:
    """Patches one kernel row high, so a third of the copying for a kernel of three rows.

    The other rows are the same memory, one image row further down. Needs no stride, no dilation.

    Example:
        >>> same = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> Rows(same).pieces(2, 4)
        [(4, 6), (4, 6), (4, 6)]
    """

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> list[tuple[int, ...]]:
        """For each kernel row [outputs, width * inputs]."""
        height, width = self.geometry.kernel
        return [(outputs, width * inputs)] * height

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """The input channels come last here, the rows are pieces."""
        width = self.geometry.kernel[1]
        return torch.stack(
            [torch.unflatten(piece, -1, (width, inputs)).mT for piece in pieces], dim=-2
        )

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> torch.Tensor:
        """[m, padded image height, horizontal positions, width, c]."""
        examples, channels, rows, _ = images.shape
        rows += 2 * self.geometry.padding[0]
        return images.new_empty(examples, rows, positions[1], self.geometry.kernel[1], channels)

    def multiply(
        self,
        padded: torch.Tensor,
        gradient: torch.Tensor,
        room: torch.Tensor,
        pieces: list[torch.Tensor],
    ) -> None:
        """Copies the row patches, then multiplies once for each kernel row."""
        example, down, right, channel = padded.stride()
        room.copy_(padded.as_strided(room.shape, (example, down, right, right, channel)))
        lines = room.flatten(3)
        height = room.shape[1] - self.geometry.kernel[0] + 1
        for row, piece in enumerate(pieces):
            torch.bmm(gradient.mT, lines[:, row : row + height].flatten(1, 2), out=piece)


@dataclass(frozen=True)
class Shifts:
    """Every kernel position as one shifted image: long copies, for images of few channels.

    Needs no stride.

    Example:
        >>> same = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> Shifts(same).pieces(2, 4)
        [(18, 4)]
    """

    geometry: Geometry

    def pieces(self, inputs: int, outputs: int) -> list[tuple[int, ...]]:
        """[inputs * height * width, outputs]."""
        height, width = self.geometry.kernel
        return [(inputs * height * width, outputs)]

    def join(self, pieces: list[torch.Tensor], inputs: int) -> torch.Tensor:
        """The output channels come last here."""
        return torch.unflatten(pieces[0], -2, (inputs, *self.geometry.kernel)).movedim(-1, -4)

    def room(self, images: torch.Tensor, positions: tuple[int, int]) -> torch.Tensor:
        """[m, c, height, width, positions]."""
        examples, channels = images.shape[:2]
        return images.new_empty(examples, channels, *self.geometry.kernel, *positions)

    def multiply(
        self,
        padded: torch.Tensor,
        gradient: torch.Tensor,
        room: torch.Tensor,
        pieces: list[torch.Tensor],
    ) -> None:
        """Copies the shifted images, then multiplies."""
        images = padded.permute(0, 3, 1, 2)
        vertical, horizontal = room.shape[-2:]
        apart_down, apart_right = self.geometry.dilation
        for row in range(room.shape[2]):
            for column in range(room.shape[3]):
                top, left = row * apart_down, column * apart_right
                shifted = images[:, :, top : top + vertical, left : left + horizontal]
                room[:, :, row, column].copy_(shifted)
        torch.bmm(room.flatten(4).flatten(1, 3), gradient, out=pieces[0])


def instantiated(
    layout: PatchLayout, images: torch.Tensor, output_gradient: torch.Tensor
) -> Instantiated:
    """Per-example weight gradients, kept.

    Args:
        layout: How.
        images: The convolution's input, [n, c, h, w].
        output_gradient: The gradient at its output, [n, outputs, *positions].

    Example:
        >>> geometry = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> part = instantiated(Columns(geometry), torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
        >>> part.instantiate().shape
        torch.Size([2, 1, 3, 1, 1])
    """
    channels = images.shape[1]
    shapes = layout.pieces(channels, output_gradient.shape[1])
    kept = [images.new_empty(len(images), *shape) for shape in shapes]
    norms = _multiplied(layout, images, output_gradient, kept)
    return Instantiated(kept, join=lambda pieces: layout.join(pieces, channels), squares=norms)


def squares(
    layout: PatchLayout, images: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """Squared norms of the per-example weight gradients, which are not kept.

    Returns:
        A float64 tensor [n].

    Example:
        >>> geometry = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> squares(Columns(geometry), torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)).round()
        tensor([768., 768.], dtype=torch.float64)
    """
    return _multiplied(layout, images, output_gradient, None)


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
    for padded, gradient, room in _chunks(layout, images, output_gradient):
        patches = layout.patches(padded, room)
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
    for padded, gradient, _ in _chunks(Columns(geometry), images, output_gradient):
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


def _multiplied(
    layout: PatchLayout,
    images: torch.Tensor,
    output_gradient: torch.Tensor,
    kept: list[torch.Tensor] | None,
) -> torch.Tensor:
    """Squared norms, chunk by chunk while the gradients are in the cache; keeps them if asked."""
    shapes = layout.pieces(images.shape[1], output_gradient.shape[1])
    sizes = [_block(math.prod(shape)) for shape in shapes]
    norms = [
        images.new_empty(len(images), math.prod(shape) // size)
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    done, scratch = 0, list[torch.Tensor]()
    for padded, gradient, room in _chunks(layout, images, output_gradient):
        count = len(padded)
        if kept is None:
            scratch = scratch or [images.new_empty(count, *shape) for shape in shapes]
            pieces = [piece[:count] for piece in scratch]
        else:
            pieces = [piece[done : done + count] for piece in kept]
        layout.multiply(padded, gradient, room, pieces)
        for piece, size, norm in zip(pieces, sizes, norms, strict=True):
            blocks = piece.view(count, -1, size)
            torch.linalg.vector_norm(blocks, dim=2, out=norm[done : done + count])
        done += count
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    vanished = sum(math.prod(shape) for shape in shapes) * torch.finfo(images.dtype).tiny
    return torch.stack([norm.double().square().sum(1) for norm in norms]).sum(0) + vanished


def _chunks(
    layout: PatchLayout, images: torch.Tensor, output_gradient: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Examples by the few whose patches fit the cache.

    Gives their padded images [m, h, w, c], output gradients [m, T, outputs] and room for patches.
    """
    positions = (output_gradient.shape[2], output_gradient.shape[3])
    gradient = output_gradient.permute(0, 2, 3, 1).flatten(1, 2)
    one = layout.room(images[:1], positions)
    size = min(len(images), max(2, min(64, _CACHE // max(1, one.numel() * one.element_size()))))
    room = layout.room(images[:size], positions)
    (down, right), (height, width) = layout.geometry.padding, images.shape[2:]
    padded = images.new_zeros(size, height + 2 * down, width + 2 * right, images.shape[1])
    inner = padded[:, down : down + height, right : right + width]
    for start in range(0, len(images), size):
        some = images[start : start + size].permute(0, 2, 3, 1)
        count = len(some)
        inner[:count].copy_(some)
        yield padded[:count], gradient[start : start + size], room[:count]


def _block(size: int) -> int:
    """Values to add up in float32 before float64 takes over: a divisor of `size`, at most 1024.

    Millions of squares added in float32 come out too small, and with them the norm that clips.
    """
    return next(block for block in range(min(size, _LONGEST_SUM), 0, -1) if size % block == 0)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner products of two batches of matrices, never below zero, float64 [m]."""
    product = (first * second).flatten(1)
    return product.sum(1, dtype=torch.float64).clamp_(min=0)
