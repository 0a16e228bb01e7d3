"""Per-example gradients of a normalisation's line for each channel, in one pass, channels last.

Compiled code (`privacy/native/normalisation.c`) sums up over the positions, and makes the input
gradient of the same sums while the example is in the cache.
"""

import ctypes
from dataclasses import dataclass

import torch

from privacy.clipping.gradients import Instantiated
from privacy.native.library import call, compiled, floats

__all__ = ["Lines", "fits", "input_gradient_and_lines", "lines"]

_MOST_CHANNELS = 4096
"""As many as the compiled code has room for."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Gradients of a line's slope and of its offset.

    Attributes:
        gain: Of the weight, [n, channels].
        shift: Of the bias, [n, channels].
    """

    gain: Instantiated
    shift: Instantiated


def fits(inputs: torch.Tensor, output_gradient: torch.Tensor) -> bool:
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


def lines(
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> Lines:
    """The gradients of a line behind (x - mean) * inverse.

    Args:
        inputs: As `fits` says, [n, channels, *positions].
        mean: Of each group of channels, [n, groups] or, where all examples share it, [1, groups].
    """
    return _run(inputs, output_gradient, mean, inverse, None, None)


def input_gradient_and_lines(
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, Lines]:
    """The same, and the gradient at the input of the normalisation and its line.

    Args:
        inputs: As for `lines`.
        output_gradient: As for `lines`.
        mean: Of each group of each example, [n, groups].
        inverse: As for `lines`.
        weight: The line's slope, [channels].
    """
    through = torch.empty_like(inputs)
    return through, _run(inputs, output_gradient, mean, inverse, weight, through)


class _Work(ctypes.Structure):
    """The arguments of `line_gradients`, as `normalisation.c` declares them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("examples", "positions", "channels", "groups")),
        ("fixed", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("images", "gradient", "mean", "inverse", "weight")),
        *((name, ctypes.c_void_p) for name in ("gain", "shift", "input_gradient", "squares")),
        ("next", ctypes.c_long),
    )


def _run(
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    through: torch.Tensor | None,
) -> Lines:
    """The gradients; the input gradient goes to `through`."""
    examples, channels = inputs.shape[:2]
    images, gradient = (floats(t.movedim(1, -1)) for t in (inputs, output_gradient))
    statistics = [floats(part) for part in (mean, inverse)]
    slope = None if weight is None else floats(weight)
    gain, shift = inputs.new_empty(2, examples, channels)
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
        gain=gain.data_ptr(),
        shift=shift.data_ptr(),
        input_gradient=None if through is None else through.data_ptr(),
        squares=squares.data_ptr(),
    )
    call("line_gradients", work, threads=torch.get_num_threads())
    gains, shifts = squares
    return Lines(
        gain=Instantiated([gain], squares=gains), shift=Instantiated([shift], squares=shifts)
    )
