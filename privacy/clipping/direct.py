"""Per-example weight gradients of dense convolutions straight from the images, without patches.

Compiled code (`privacy/native/convolution.c`) sums each example up at the speed of the native
weight gradient of them all, and takes the norm of the very numbers that it wrote. What a
convolution is lies in tables of offsets that are made here.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from privacy.clipping.gradients import Instantiated
from privacy.clipping.patches import CACHE, Geometry
from privacy.native.library import call, compiled, floats

__all__ = ["Twice", "fits", "instantiated", "rooms", "twice"]

_LANES = 16
"""Output channels are rounded up to whole vectors."""


def fits(inputs: torch.Tensor) -> bool:
    """Whether the compiled code takes this input: float32, on a CPU, and compiled at all."""
    return inputs.dtype == torch.float32 and inputs.device.type == "cpu" and compiled() is not None


def rooms(
    geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> tuple[int, int]:
    """Bytes that `instantiated` and `twice` take at most, beyond what they are given and a cache.

    What is laid out anew, and what each thread has for itself, counts as far as it exceeds `CACHE`.

    Args:
        geometry: As for `instantiated`.
        copies: As for `instantiated`.
        images: As for `instantiated`.
        output_gradient: As for `instantiated`.
    """
    (rows, channels, *sizes), outputs = images.shape, output_gradient.shape[1]
    whole, number = outputs + -outputs % _LANES, images.element_size()
    laid_out = 0 if _lies_right(images) else images.nbytes
    if whole > outputs or not _lies_right(output_gradient):
        laid_out += output_gradient.nbytes // outputs * whole
    threads, examples = torch.get_num_threads(), rows // copies
    padded = [size + 2 * border for size, border in zip(sizes, geometry.padding, strict=True)]
    borders = threads * copies * channels * math.prod(padded) if any(geometry.padding) else 0
    one = math.prod(geometry.kernel) * channels * whole
    passing = [laid_out + number * (threads * sums * one + borders) for sums in (0, 2)]
    beyond = [max(0, size - CACHE) for size in passing]
    return beyond[0] + examples * one * number, beyond[1]


def _lies_right(tensor: torch.Tensor) -> bool:
    """Whether the compiled code reads it where it lies: dense, with the channels last."""
    return tensor.movedim(1, -1).is_contiguous()


def instantiated(
    geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> Instantiated:
    """Per-example weight gradients, kept.

    Args:
        images: Its input, float32 [n * copies, c, *spatial], as `fits` says; channels last is best.
        output_gradient: The gradient at its output, float32 [n * copies, outputs, *positions].
    """
    layer = _Layer.of(geometry, copies, images, output_gradient)
    kept = images.new_empty(layer.examples, *layer.gradient_shape)
    squares = layer.run(kept, keep=True)
    # Of the layer only sizes: what is kept lets the activations go.
    channels, outputs = images.shape[1], layer.outputs

    def join(pieces: list[torch.Tensor]) -> torch.Tensor:
        return _joined(geometry, channels, outputs, pieces[0])

    return Instantiated([kept], join=join, squares=squares)


def twice(
    geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
) -> "Twice":
    """Per-example weight gradients that are summed up twice instead of kept.

    Args:
        geometry: As for `instantiated`.
        copies: As for `instantiated`.
        images: As for `instantiated`.
        output_gradient: As for `instantiated`.
    """
    layer = _Layer.of(geometry, copies, images, output_gradient)
    return Twice(geometry, copies, images, output_gradient, layer.run(layer.scratch(), keep=False))


@dataclass(frozen=True)
class Twice:
    """Gradients that are held by nobody: summed up once for their norms and again for their sum.

    Both times by the same additions, so that a norm is that of what the factor multiplies.

    Attributes:
        geometry: As for `twice`, and so the next three.
        copies: Rows an example.
        images: The layer's input.
        output_gradient: The gradient at its output.
        squares: Squared norms, float64 [n].
    """

    geometry: Geometry
    copies: int
    images: torch.Tensor
    output_gradient: torch.Tensor
    squares: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """What the first summing up found."""
        return self.squares

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """The second: each example's gradient times its factor, in the cache."""
        layer = _Layer.of(self.geometry, self.copies, self.images, self.output_gradient)
        total = layer.weighted_sum(floats(factors))
        return _joined(self.geometry, self.images.shape[1], layer.outputs, total)

    def instantiate(self) -> torch.Tensor:
        """The gradients themselves, after all."""
        kept = instantiated(self.geometry, self.copies, self.images, self.output_gradient)
        return kept.instantiate()

    def select(self, rows: torch.Tensor) -> "Twice":
        """The same of the examples in `rows`."""
        copied = (rows[:, None] * self.copies + torch.arange(self.copies)).flatten()
        images, gradient = self.images[copied], self.output_gradient[copied]
        return Twice(self.geometry, self.copies, images, gradient, self.squares[rows])


