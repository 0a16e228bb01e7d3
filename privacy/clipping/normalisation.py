"""GroupNorm, InstanceNorm, LayerNorm and RMSNorm: each example has statistics of its own.

Where it fits, compiled code (`privacy/native/normalisation.c`) gives a scale's and a shift's
gradients, and the input's of the same sums while the example is in the cache. BatchNorm, whose
statistics are the batch's, is deliberately not here.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.clipping.gradients import Instantiated, Parts, Saved
from privacy.errors import UnsupportedLayer
from privacy.native import call, compiled, floats

__all__ = ["GroupNormRule", "InstanceNorm", "InstanceNormRule", "LayerNormRule", "RMSNormRule"]
__all__ += ["AffineGradients", "affine_gradients", "fits", "input_and_affine_gradients"]

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

_CACHE = 1 << 20
"""Bytes of products, a thread, that can be written and read again at little cost."""
_SLICE = 3 << 14
"""Values, a thread, that make one operation worth its own cost."""
_MOST_CHANNELS = 4096
"""As many as the compiled code has memory for on its stack."""
_DIMENSIONS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


class GroupNormRule:
    """The rule of one GroupNorm layer (Wu and He 2018, arXiv 1803.08494)."""

    def __init__(self, layer: nn.GroupNorm | InstanceNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer, and each group's mean and inverse deviation, [n, groups] both."""
        layer = self.layer
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
        examples, channels, positions = _sizes(inputs)
        output, mean, inverse = torch.native_group_norm(
            inputs, layer.weight, layer.bias, examples, channels, positions, groups, layer.eps
        )
        return output, (mean.view(examples, groups), inverse.view(examples, groups))

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The kernel's input gradient alone."""
        sizes, dy = (*_sizes(inputs), saved[0].shape[1]), output_gradient.to(inputs.dtype)
        gradients = torch.ops.aten.native_group_norm_backward(
            dy, inputs, *saved, self.layer.weight, *sizes, (True, False, False)
        )
        gradient: Tensor = gradients[0]
        return gradient

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Two sums over positions give both parameters; the normalised input is not formed."""
        mean, inverse = saved
        if fits(inputs, output_gradient):
            found = affine_gradients(inputs, output_gradient, mean, inverse)
            return _of_trained(self.layer, lambda: found.scale, lambda: found.shift)
        dtype = torch.promote_types(_wide(inputs), output_gradient.dtype)
        product, total = _sums_over_positions(inputs.to(dtype), output_gradient.to(dtype))

        def scale() -> Instantiated:
            grouped = [torch.unflatten(sums, 1, (mean.shape[1], -1)) for sums in (product, total)]
            centred = grouped[0] - mean.unsqueeze(2) * grouped[1]
            return Instantiated([centred.mul_(inverse.unsqueeze(2)).flatten(1)])

        return _of_trained(self.layer, scale, lambda: Instantiated([total]))

    def in_one_pass(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor
    ) -> tuple[Tensor, Parts]:
        """Both of the same sums, where compiled code takes them."""
        if not fits(inputs, output_gradient):
            parts = self.per_example_gradients(inputs, saved, output_gradient)
            return self.input_gradient(inputs, saved, output_gradient), parts
        (mean, inverse), weight = saved, self.layer.weight
        through, found = input_and_affine_gradients(inputs, output_gradient, mean, inverse, weight)
        return through, _of_trained(self.layer, lambda: found.scale, lambda: found.shift)


class InstanceNormRule(GroupNormRule):
    """The rule of one InstanceNorm layer (Ulyanov, Vedaldi and Lempitsky 2016, arXiv 1607.08022).

    It is a GroupNorm of one channel a group, or, in eval mode with `track_running_stats`, a fixed
    scale and shift for each channel.
    """

    layer: InstanceNorm

    def __init__(self, layer: InstanceNorm, name: str) -> None:
        super().__init__(layer)
        self.name = name

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer, and mean and inverse deviation: [n, channels], or [1, channels] where fixed.

        Refuses an input without a batch dimension, and a layer that is gathering statistics.
        """
        layer = self.layer
        wanted = _DIMENSIONS[type(layer)]
        if inputs.dim() != wanted or inputs.shape[1] != layer.num_features:
            raise UnsupportedLayer(
                f"{self.name}: expected a batch of {wanted} dimensions with {layer.num_features} "
                f"channels, got {list(inputs.shape)}; keep the batch in dimension 0"
            )
        if not layer.track_running_stats:
            return super().forward(inputs)
        if layer.training:
            raise UnsupportedLayer(
                f"{self.name}: {type(layer).__name__} keeps running statistics of the examples "
                "without noise; set track_running_stats=False, or put the layer in eval mode"
            )
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None, "a layer that tracks has a mean"
        assert variance is not None, "and a variance"
        output = F.batch_norm(inputs, mean, variance, layer.weight, layer.bias, eps=layer.eps)
        return output, (mean[None], (variance + layer.eps).rsqrt()[None])

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """As of a GroupNorm, or the fixed scale times the output gradient."""
        if not self.layer.track_running_stats:
            return super().input_gradient(inputs, saved, output_gradient)
        slope = (saved[1] * self.layer.weight).view(1, -1, *[1] * (inputs.dim() - 2))
        return (output_gradient * slope).to(inputs.dtype)

    def in_one_pass(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor
    ) -> tuple[Tensor, Parts]:
        """As of a GroupNorm; with fixed statistics the two gradients share nothing."""
        if not self.layer.track_running_stats:
            return super().in_one_pass(inputs, saved, output_gradient)
        through = self.input_gradient(inputs, saved, output_gradient)
        return through, self.per_example_gradients(inputs, saved, output_gradient)


