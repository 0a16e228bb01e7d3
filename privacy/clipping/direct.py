"""Per-example weight gradients of dense convolutions straight from the images, without patches.

Compiled code (`privacy/native/convolution.c`) sums each example up at the speed of the native
weight gradient of them all, and takes the norm of the very numbers that it wrote: so the norm needs
no allowance for another kernel's rounding. Stride, padding, dilation, dimensions and copies all
become tables of offsets into one example's memory, made here once a shape; one loop serves them.

Everywhere here `images` is the layer's input, float32 [n * copies, c, *spatial] as `fits` says, and
`output_gradient` the gradient at its output, float32 [n * copies, outputs, *positions]. Both are
read with the channels last: what a vector of the processor holds lies side by side.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from privacy.clipping.gradients import Instantiated
from privacy.clipping.patches import CACHE, Geometry
from privacy.native import call, compiled, floats

__all__ = ["Twice", "fits", "instantiated", "peak_bytes", "twice"]

_LANES = 16
"""Output channels are filled up with zeros to a multiple of this, the floats of the widest vector:
the inner loop needs no remainder, and the zeros add nothing to a norm."""


def fits(inputs: Tensor) -> bool:
    """Whether the compiled code takes this input: float32, on a CPU, and compiled at all."""
    return inputs.dtype == torch.float32 and inputs.device.type == "cpu" and compiled() is not None


def peak_bytes(geometry: Geometry, images: Tensor, output_gradient: Tensor) -> tuple[int, int]:
    """Bytes that `instantiated` and `twice` take at most, beyond what they are given and a cache.

    What is laid out anew, and what each thread has for itself, counts as far as it exceeds `CACHE`.
    """
    (rows, channels, *sizes), outputs = images.shape, output_gradient.shape[1]
    whole, number = outputs + -outputs % _LANES, images.element_size()
    laid_out = 0 if _channels_last(images) else images.nbytes
    if whole > outputs or not _channels_last(output_gradient):
        laid_out += output_gradient.nbytes // outputs * whole
    threads, copies = torch.get_num_threads(), geometry.copies
    padded = [size + 2 * border for size, border in zip(sizes, geometry.padding, strict=True)]
    borders = threads * copies * channels * math.prod(padded) if any(geometry.padding) else 0
    one = math.prod(geometry.kernel) * channels * whole
    temporary = [laid_out + number * (threads * sums * one + borders) for sums in (0, 2)]
    beyond = [max(0, size - CACHE) for size in temporary]
    return beyond[0] + rows // copies * one * number, beyond[1]


def _channels_last(tensor: Tensor) -> bool:
    """Whether the compiled code reads it where it lies: dense, with the channels last."""
    return tensor.movedim(1, -1).is_contiguous()


def instantiated(geometry: Geometry, images: Tensor, output_gradient: Tensor) -> Instantiated:
    """Per-example weight gradients, kept."""
    layer = _Layer.of(geometry, images, output_gradient)
    kept = images.new_empty(layer.examples, *layer.gradient_shape)
    squares = layer.run(kept, keep=True)
    # `join` holds only sizes of the layer, so that the activations can be freed.
    channels, outputs = images.shape[1], layer.outputs
    join = partial(_joined, geometry, channels, outputs)
    return Instantiated([kept], join=lambda pieces: join(pieces[0]), squares=squares)


def twice(geometry: Geometry, images: Tensor, output_gradient: Tensor) -> "Twice":
    """Per-example weight gradients that are formed twice instead of kept."""
    layer = _Layer.of(geometry, images, output_gradient)
    return Twice(geometry, images, output_gradient, layer.run(layer.scratch(), keep=False))


@dataclass(frozen=True)
class Twice:
    """Gradients that are not kept: formed once for their norms, and in a second pass for their sum.

    Both times by the same additions, so that a norm is exactly that of what the factor multiplies.
    `squares` are the squared norms, float64 [n].
    """

    geometry: Geometry
    images: Tensor
    output_gradient: Tensor
    squares: Tensor

    def squared_norms(self) -> Tensor:
        """What the first pass found."""
        return self.squares

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The second pass: each example's gradient is scaled and added while it is in the cache."""
        layer = _Layer.of(self.geometry, self.images, self.output_gradient)
        total = layer.weighted_sum(floats(factors))
        return _joined(self.geometry, self.images.shape[1], layer.outputs, total)

    def instantiate(self) -> Tensor:
        """The gradients themselves, after all."""
        kept = instantiated(self.geometry, self.images, self.output_gradient)
        return kept.instantiate()

    def select(self, rows: Tensor) -> "Twice":
        """The same for the examples in `rows`."""
        copies = self.geometry.copies
        copied = (rows[:, None] * copies + torch.arange(copies)).flatten()
        images, gradient = self.images[copied], self.output_gradient[copied]
        return Twice(self.geometry, images, gradient, self.squares[rows])


