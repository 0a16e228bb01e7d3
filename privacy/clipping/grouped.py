"""Per-example weight gradients from one grouped convolution, each example a group of its own.

Source: Rochette, Manoel and Tramel 2019, arXiv 1912.06015. It serves every convolution. What costs
is the layout: the channels of all groups must lie side by side.
"""

from collections.abc import Callable

import torch

__all__ = ["WeightGradient", "grouped_gradients"]

WeightGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The native weight gradient of output gradient, input, a weight (its shape counts) and groups."""


def grouped_gradients(
    weight_gradient: WeightGradient,
    weight: torch.Tensor,
    groups: int,
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
) -> torch.Tensor:
    """All examples at once, in the default layout.

    Args:
        inputs: Its input, [n, channels, *positions].
        output_gradient: The gradient at its output, [n, outputs, *positions].

    Returns:
        A tensor [n, *weight.shape].
    """
    examples, shape = len(inputs), weight.shape
    stacked = weight.detach().new_empty((1,)).expand(examples * shape[0], *shape[1:])
    gradient = weight_gradient(
        output_gradient.reshape(1, -1, *output_gradient.shape[2:]),
        inputs.reshape(1, -1, *inputs.shape[2:]),
        stacked,
        groups * examples,
    )
    return gradient.view(examples, *shape)
