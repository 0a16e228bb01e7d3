"""GroupNorm and LayerNorm: their statistics are one example's own, so each can be clipped alone."""

from collections.abc import Sequence

import torch
from torch import nn

from privacy.clipping.gradients import Instantiated, PerExampleGradients

__all__ = ["GroupNormRule", "LayerNormRule"]


class GroupNormRule:
    """The rule of one GroupNorm layer (Wu and He 2018, arXiv 1803.08494).

    Example:
        >>> GroupNormRule(nn.GroupNorm(2, 4)).forward(torch.zeros(3, 4, 5, 5))[0].shape
        torch.Size([3, 4, 5, 5])
    """

    def __init__(self, layer: nn.GroupNorm) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer, and each group's mean and inverse deviation."""
        layer = self.layer
        examples, channels, positions = _sizes(inputs)
        output, mean, inverse = torch.native_group_norm(
            inputs,
            layer.weight,
            layer.bias,
            examples,
            channels,
            positions,
            layer.num_groups,
            layer.eps,
        )
        return output, (mean, inverse)

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The kernel's input gradient alone."""
        layer, (mean, inverse) = self.layer, saved
        examples, channels, positions = _sizes(inputs)
        gradients = torch.ops.aten.native_group_norm_backward(
            output_gradient.to(inputs.dtype),
            inputs,
            mean,
            inverse,
            layer.weight,
            examples,
            channels,
            positions,
            layer.num_groups,
            (True, False, False),
        )
        gradient: torch.Tensor = gradients[0]
        return gradient

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Two sums over positions give both parameters; the normalised input is not formed."""
        layer, (mean, inverse) = self.layer, saved
        parts = list[tuple[nn.Parameter, PerExampleGradients]]()
        total = _over_positions(output_gradient)
        if layer.weight.requires_grad:
            product = _over_positions(output_gradient * inputs)
            width = layer.num_channels // layer.num_groups
            mean = mean.view(-1, layer.num_groups).repeat_interleave(width, dim=1)
            inverse = inverse.view(-1, layer.num_groups).repeat_interleave(width, dim=1)
            parts.append((layer.weight, Instantiated([(product - mean * total) * inverse])))
        if layer.bias is not None and layer.bias.requires_grad:
            parts.append((layer.bias, Instantiated([total])))
        return parts


def _sizes(inputs: torch.Tensor) -> tuple[int, int, int]:
    """Examples, channels and positions; a plain batch of rows has one position."""
    examples, channels = inputs.shape[:2]
    return examples, channels, inputs.numel() // (examples * channels)


def _over_positions(values: torch.Tensor) -> torch.Tensor:
    """The sum over all dimensions after the channels, [n, channels]."""
    return values.sum(tuple(range(2, values.dim()))) if values.dim() > 2 else values


class LayerNormRule:
    """The rule of one LayerNorm layer (Ba, Kiros and Hinton 2016, arXiv 1607.06450).

    Example:
        >>> LayerNormRule(nn.LayerNorm(4)).forward(torch.zeros(3, 5, 4))[0].shape
        torch.Size([3, 5, 4])
    """

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
        positions = tuple(range(1, inputs.dim() - len(layer.normalized_shape)))
        if layer.weight.requires_grad:
            product = output_gradient * (inputs - mean) * inverse
            parts.append(
                (layer.weight, Instantiated([product.sum(positions) if positions else product]))
            )
        if layer.bias is not None and layer.bias.requires_grad:
            total = output_gradient.sum(positions) if positions else output_gradient
            parts.append((layer.bias, Instantiated([total])))
        return parts