class _Work(ctypes.Structure):
    """The arguments of `convolution_gradients`, as `convolution.c` declares them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("examples", "lines", "line_length", "room_length")),
        *((name, ctypes.c_long) for name in ("positions", "taps", "outputs", "keep", "shares")),
        *((name, ctypes.c_void_p) for name in ("line", "position", "tap")),
        *((name, ctypes.c_void_p) for name in ("images", "gradient", "factors")),
        *((name, ctypes.c_void_p) for name in ("out", "room", "sums", "squares")),
        *((name, ctypes.c_long) for name in ("next", "next_thread")),
    )


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """Where things lie in the room of one example: its images, each with a border of zeros.

    Attributes:
        line: Offset of each line of the images, int64.
        position: Offset of the first pixel that each output position sees, int64.
        tap: Offset of each value of a patch from its first, int64, rising.
        room: Values in the room.
    """

    line: torch.Tensor
    position: torch.Tensor
    tap: torch.Tensor
    room: int


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer's input and output gradient as the compiled code takes them.

    Attributes:
        tables: Where things lie.
        geometry: Of the convolution.
        pixels: The images, channels last and dense.
        gradient: The output gradient, the same, with channels of zeros up to whole vectors.
        outputs: Output channels without these.
        examples: How many.
        threads: How many compute; read once, for each has its place in what is laid out for them.
    """

    tables: _Tables
    geometry: Geometry
    pixels: torch.Tensor
    gradient: torch.Tensor
    outputs: int
    examples: int
    threads: int

    @classmethod
    def of(
        cls, geometry: Geometry, copies: int, images: torch.Tensor, output_gradient: torch.Tensor
    ) -> "_Layer":
        """Lays out what does not lie right, and finds the tables."""
        pixels = floats(images.movedim(1, -1))
        gradient, outputs = output_gradient.movedim(1, -1), output_gradient.shape[1]
        if outputs % _LANES:
            whole = gradient.new_zeros(*gradient.shape[:-1], outputs + -outputs % _LANES)
            whole[..., :outputs] = gradient
            gradient = whole
        return cls(
            tables=_tables(geometry, copies, pixels.shape[1:], gradient.shape[1:-1]),
            geometry=geometry,
            pixels=pixels,
            gradient=floats(gradient),
            outputs=outputs,
            examples=len(images) // copies,
            threads=torch.get_num_threads(),
        )

    @property
    def gradient_shape(self) -> tuple[int, int]:
        """Of one example: taps and whole vectors of outputs."""
        return len(self.tables.tap), self.gradient.shape[-1]

    def scratch(self) -> torch.Tensor:
        """Room for one example's gradient a thread."""
        return self.pixels.new_empty(self.threads, *self.gradient_shape)

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """Of all examples' gradients, [taps, outputs]; one float32 factor each."""
        sums = self.scratch().zero_()
        self.run(self.scratch(), keep=False, factors=factors, sums=sums)
        return sums.sum(0)

    def run(
        self,
        out: torch.Tensor,
        *,
        keep: bool,
        factors: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Squared norms, float64 [n]; the gradients go to `out`, times `factors` to `sums`."""
        tables, pixels, threads = self.tables, self.pixels, self.threads
        border = any(self.geometry.padding)
        room = pixels.new_zeros(threads, tables.room) if border else pixels.new_empty(0)
        squares = pixels.new_empty(self.examples, dtype=torch.float64)
        work = _Work(
            examples=self.examples,
            lines=len(tables.line),
            line_length=pixels.shape[-2] * pixels.shape[-1],
            room_length=tables.room if border else 0,
            positions=len(tables.position),
            taps=len(tables.tap),
            outputs=self.gradient.shape[-1],
            keep=keep,
            shares=threads,
            line=tables.line.data_ptr(),
            position=tables.position.data_ptr(),
            tap=tables.tap.data_ptr(),
            images=pixels.data_ptr(),
            gradient=self.gradient.data_ptr(),
            factors=None if factors is None else factors.data_ptr(),
            out=out.data_ptr(),
            room=room.data_ptr(),
            sums=None if sums is None else sums.data_ptr(),
            squares=squares.data_ptr(),
        )
        call("convolution_gradients", work, threads=threads)
        return squares


def _joined(geometry: Geometry, channels: int, outputs: int, rows: torch.Tensor) -> torch.Tensor:
    """From [..., taps, whole vectors of outputs] to the weight's shape."""
    kernel = geometry.kernel
    whole = torch.unflatten(rows, -2, (*kernel, channels))[..., :outputs]
    return whole.movedim((-1, -2), (-len(kernel) - 2, -len(kernel) - 1))


@cache
def _tables(
    geometry: Geometry, copies: int, image: tuple[int, ...], positions: tuple[int, ...]
) -> _Tables:
    """The tables of a convolution over images [*spatial, channels]."""
    *sizes, channels = image
    padded = [size + 2 * border for size, border in zip(sizes, geometry.padding, strict=True)]
    steps = [math.prod(padded[axis + 1 :]) * channels for axis in range(len(padded))]
    one, nowhere = math.prod(padded) * channels, [0] * len(sizes)
    side_by_side = [1] * len(sizes)
    lines = _offsets([*sizes[:-1], 1], side_by_side, geometry.padding, steps)
    first = _offsets(positions, geometry.stride, nowhere, steps)
    window = _offsets(geometry.kernel, geometry.dilation, nowhere, steps)
    taps = [offset + channel for offset in window for channel in range(channels)]
    assert max(first) + max(taps) < one, "the last patch lies within its image"
    starts = [copy * one for copy in range(copies)]
    # Whatever the default device: compiled code reads them.
    table = partial(torch.tensor, dtype=torch.int64, device="cpu")
    return _Tables(
        line=table([start + line for start in starts for line in lines]),
        position=table([start + offset for start in starts for offset in first]),
        tap=table(taps),
        room=copies * one,
    )


def _offsets(
    counts: Sequence[int], strides: Sequence[int], starts: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """Offsets in memory of all places of a lattice, the last dimension fastest."""
    axes = zip(counts, strides, starts, steps, strict=True)
    along = [[(start + i * by) * step for i in range(n)] for n, by, start, step in axes]
    return [sum(place) for place in itertools.product(*along)]
