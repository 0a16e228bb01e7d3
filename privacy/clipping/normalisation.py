"""GroupNorm, InstanceNorm, LayerNorm and RMSNorm: each example has statistics of its own.

BatchNorm, whose statistics are the batch's, is deliberately not here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from privacy.clipping.gradients import Instantiated, PerExampleGradients
from privacy.clipping.lines import Lines, fits, input_gradient_and_lines, lines
from privacy.errors import UnsupportedLayer

__all__ = ["GroupNormRule", "InstanceNorm", "InstanceNormRule", "LayerNormRule", "RMSNormRule"]

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

_CACHE = 1 << 20
"""Bytes of products, a thread, that can be written and read again at little cost."""
_SLICE = 3 << 14
"""Values, a thread, that make one operation worth its own cost."""
_DIMENSIONS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


class GroupNormRule:
    """The rule of one GroupNorm layer (Wu and He 2018, arXiv 1803.08494)."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer, and each group's mean and inverse deviation, [n, groups] both."""
        layer = self.layer
        return _grouped(inputs, layer.weight, layer.bias, layer.num_groups, layer.eps)

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The kernel's input gradient alone."""
        return _grouped_input_gradient(inputs, self.layer.weight, saved, output_gradient)

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Two sums over positions give both parameters; the normalised input is not formed."""
        layer, (mean, inverse) = self.layer, saved
        return _affine_parts(layer.weight, layer.bias, mean, inverse, inputs, output_gradient)

    def in_one_pass(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[nn.Parameter, PerExampleGradients]]]:
        """Both of the same sums, where compiled code takes them."""
        return _in_one_pass(self, inputs, saved, output_gradient)


class InstanceNormRule:
    """The rule of one InstanceNorm layer (Ulyanov, Vedaldi and Lempitsky 2016, arXiv 1607.08022).

    It is a GroupNorm of one channel a group, or, in eval mode with `track_running_stats`, a fixed
    line for each channel.
    """

    def __init__(self, layer: InstanceNorm, name: str) -> None:
        self.layer = layer
        self.name = name
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer, and mean and inverse deviation: [n, channels], or [1, channels] where fixed.

        Raises:
            UnsupportedLayer: The input has no batch dimension, or the layer is gathering
                statistics.
        """
        layer = self.layer
        wanted = _DIMENSIONS[type(layer)]
        if inputs.dim() != wanted or inputs.shape[1] != layer.num_features:
            raise UnsupportedLayer(
                f"{self.name}: expected a batch of {wanted} dimensions with {layer.num_features} "
                f"channels, got {list(inputs.shape)}; keep the batch in dimension 0"
            )
        if not layer.track_running_stats:
            return _grouped(inputs, layer.weight, layer.bias, layer.num_features, layer.eps)
        if layer.training:
            raise UnsupportedLayer(
                f"{self.name}: {type(layer).__name__} keeps running statistics of the examples "
                "without noise; set track_running_stats=False, or put the layer in eval mode"
            )
        assert layer.running_mean is not None, "a layer that tracks has a mean"
        assert layer.running_var is not None, "and a variance"
        mean, inverse = layer.running_mean, (layer.running_var + layer.eps).rsqrt()
        output = F.batch_norm(
            inputs, mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
        )
        return output, (mean[None], inverse[None])

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The kernel's input gradient alone, or the line's slope."""
        if not self.layer.track_running_stats:
            return _grouped_input_gradient(inputs, self.layer.weight, saved, output_gradient)
        slope = (saved[1] * self.layer.weight).view(1, -1, *[1] * (inputs.dim() - 2))
        return (output_gradient * slope).to(inputs.dtype)

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """As of a GroupNorm."""
        layer, (mean, inverse) = self.layer, saved
        return _affine_parts(layer.weight, layer.bias, mean, inverse, inputs, output_gradient)

    def in_one_pass(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[nn.Parameter, PerExampleGradients]]]:
        """As of a GroupNorm; a fixed line's two gradients share nothing."""
        if not self.layer.track_running_stats:
            return _in_one_pass(self, inputs, saved, output_gradient)
        through = self.input_gradient(inputs, saved, output_gradient)
        return through, self.per_example_gradients(inputs, saved, output_gradient)


