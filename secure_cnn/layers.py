"""Layers of which the networks of `secure_cnn.models` are made; none mixes examples."""

import math
from collections import OrderedDict
from itertools import pairwise
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from secure_cnn.errors import ModelError

__all__ = ["Bands", "Normalize", "Residual", "Stack", "convolution", "group_norm"]


@final
class Normalize(nn.Module):
    """[0, 1] to [-2, 2], or as it is; also the gate that refuses images of another form."""

    def __init__(self, shape: tuple[int, int, int], mean: float = 0.5, std: float = 0.25) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """`images`, scaled, if they are what the model is for."""
        if images.ndim != 4 or images.shape[1:] != self.shape or not images.is_floating_point():
            raise ModelError(
                f"input: expected float images [n, {', '.join(map(str, self.shape))}] in [0, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"mean={self.mean}, std={self.std}"


@final
class Bands(nn.Module):
    """Pixels in bands of brightness: a channel of each band, from -1 below it to 1 above.

    What is darker than the lowest edge or brighter than the highest is cut off. A cut has no
    gradient, so that an attack which follows it stands still, and the model looks more robust than
    it is (Athalye et al. 2018, arXiv:1802.00420). Here the gradient passes wherever a change of
    `reach` brings a pixel into the band, as if nothing were cut; what is outside of all bands
    belongs to the nearest.

    Guarantee: forward is the plain cut, to the last bit: only the way back is another.

    Args:
        edges: Of the bands, rising, for pixels in [0, 1].
        reach: How far from a band its gradient passes.

    Example:
        >>> Bands((0.0, 0.5, 1.0), reach=0.1)(torch.tensor([[[[0.25]]]])).flatten()
        tensor([ 0., -1.])
    """

    def __init__(self, edges: tuple[float, ...], *, reach: float) -> None:
        super().__init__()
        self.edges, self.reach = edges, reach

    def forward(self, images: Tensor) -> Tensor:
        """`[n, c, height, width]` to so many channels for each band."""
        return torch.cat([self._band(images, *band) for band in pairwise(self.edges)], dim=1)

    def _band(self, images: Tensor, low: float, high: float) -> Tensor:
        first, last = low == self.edges[0], high == self.edges[-1]
        least = -math.inf if first else low - self.reach
        most = math.inf if last else high + self.reach
        near = images.clamp(least, most)
        # The difference is 0, and carries the gradient.
        cut = images.clamp(low, high).detach() + (near - near.detach())
        return (cut - low) * (2 / (high - low)) - 1

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"edges={self.edges}, reach={self.reach}"


@final
class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al., 2015, arXiv:1512.03385, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, stride)
        self.norm1 = group_norm(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = convolution(outputs, outputs)
        self.norm2 = group_norm(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, group_norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Its input and what two convolutions add to it."""
        out = self.relu1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out)) + self.shortcut(x)
        return self.relu2(out)  # type: ignore[no-any-return]  # nn.Module's call is untyped


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3, of the same size up to its stride; the norm behind it has the bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 4 channels, at most 16 groups."""
    return nn.GroupNorm(min(16, channels // 4), channels)


@final
class Stack:
    """Collects named layers and keeps track of how large the image still is."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        self.layers = OrderedDict[str, nn.Module](normalize=Normalize(shape))
        self.channels, self.side, self.classes = shape[0], shape[1:], classes

    def conv(self, channels: int, *, stride: int = 1, pooled: bool = False) -> None:
        """Convolution, perhaps a pool (from 4x4 on), norm and ReLU, which then have less to do."""
        number = 1 + sum(name.startswith("conv") for name in self.layers)
        self.layers[f"conv{number}"] = convolution(self.channels, channels, stride)
        self.side = (-(-self.side[0] // stride), -(-self.side[1] // stride))
        if pooled and min(self.side) >= 4:
            self.layers[f"pool{number}"] = nn.MaxPool2d(2)
            self.side = (self.side[0] // 2, self.side[1] // 2)
        self.layers[f"norm{number}"] = group_norm(channels)
        self.layers[f"relu{number}"] = nn.ReLU(inplace=True)
        self.channels = channels

    def stage(self, name: str, channels: int, blocks: int, stride: int) -> None:
        """Residual blocks, the first of which changes the size."""
        members = [
            Residual(channels if block else self.channels, channels, 1 if block else stride)
            for block in range(blocks)
        ]
        self.layers[name] = nn.Sequential(*members)
        self.channels = channels

    def finish(self, most: int, *hidden: int) -> nn.Sequential:
        """Average down to at most `most` x `most`, then the fully connected layers."""
        size = (min(most, self.side[0]), min(most, self.side[1]))
        if size != self.side:
            self.layers["average"] = nn.AdaptiveAvgPool2d(size)
        self.layers["flatten"] = nn.Flatten()
        features = self.channels * prod(size)
        for number, width in enumerate(hidden, 1):
            self.layers[f"hidden{number}"] = nn.Linear(features, width)
            self.layers[f"hidden_relu{number}"] = nn.ReLU(inplace=True)
            features = width
        self.layers["head"] = nn.Linear(features, self.classes)
        return nn.Sequential(self.layers)
