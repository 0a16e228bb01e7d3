"""PReLU, the activation with a parameter."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from privacy.clipping.gradients import Instantiated, PerExampleGradients

__all__ = ["PReLURule"]


class PReLURule:
    """The rule of one PReLU layer, with one slope or one a channel (He et al. 2015).

    Source: arXiv 1502.01852.
    """

    def __init__(self, layer: nn.PReLU) -> None:
        self.layer = layer
        self.parameters = tuple(layer.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The layer itself."""
        return F.prelu(inputs, self.layer.weight), ()

    def input_gradient(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> torch.Tensor:
        """The output gradient, times the slope where the input is not positive."""
        slope: torch.Tensor = self.layer.weight
        if slope.numel() > 1:
            slope = slope.view(-1, *[1] * (inputs.dim() - 2))
        sloped = output_gradient * slope
        return torch.where(inputs > 0, output_gradient, sloped).to(inputs.dtype)

    def per_example_gradients(
        self, inputs: torch.Tensor, saved: Sequence[torch.Tensor], output_gradient: torch.Tensor
    ) -> list[tuple[nn.Parameter, PerExampleGradients]]:
        """What passed the slope, added over everything that shares it."""
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        product = output_gradient.to(dtype) * inputs.clamp(max=0)
        kept = 2 if self.layer.num_parameters > 1 else 1
        shared = product.reshape(*product.shape[:kept], -1).sum(-1)
        return [(self.layer.weight, Instantiated([shared.view(len(inputs), -1)]))]