class LayerNormRule:
    """The rule of one LayerNorm layer (Ba, Kiros and Hinton 2016, arXiv 1607.06450)."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer, and each row's mean and inverse deviation."""
        layer = self.layer
        output, mean, inverse = torch.native_layer_norm(
            inputs, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )
        return output, (mean, inverse)

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The kernel's input gradient alone."""
        layer, (mean, inverse) = self.layer, saved
        gradients = torch.ops.aten.native_layer_norm_backward(
            output_gradient.to(inputs.dtype),
            inputs,
            layer.normalized_shape,
            mean,
            inverse,
            layer.weight,
            layer.bias,
            (True, False, False),
        )
        gradient: torch.Tensor = gradients[0]
        return gradient

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Products with the normalised input, added over the positions that are not normalised."""
        layer, (mean, inverse) = self.layer, saved
        parts = list[tuple[nn.Parameter, PerExampleGradients]]()
        if layer.weight.requires_grad:
            product = output_gradient * (inputs - mean) * inverse
            total = _over_leading(product, layer.normalized_shape)
            parts.append((layer.weight, Instantiated([total])))
        if layer.bias is not None and layer.bias.requires_grad:
            total = _over_leading(output_gradient, layer.normalized_shape)
            parts.append((layer.bias, Instantiated([total])))
        return parts


class RMSNormRule:
    """The rule of one RMSNorm layer (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, layer: nn.RMSNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))
        self._over = tuple(range(-len(layer.normalized_shape), 0))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer, computed in float32 or better, and each row's inverse root mean square."""
        x = inputs.to(_wide(inputs))
        eps = torch.finfo(x.dtype).eps if self.layer.eps is None else self.layer.eps
        inverse = (x.square().mean(self._over, keepdim=True) + eps).rsqrt()
        return (x * inverse * self.layer.weight).to(inputs.dtype), (inverse,)

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """What the weight lets through, less its share along the input."""
        (inverse,) = saved
        scaled, through = inputs * inverse, output_gradient * self.layer.weight
        along = (through * scaled).mean(self._over, keepdim=True)
        return (inverse * (through - scaled * along)).to(inputs.dtype)

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Products with the scaled input, added over the positions that are not normalised."""
        product = output_gradient * (inputs * saved[0])
        total = _over_leading(product, self.layer.normalized_shape)
        return [(self.layer.weight, Instantiated([total]))]


def _grouped(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Group normalisation, and each group's mean and inverse deviation, [n, groups]."""
    examples, channels, positions = _sizes(inputs)
    output, mean, inverse = torch.native_group_norm(
        inputs, weight, bias, examples, channels, positions, groups, eps
    )
    return output, (mean.view(examples, groups), inverse.view(examples, groups))


def _grouped_input_gradient(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    saved: Sequence[torch.Tensor],
    output_gradient: torch.Tensor,
) -> torch.Tensor:
    """Group normalisation's input gradient alone."""
    mean, inverse = saved
    gradients = torch.ops.aten.native_group_norm_backward(
        output_gradient.to(inputs.dtype),
        inputs,
        mean,
        inverse,
        weight,
        *_sizes(inputs),
        mean.shape[1],
        (True, False, False),
    )
    gradient: torch.Tensor = gradients[0]
    return gradient


