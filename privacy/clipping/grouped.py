"""Per-example weight gradients from one grouped convolution, each example a group of its own.

Source: Rochette, Manoel and Tramel 2019, arXiv 1912.06015. The native kernel then does the work at
its own speed. What costs is the layout: the channels of all groups must lie side by side. In the
channels-last layout that is written down a few examples at a time, in the processor's cache.
"""

from collections.abc import Callable

import torch

from privacy.clipping.patches import CACHE, block_length

__all__ = ["WeightGradient", "grouped_gradients", "interleaved_gradients"]

WeightGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The native weight gradient of output gradient, input, a weight (its shape counts) and groups."""

_MOST = 64
"""Examples side by side at most: their rows must not lie too far apart."""


def grouped_gradients(
    weight_gradient: WeightGradient,
    weight: torch.Tensor,
    groups: int,
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
) -> torch.Tensor:
    """All examples at once, in the default layout.

    Args:
        weight_gradient: Of the convolution.
        weight: Its weight.
        groups: Its groups.
        inputs: Its input, [n, channels, *positions].
        output_gradient: The gradient at its output, [n, outputs, *positions].

    Returns:
        A tensor [n, *weight.shape].

    Example:
        >>> def weight_gradient(dy, x, weight, groups):
        ...     return torch.nn.grad.conv1d_weight(x, weight.shape, dy, groups=groups)
        >>> weight, x, dy = torch.ones(4, 3, 1), torch.ones(2, 3, 5), torch.ones(2, 4, 5)
        >>> grouped_gradients(weight_gradient, weight, 1, x, dy).shape
        torch.Size([2, 4, 3, 1])
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


def interleaved_gradients(
    weight_gradient: WeightGradient,
    weight: torch.Tensor,
    groups: int,
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """A few examples at a time, in the channels-last layout of two-dimensional convolutions.

    Args:
        weight_gradient: Of the convolution.
        weight: Its weight, [outputs, inputs, height, width].
        groups: Its groups.
        inputs: Its input, [n, channels, height, width].
        output_gradient: The gradient at its output, [n, outputs, *positions].
        kept: Where the gradients go, [n, outputs, height, width, inputs], or nowhere.

    Returns:
        Their squared norms, float64 [n].

    Example:
        >>> def weight_gradient(dy, x, weight, groups):
        ...     return torch.nn.grad.conv2d_weight(x, weight.shape, dy, groups=groups)
        >>> weight, x, dy = torch.ones(4, 3, 1, 1), torch.ones(2, 3, 5, 5), torch.ones(2, 4, 5, 5)
        >>> interleaved_gradients(weight_gradient, weight, 1, x, dy, None).round()
        tensor([7500., 7500.], dtype=torch.float64)
    """
    shape, total = weight.shape, weight.numel()
    one = (inputs[0].numel() + output_gradient[0].numel()) * inputs.element_size()
    size = min(len(inputs), _MOST, max(4, CACHE // one))
    rooms = [t.new_empty(*t.shape[2:], size, t.shape[1]) for t in (inputs, output_gradient)]
    stacked = inputs.new_empty(size * shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    block = block_length(total)
    norms = inputs.new_empty(len(inputs), total // block)
    for start in range(0, len(inputs), size):
        part = slice(start, start + size)
        x, dy = inputs[part], output_gradient[part]
        count = len(x)
        sides = [_side_by_side(t, room) for t, room in zip((x, dy), rooms, strict=True)]
        gradient = weight_gradient(sides[1], sides[0], stacked[: count * shape[0]], groups * count)
        rows = gradient.permute(0, 2, 3, 1).reshape(count, -1)
        if kept is not None:
            kept[part].view(count, -1).copy_(rows)
        torch.linalg.vector_norm(rows.view(count, -1, block), dim=2, out=norms[part])
    # Squares too small for the dtype vanish: each is counted as the largest that can.
    return norms.double().square().sum(1) + total * torch.finfo(inputs.dtype).tiny


def _side_by_side(images: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Images [m, c, h, w] as one, [1, m * c, h, w], with the channels last in memory."""
    if len(images) < room.shape[-2]:
        room = images.new_empty(*room.shape[:-2], *images.shape[:2])
    room.copy_(images.permute(2, 3, 0, 1))
    # The first stride must be the image's size: the float64 kernel reads by it, even of one image.
    return room.flatten(2)[None].permute(0, 3, 1, 2)