class LayerNormRule:
    """The rule of one LayerNorm layer (Ba, Kiros and Hinton 2016, arXiv 1607.06450)."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer, and each row's mean and inverse deviation."""
        layer = self.layer
        output, mean, inverse = torch.native_layer_norm(
            inputs, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )
        return output, (mean, inverse)

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The kernel's input gradient alone."""
        layer, dy = self.layer, output_gradient.to(inputs.dtype)
        shape, affine = layer.normalized_shape, (layer.weight, layer.bias)
        gradients = torch.ops.aten.native_layer_norm_backward(
            dy, inputs, shape, *saved, *affine, (True, False, False)
        )
        gradient: Tensor = gradients[0]
        return gradient

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Products with the normalised input, added over the positions that are not normalised."""
        shape, (mean, inverse) = self.layer.normalized_shape, saved
        return _of_trained(
            self.layer,
            lambda: _over_leading(output_gradient * (inputs - mean) * inverse, shape),
            lambda: _over_leading(output_gradient, shape),
        )


class RMSNormRule:
    """The rule of one RMSNorm layer (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, layer: nn.RMSNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))
        self._over = tuple(range(-len(layer.normalized_shape), 0))

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer, computed in float32 or better, and each row's inverse root mean square."""
        x = inputs.to(_wide(inputs))
        eps = torch.finfo(x.dtype).eps if self.layer.eps is None else self.layer.eps
        inverse = (x.square().mean(self._over, keepdim=True) + eps).rsqrt()
        return (x * inverse * self.layer.weight).to(inputs.dtype), (inverse,)

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """What the weight lets through, less its share along the input."""
        (inverse,) = saved
        scaled, through = inputs * inverse, output_gradient * self.layer.weight
        along = (through * scaled).mean(self._over, keepdim=True)
        return (inverse * (through - scaled * along)).to(inputs.dtype)

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Products with the scaled input, added over the positions that are not normalised."""
        product = output_gradient * (inputs * saved[0])
        return [(self.layer.weight, _over_leading(product, self.layer.normalized_shape))]


def _of_trained(
    layer: nn.Module, scale: Callable[[], Instantiated], shift: Callable[[], Instantiated]
) -> Parts:
    """The gradients of those of weight and bias that are trained; the others are not computed."""
    pairs = (layer.weight, scale), (layer.bias, shift)
    return [
        (parameter, gradients())
        for parameter, gradients in pairs
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad
    ]


@dataclass(frozen=True, kw_only=True)
class AffineGradients:
    """Per-example gradients of scale (the weight) and shift (the bias), [n, channels] both."""

    scale: Instantiated
    shift: Instantiated


def fits(inputs: Tensor, output_gradient: Tensor) -> bool:
    """Whether the compiled code takes these, and pays: float32 on a CPU, with the channels last.

    Then its inner loop runs over all channels at once, and needs no sum across a vector.
    """
    return (
        inputs.dtype == output_gradient.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.dim() > 2
        and inputs.shape[1] <= _MOST_CHANNELS
        and inputs.movedim(1, -1).is_contiguous()
        and not inputs.is_contiguous()
        and compiled() is not None
    )


def input_and_affine_gradients(
    inputs: Tensor, output_gradient: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, AffineGradients]:
    """The gradient at the normalisation's input too, given its scale, the weight [channels]."""
    through = torch.empty_like(inputs)
    return through, affine_gradients(inputs, output_gradient, mean, inverse, weight, through)