def _affine_parts(
    weight: nn.Parameter,
    bias: nn.Parameter,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
) -> list[tuple[nn.Parameter, PerExampleGradients]]:
    """Gradients of a line for each channel behind (x - mean) * inverse, both [n or 1, groups]."""
    if fits(inputs, output_gradient):
        return _of_lines(weight, bias, lines(inputs, output_gradient, mean, inverse))
    parts = list[tuple[nn.Parameter, PerExampleGradients]]()
    dtype = torch.promote_types(_wide(inputs), output_gradient.dtype)
    product, total = _sums_over_positions(inputs.to(dtype), output_gradient.to(dtype))
    if weight.requires_grad:
        grouped = [torch.unflatten(sums, 1, (mean.shape[1], -1)) for sums in (product, total)]
        centred = grouped[0] - mean.unsqueeze(2) * grouped[1]
        parts.append((weight, Instantiated([centred.mul_(inverse.unsqueeze(2)).flatten(1)])))
    if bias is not None and bias.requires_grad:
        parts.append((bias, Instantiated([total])))
    return parts


def _of_lines(
    weight: nn.Parameter, bias: nn.Parameter | None, found: Lines
) -> list[tuple[nn.Parameter, PerExampleGradients]]:
    """The gradients of those that are trained."""
    parts = list[tuple[nn.Parameter, PerExampleGradients]]()
    if weight.requires_grad:
        parts.append((weight, found.gain))
    if bias is not None and bias.requires_grad:
        parts.append((bias, found.shift))
    return parts


def _in_one_pass(
    rule: "GroupNormRule | InstanceNormRule",
    inputs: torch.Tensor,
    saved: Sequence[torch.Tensor],
    output_gradient: torch.Tensor,
) -> tuple[torch.Tensor, list[tuple[nn.Parameter, PerExampleGradients]]]:
    """Input gradient and per-example gradients of a layer with statistics of each example."""
    (mean, inverse), layer = saved, rule.layer
    if not fits(inputs, output_gradient):
        parts = rule.per_example_gradients(inputs, saved, output_gradient)
        return rule.input_gradient(inputs, saved, output_gradient), parts
    through, found = input_gradient_and_lines(inputs, output_gradient, mean, inverse, layer.weight)
    return through, _of_lines(layer.weight, layer.bias, found)


def _sums_over_positions(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    lines = examples * channels
    _, product, total = torch.ops.aten.native_group_norm_backward(
        dy.view(1, lines, positions),
        x.view(1, lines, positions),
        x.new_zeros(1, lines),
        x.new_ones(1, lines),
        None,
        *(1, lines, positions, lines),
        (False, True, True),
    )
    return product.view(examples, channels), total.view(examples, channels)


def _products(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Products dy x, those of many examples added over slices: all of them are never written."""
    height = _slice_height(x)
    if height == x.shape[2]:
        return dy * x
    running: torch.Tensor | None = None
    for some_x, some_dy in zip(torch.split(x, height, 2), torch.split(dy, height, 2), strict=True):
        if running is None:
            running = some_dy * some_x
        else:
            running[:, :, : some_x.shape[2]].addcmul_(some_dy, some_x)
    assert running is not None, "a batch of images has rows"
    return running


def _slice_height(x: torch.Tensor) -> int:
    """Image rows to multiply at a time; all of them where their products stay in the cache."""
    threads, rows = torch.get_num_threads(), x.shape[2]
    if x.device.type != "cpu" or x.numel() * x.element_size() < _CACHE * threads:
        return rows
    return min(rows, -(-_SLICE * threads * rows // x.numel()))


def _sizes(inputs: torch.Tensor) -> tuple[int, int, int]:
    """Examples, channels and positions; a plain batch of rows has one position."""
    examples, channels = inputs.shape[:2]
    return examples, channels, inputs.numel() // (examples * channels)


def _wide(values: torch.Tensor) -> torch.dtype:
    """The values' own dtype, float32 at least."""
    return torch.promote_types(values.dtype, torch.float32)


def _over_leading(values: torch.Tensor, normalised: Sequence[int]) -> torch.Tensor:
    """The sum over the dimensions between the example and the normalised ones."""
    positions = tuple(range(1, values.dim() - len(normalised)))
    return values.sum(positions) if positions else values