class _Work(ctypes.Structure):
    """The arguments of `convolution_gradients`, as `convolution.c` declares them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("examples", "lines", "line_length", "padded_length")),
        *((name, ctypes.c_long) for name in ("positions", "taps", "outputs", "keep", "shares")),
        *((name, ctypes.c_void_p) for name in ("line", "position", "tap")),
        *((name, ctypes.c_void_p) for name in ("images", "gradient", "factors")),
        *((name, ctypes.c_void_p) for name in ("out", "padded", "sums", "squares")),
        *((name, ctypes.c_long) for name in ("next", "next_thread")),
    )


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """Where values lie in one example's memory of `padded` numbers: images in borders of zeros.

    Offsets, int64, of each `line` of the images; of the first pixel that each output `position`
    sees; and of each value of a patch from its first (`tap`), rising: taps that are neighbours in
    memory are found by comparing the first with the last.
    """

    line: Tensor
    position: Tensor
    tap: Tensor
    padded: int


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer's input and output gradient as the compiled code takes them.

    `pixels` and `gradient` have the channels last and are dense; the gradient has channels of zeros
    beyond its `outputs`, up to whole vectors. `threads` is read once, for each has its place in
    what is laid out for them.
    """

    tables: _Tables
    geometry: Geometry
    pixels: Tensor
    gradient: Tensor
    outputs: int
    examples: int
    threads: int

    @classmethod
    def of(cls, geometry: Geometry, images: Tensor, output_gradient: Tensor) -> "_Layer":
        """Copies what is not channels-last or not whole vectors, and finds the tables."""
        pixels = floats(images.movedim(1, -1))
        gradient, outputs = output_gradient.movedim(1, -1), output_gradient.shape[1]
        if outputs % _LANES:
            whole = gradient.new_zeros(*gradient.shape[:-1], outputs + -outputs % _LANES)
            whole[..., :outputs] = gradient
            gradient = whole
        return cls(
            tables=_tables(geometry, pixels.shape[1:], gradient.shape[1:-1]),
            geometry=geometry,
            pixels=pixels,
            gradient=floats(gradient),
            outputs=outputs,
            examples=len(images) // geometry.copies,
            threads=torch.get_num_threads(),
        )

    @property
    def gradient_shape(self) -> tuple[int, int]:
        """Of one example: taps, and output channels in whole vectors."""
        return len(self.tables.tap), self.gradient.shape[-1]

    def scratch(self) -> Tensor:
        """Memory for one example's gradient a thread."""
        return self.pixels.new_empty(self.threads, *self.gradient_shape)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Of all examples' gradients, [taps, outputs]; one float32 factor each."""
        sums = self.scratch().zero_()
        self.run(self.scratch(), keep=False, factors=factors, sums=sums)
        return sums.sum(0)

    def run(
        self, out: Tensor, *, keep: bool, factors: Tensor | None = None, sums: Tensor | None = None
    ) -> Tensor:
        """Squared norms, float64 [n]; the gradients go to `out`, times `factors` to `sums`."""
        tables, pixels, threads = self.tables, self.pixels, self.threads
        border = any(self.geometry.padding)
        padded = pixels.new_zeros(threads, tables.padded) if border else pixels.new_empty(0)
        squares = pixels.new_empty(self.examples, dtype=torch.float64)
        work = _Work(
            examples=self.examples,
            lines=len(tables.line),
            line_length=pixels.shape[-2] * pixels.shape[-1],
            padded_length=tables.padded if border else 0,
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
            padded=padded.data_ptr(),
            sums=None if sums is None else sums.data_ptr(),
            squares=squares.data_ptr(),
        )
        call("convolution_gradients", work, threads=threads)
        return squares


def _joined(geometry: Geometry, channels: int, outputs: int, rows: Tensor) -> Tensor:
    """From [..., taps, whole vectors of outputs] to the weight's shape."""
    kernel = geometry.kernel
    whole = torch.unflatten(rows, -2, (*kernel, channels))[..., :outputs]
    return whole.movedim((-1, -2), (-len(kernel) - 2, -len(kernel) - 1))


@cache
def _tables(geometry: Geometry, image: tuple[int, ...], positions: tuple[int, ...]) -> _Tables:
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
    starts = [copy * one for copy in range(geometry.copies)]
    # On the CPU whatever the default device is: compiled code reads them.
    table = partial(torch.tensor, dtype=torch.int64, device="cpu")
    return _Tables(
        line=table([start + line for start in starts for line in lines]),
        position=table([start + offset for start in starts for offset in first]),
        tap=table(taps),
        padded=geometry.copies * one,
    )


def _offsets(
    counts: Sequence[int], strides: Sequence[int], starts: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """Offsets in memory of all places of a lattice, the last dimension fastest."""
    axes = zip(counts, strides, starts, steps, strict=True)
    along = [[(start + i * by) * step for i in range(n)] for n, by, start, step in axes]
    return [sum(place) for place in itertools.product(*along)]
