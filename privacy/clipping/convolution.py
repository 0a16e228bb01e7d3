"""Convolutions of one, two and three dimensions, plain and transposed.

The native kernel does all the work: the input gradient alone, the weight gradient of scaled output
gradients, and, with each example made a group of one large grouped convolution, the per-example
weight gradients.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from privacy.clipping.gradients import Instantiated, PerExampleGradients

__all__ = ["ConvolutionRule"]

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


class ConvolutionRule:
    """The rule of one convolution, with any stride, padding and its mode, dilation and groups.

    Example:
        >>> rule = ConvolutionRule(nn.Conv2d(3, 4, 3, padding="same"))
        >>> rule.forward(torch.zeros(2, 3, 8, 8))[0].shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, layer: Convolution) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))
        # Padding that the kernel cannot express (a mode, or an uneven "same") is done before it, on
        # the input.
        self.outer_padding, self.padding = _split_padding(layer)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The convolution, and the padded input where padding happens outside the kernel."""
        padded = self._padded(inputs)
        layer = self.layer
        output = torch.convolution(
            padded,
            layer.weight,
            layer.bias,
            layer.stride,
            self.padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            layer.groups,
        )
        return output, (() if padded is inputs else (padded,))

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The kernel's input gradient, carried through the outer padding where there is one."""
        padded = saved[0] if saved else inputs
        gradient = self._backward(
            output_gradient, padded, self.layer.weight, self.layer.groups, of_input=True
        )
        if not saved:
            return gradient
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            (through,) = torch.autograd.grad(self._padded(leaf), leaf, gradient)
        return through

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """Weight gradients by one grouped convolution, bias gradients by a sum over positions."""
        padded = saved[0] if saved else inputs
        layer, parts = self.layer, list[tuple[nn.Parameter, PerExampleGradients]]()
        if layer.weight.requires_grad:
            weight = cast(nn.Parameter, layer.weight)
            gradients = self.grouped_weight_gradients(padded, output_gradient)
            parts.append((weight, Instantiated(gradients)))
        if layer.bias is not None and layer.bias.requires_grad:
            bias = cast(nn.Parameter, layer.bias)
            parts.append((bias, Instantiated(output_gradient.flatten(2).sum(2))))
        return parts

    def grouped_weight_gradients(
        self, inputs: torch.Tensor, output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """Per-example weight gradients [n, *weight.shape], one grouped convolution's gradient.

        Source: the group trick of Rochette, Manoel and Tramel 2019, arXiv 1912.06015.
        """
        layer, examples = self.layer, inputs.shape[0]
        shape = layer.weight.shape
        stacked = layer.weight.detach().new_empty((1,)).expand(examples * shape[0], *shape[1:])
        gradient = self._backward(
            output_gradient.reshape(1, -1, *output_gradient.shape[2:]),
            inputs.reshape(1, -1, *inputs.shape[2:]),
            stacked,
            layer.groups * examples,
            of_input=False,
        )
        return gradient.view(examples, *shape)

    def _backward(
        self,
        output_gradient: torch.Tensor,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        groups: int,
        *,
        of_input: bool,
    ) -> torch.Tensor:
        """One of the native kernel's two gradients, in the dtype of the output gradient."""
        layer, dtype = self.layer, output_gradient.dtype
        gradients = torch.ops.aten.convolution_backward(
            output_gradient,
            inputs.to(dtype),
            weight.to(dtype),
            None,
            layer.stride,
            self.padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            groups,
            (of_input, not of_input, False),
        )
        gradient: torch.Tensor = gradients[0] if of_input else gradients[1]
        return gradient

    def _padded(self, inputs: torch.Tensor) -> torch.Tensor:
        """The input as the kernel sees it."""
        if not any(self.outer_padding):
            return inputs
        mode = self.layer.padding_mode
        return F.pad(inputs, self.outer_padding, "constant" if mode == "zeros" else mode)


def _split_padding(layer: Convolution) -> tuple[list[int], tuple[int, ...]]:
    """Padding to do on the input (as `F.pad` takes it) and padding left to the kernel."""
    dimensions = len(layer.kernel_size)
    nothing = [0] * (2 * dimensions)
    if layer.transposed:
        return nothing, tuple(int(p) for p in layer.padding)
    sides = list(layer._reversed_padding_repeated_twice)
    uneven = any(sides[i] != sides[i + 1] for i in range(0, len(sides), 2))
    if layer.padding_mode != "zeros" or uneven:
        return sides, (0,) * dimensions
    return nothing, tuple(sides[::-1][::2])