def affine_gradients(
    inputs: Tensor,
    output_gradient: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None = None,
    input_gradient: Tensor | None = None,
) -> AffineGradients:
    """The gradients of scale and shift behind (x - mean) * inverse, by the compiled code.

    Inputs and output gradients are [n, channels, *positions] as `fits` says; `mean` and `inverse`
    are [n, groups] or, where all examples share them, [1, groups]. Given the scale, `weight`
    [channels], the gradient at the input is written to `input_gradient`.
    """
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


class _Work(ctypes.Structure):
    """The arguments of `affine_gradients`, as `normalisation.c` declares them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("examples", "positions", "channels", "groups")),
        ("fixed", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("images", "gradient", "mean", "inverse", "weight")),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "input_gradient", "squares")),
        ("next", ctypes.c_long),
    )


def _sums_over_positions(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of dy x and of dy, [n, channels] both."""
    if x.dim() == 2:
        return dy * x, dy
    if not (x.is_contiguous() and dy.is_contiguous()):
        over = tuple(range(2, x.dim()))
        total = dy.sum(over)
        return _products(x, dy).sum(over), total
    # With every channel of every example a group of its own, of mean 0 and deviation 1, the
    # kernel's weight and bias gradients are these sums, in one pass.
    examples, channels, positions = _sizes(x)
    groups = examples * channels
    _, product, total = torch.ops.aten.native_group_norm_backward(
        dy.view(1, groups, positions),
        x.view(1, groups, positions),
        x.new_zeros(1, groups),
        x.new_ones(1, groups),
        None,
        *(1, groups, positions, groups),
        (False, True, True),
    )
    return product.view(examples, channels), total.view(examples, channels)


def _products(x: Tensor, dy: Tensor) -> Tensor:
    """Products dy x; of large inputs sums of them over slices of rows, to save memory traffic."""
    threads, rows = torch.get_num_threads(), x.shape[2]
    if x.device.type != "cpu" or x.numel() * x.element_size() < _CACHE * threads:
        return dy * x
    # Image rows to multiply at a time.
    height = -(-_SLICE * threads * rows // x.numel())
    if height >= rows:
        return dy * x
    running: Tensor | None = None
    for some_x, some_dy in zip(torch.split(x, height, 2), torch.split(dy, height, 2), strict=True):
        if running is None:
            running = some_dy * some_x
        else:
            running[:, :, : some_x.shape[2]].addcmul_(some_dy, some_x)
    assert running is not None, "a batch of images has rows"
    return running


def _sizes(inputs: Tensor) -> tuple[int, int, int]:
    """Examples, channels and positions; a plain batch of rows has one position."""
    examples, channels = inputs.shape[:2]
    return examples, channels, inputs.numel() // (examples * channels)


def _wide(values: Tensor) -> torch.dtype:
    """The values' own dtype, float32 at least."""
    return torch.promote_types(values.dtype, torch.float32)


def _over_leading(values: Tensor, normalised: Sequence[int]) -> Instantiated:
    """Gradients as sums over the dimensions between the example and the normalised ones."""
    positions = tuple(range(1, values.dim() - len(normalised)))
    return Instantiated([values.sum(positions) if positions else values])
