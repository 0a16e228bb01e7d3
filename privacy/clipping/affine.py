"""Per-example gradients of a normalisation's scale and shift, one each a channel, in one pass.

Compiled code (`privacy/native/normalisation.c`) sums up over the positions, and makes the input
gradient of the same sums while the example is in the cache. It wants the channels last: then the
inner loop runs over all of them at once, and needs no sum across a vector.

Everywhere here inputs and output gradients are [n, channels, *positions] as `fits` says; `mean` and
`inverse` (deviation) are [n, groups] or, where all examples share them, [1, groups].
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from privacy.clipping.gradients import Instantiated
from privacy.native.library import call, compiled, floats

__all__ = ["AffineGradients", "affine_gradients", "fits", "input_and_affine_gradients"]

_MOST_CHANNELS = 4096
"""As many as the compiled code has memory for on its stack."""


@dataclass(frozen=True, kw_only=True)
class AffineGradients:
    """Per-example gradients of scale (the weight) and shift (the bias), [n, channels] both."""

    scale: Instantiated
    shift: Instantiated


def fits(inputs: Tensor, output_gradient: Tensor) -> bool:
    """Whether the compiled code takes these, and pays: float32 on a CPU, with the channels last."""
    return (
        inputs.dtype == output_gradient.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.dim() > 2
        and inputs.shape[1] <= _MOST_CHANNELS
        and inputs.movedim(1, -1).is_contiguous()
        and not inputs.is_contiguous()
        and compiled() is not None
    )


def affine_gradients(
    inputs: Tensor, output_gradient: Tensor, mean: Tensor, inverse: Tensor
) -> AffineGradients:
    """The gradients of scale and shift behind (x - mean) * inverse."""
    return _run(inputs, output_gradient, mean, inverse, None, None)


def input_and_affine_gradients(
    inputs: Tensor, output_gradient: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, AffineGradients]:
    """The gradient at the normalisation's input too, given its scale, the weight [channels]."""
    input_gradient = torch.empty_like(inputs)
    return input_gradient, _run(inputs, output_gradient, mean, inverse, weight, input_gradient)


class _Work(ctypes.Structure):
    """The arguments of `affine_gradients`, as `normalisation.c` declares them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("examples", "positions", "channels", "groups")),
        ("fixed", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("images", "gradient", "mean", "inverse", "weight")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "input_gradient", "squares")),
        ("next", ctypes.c_long),
    )


def _run(
    inputs: Tensor,
    output_gradient: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    input_gradient: Tensor | None,
) -> AffineGradients:
    """The gradients; the input gradient is written where there is a place for it."""
    examples, channels = inputs.shape[:2]
    images, gradient = (floats(t.movedim(1, -1)) for t in (inputs, output_gradient))
    # Names for what `floats` may have copied: it must live until the call is over.
    statistics = [floats(part) for part in (mean, inverse)]
    slope = None if weight is None else floats(weight)
    scale, shift = inputs.new_empty(2, examples, channels)
    squares = inputs.new_empty(2, examples, dtype=torch.float64)
    work = _Work(
        examples=examples,
        positions=inputs[0, 0].numel(),
        channels=channels,
        groups=mean.shape[1],
        fixed=len(mean) != examples,
        images=images.data_ptr(),
        gradient=gradient.data_ptr(),
        mean=statistics[0].data_ptr(),
        inverse=statistics[1].data_ptr(),
        weight=None if slope is None else slope.data_ptr(),
        scale=scale.data_ptr(),
        shift=shift.data_ptr(),
        input_gradient=None if input_gradient is None else input_gradient.data_ptr(),
        squares=squares.data_ptr(),
    )
    call("affine_gradients", work, threads=torch.get_num_threads())
    scales, shifts = squares
    return AffineGradients(
        scale=Instantiated([scale], squares=scales), shift=Instantiated([shift], squares=shifts)
    )
