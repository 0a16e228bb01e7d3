"""Where a training may begin besides random weights: identity filters, and whitened patches.

Identity filters know nothing of any image. Whitening filters are a function of the images that they
are made of: in a private training those must be public ones, or epsilon would not cover them.
"""

import torch
from torch import Tensor, nn

from secure_cnn.errors import ModelError

__all__ = ["start_as_identity", "whiten_first_layer"]

_PATCHES = 200_000
"""So many patches settle a covariance of a few dozen values to a part in a hundred."""
_FLOOR = 1e-2
"""Added to each variance: directions in which patches hardly vary are not blown up."""


@torch.no_grad()
def start_as_identity(model: nn.Module) -> int:
    """Lets every later convolution begin by passing its inputs on (airbench, Jordan 2024).

    Of each convolution but the first, filter `i` passes channel `i` on, for as many as there are
    channels on both sides; the remaining filters stay as they were drawn. Filters over groups of
    channels, and of an even side, which have no middle, are left alone.

    Returns:
        How many convolutions were changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3, padding=1, bias=False))
        >>> start_as_identity(model)
        1
        >>> images = torch.rand(1, 2, 5, 5)
        >>> bool((model[1](images)[:, :2] == images).all())
        True
    """
    changed = 0
    for layer in _convolutions(model)[1:]:
        if layer.groups != 1 or any(side % 2 == 0 for side in layer.kernel_size):
            continue
        weight = layer.weight
        both = min(weight.shape[:2])
        weight[:both] = 0
        row, column = (side // 2 for side in layer.kernel_size)
        weight[torch.arange(both), torch.arange(both), row, column] = 1
        changed += 1
    return changed


@torch.no_grad()
def whiten_first_layer(model: nn.Module, images: Tensor, generator: torch.Generator) -> int:
    """Makes the first convolution's filters whiten the patches of `images`, and freezes them.

    Each filter is an eigenvector of the patches' second moments, the largest first, divided by the
    root of its variance, and stands there once with each sign; filters beyond those stay as they
    were drawn and are frozen too. What stands before the layer (a normalisation) is applied to the
    images first. Where that makes other channels of them, as the fixed filters of the model `quick`
    do, nothing is left to whiten, and nothing is changed. Source: airbench (Jordan 2024).

    Args:
        model: Its convolutions in the order in which they are used.
        images: Float `[n, channels, height, width]` in [0, 1], of which patches are taken. Not
            private ones.
        generator: Draws which patches.

    Returns:
        How many filters whiten.

    Raises:
        ModelError: The model has no convolution, or its first one does not see the images.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False))
        >>> whiten_first_layer(model, torch.rand(20, 1, 8, 8), torch.Generator().manual_seed(0))
        8
    """
    layers = _convolutions(model)
    if not layers:
        raise ModelError("model: expected a convolution to whiten the images with, got none")
    layer, weight = layers[0], layers[0].weight
    seen = _seen_by(model, layer, images)
    if seen.shape[1] != images.shape[1]:
        return 0
    patches = nn.functional.unfold(seen, layer.kernel_size).transpose(1, 2).flatten(0, 1)
    if patches.shape[1] != weight[0].numel():
        raise ModelError("model: expected a first convolution over all channels of the images")
    drawn = torch.randperm(len(patches), generator=generator)[:_PATCHES]
    patches = patches[drawn].double()
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances.clamp_min(0) + _FLOOR).sqrt()).T.flip(0)
    count = min(len(weight) // 2, len(filters))
    chosen = filters[:count].reshape(count, *weight.shape[1:]).to(weight.dtype)
    weight[: 2 * count] = torch.cat([chosen, -chosen])
    weight.requires_grad_(False)
    return 2 * count


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def _seen_by(model: nn.Module, layer: nn.Conv2d, images: Tensor) -> Tensor:
    """What the layer gets when the model is given the images."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mode = model.training
    try:
        model.eval()(images)
    finally:
        handle.remove()
        model.train(mode)
    if not seen:
        raise ModelError("model: expected its first convolution to be used, and it was not")
    return seen[0]
