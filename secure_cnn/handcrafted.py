"""Features from formulas and chance alone, for a linear layer that is trained privately.

Two kinds stand side by side: wavelets (`secure_cnn.scattering`), and how much each of some hundred
random patches is in each part of the image (Coates and Ng, 2011, whose dictionaries of patches do
as well when they are drawn as when they are learned). Both are whitened, since a linear layer on
features that vary very differently needs many more steps, and in a private training each step costs
noise. Patches and variances are those of images that are noise: they are nobody's, and cost no
privacy.
"""

import math
from functools import lru_cache
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secure_cnn.scattering import PATHS, UnitNorm, scattering_features, scattering_layers

__all__ = ["Handcrafted", "handcrafted_features", "noise_images"]

_LARGEST_SIDE = 64
"""Images whose shorter side is as long are averaged over blocks first, to 32 pixels or more."""
_PATCHES, _SIDE, _PLACES = 400, 5, 4
_CONTRAST = 0.05
"""A deviation within a patch, in [0, 1], below which it counts as flat."""
_THRESHOLD = 0.8
"""Of the likeness to a patch; only what is above it counts."""
_LEAST = 1e-4
"""Added below a root, whose slope at 0 would be infinite."""
_IMAGES, _PART = 512, 16
_FLATTENING = 0.4
"""The power of each variance by which features are divided; 0.5 would give all the same."""
_SHRINKAGE = 0.1
"""Added to each variance, in shares of their mean."""
_NORM = 10.0
"""Of an image's features; the bias of the layer behind them sees a constant of 1 beside it."""


def handcrafted_features(channels: int, height: int, width: int) -> int:
    """How many features `Handcrafted` gives for an image of this shape."""
    block = _block(height, width)
    return scattering_features(channels, height // block, width // block) + _PATCHES * _PLACES**2


def noise_images(
    count: int, channels: int, height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Images of noise, float `[count, channels, height, width]` in [0, 1].

    Their brightness is a random field whose spectrum falls like that of photographs; in every other
    one it is black where another field, higher in the middle, is negative: a thing on black.

    Example:
        >>> noise_images(2, 3, 16, 12, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 12])
    """
    size = (height, width)
    roughness = _between(0.5, 2.0, count, generator)
    colours = _field(count, channels, size, roughness, generator) / 2
    grey = _field(count, 1, size, roughness, generator) + (colours if channels > 1 else 0)
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    middle = 2 - 3 * (y[:, None] ** 2 + x**2)
    outline = _field(count, 1, size, torch.full((count,), 2.0), generator) + middle
    outline[1::2] = 1
    brightness = _between(0.2, 0.9, count, generator).view(-1, 1, 1, 1) + 0.2 * grey
    return (brightness * (outline > 0)).clamp(0, 1)


@final
class Handcrafted(nn.Module):
    """Images `[n, c, height, width]` in [0, 1] to rows `[n, features]` of norm 10, float.

    Guarantee: there is no parameter, and nothing here depends on any image but the one it is given.
    The patches and what whitens are buffers, which a state dict holds: `draw` fills them from a
    generator alone. Until then, or until a state dict is loaded, they hold anything.

    Args:
        channels: Of the images.
        height: Of the images, in pixels, at least 8.
        width: Of the images, in pixels, at least 8.

    Example:
        >>> features = Handcrafted(1, 28, 28)
        >>> features.draw(torch.Generator().manual_seed(0))
        >>> rows = features(torch.rand(2, 1, 28, 28))
        >>> rows.shape, rows.norm(dim=1).allclose(torch.full((2,), 10.0))
        (torch.Size([2, 10369]), True)
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.block = _block(height, width)
        self.shape = (channels, height // self.block, width // self.block)
        layers = scattering_layers(*self.shape)
        values = scattering_features(*self.shape)
        self.waves = nn.Sequential(layers["scattering"], layers["norm"])
        self.wave_whitening = _Whitening(PATHS * channels, values // (PATHS * channels))
        self.patches = _Patches(channels)
        self.patch_whitening = _Whitening(_PATCHES, _PLACES**2)

    def draw(self, generator: torch.Generator) -> None:
        """Draws patches and variances, in place: the same for the same state of the generator."""
        seed = int(torch.randint(1 << 62, (), generator=generator))
        self.load_state_dict(_drawn(self.shape, seed))

    def fit(self, images: Tensor, generator: torch.Generator) -> None:
        """Takes patches and variances from `images`, which must be nobody's."""
        with torch.no_grad():
            self.patches.fit(images, generator)
            self.wave_whitening.fit(_in_parts(self.waves, images))
            self.patch_whitening.fit(_in_parts(self.patches, images))

    def forward(self, images: Tensor) -> Tensor:
        """The features of `images`."""
        small = images if self.block == 1 else F.avg_pool2d(images, self.block)
        waves = self.wave_whitening(self.waves(small))
        patches = self.patch_whitening(_in_parts(self.patches, small))
        rows: Tensor = torch.cat([waves, patches], 1) * (_NORM / math.sqrt(2))
        return rows


@final
class _Patches(nn.Module):
    """How much of each of some patches there is in each part of an image, whatever its contrast."""

    filters: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filters", torch.empty(_PATCHES, channels, _SIDE, _SIDE))

    def fit(self, images: Tensor, generator: torch.Generator) -> None:
        """Draws the patches from images; what patches have in common anyway weighs little."""
        flat = F.unfold(images, _SIDE).transpose(1, 2).flatten(0, 1)
        flat = flat - flat.mean(1, keepdim=True)
        deviation = flat.square().mean(1, keepdim=True).sqrt()
        seen = deviation[:, 0] > _CONTRAST / 2
        flat = (flat / (deviation.square() + _CONTRAST**2).sqrt())[seen]
        whitener = _power(flat.T.double() @ flat.double() / len(flat), -0.5, _CONTRAST).float()
        chosen = flat[torch.randint(len(flat), (_PATCHES,), generator=generator)]
        signs = torch.randint(2, (_PATCHES, 1), generator=generator) * 2 - 1
        filters = F.normalize(chosen @ whitener) * signs @ whitener
        filters = filters - filters.mean(1, keepdim=True)
        self.filters.copy_(filters.view_as(self.filters))

    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images.mean(1, keepdim=True), _SIDE, 1)
        square = F.avg_pool2d(images.square().mean(1, keepdim=True), _SIDE, 1)
        variance = (square - mean.square()).clamp_min(0) + _CONTRAST**2
        likeness = F.conv2d(images, self.filters) * variance.rsqrt()
        amount = F.adaptive_avg_pool2d(F.relu(likeness - _THRESHOLD), _PLACES)
        return (amount + _LEAST).sqrt()


@final
class _Whitening(nn.Module):
    """Maps `[n, maps, h, w]` to rows of norm 1 whose values vary alike, `[n, maps h w]`.

    By two small matrices, one among the maps and one among the places (a Kronecker product): in
    each, what varies much is divided by a power of how much.
    """

    mean: Tensor
    among_maps: Tensor
    among_places: Tensor

    def __init__(self, maps: int, places: int) -> None:
        super().__init__()
        self.unit = UnitNorm()
        self.register_buffer("mean", torch.empty(maps, places))
        self.register_buffer("among_maps", torch.empty(maps, maps))
        self.register_buffer("among_places", torch.empty(places, places))

    def fit(self, maps: Tensor) -> None:
        """Takes mean and variances from the maps of images."""
        rows = self.unit(maps.flatten(1)).view(len(maps), *self.mean.shape).double()
        self.mean.copy_(rows.mean(0))
        rows = rows - rows.mean(0)
        for matrix, among in ((self.among_maps, 1), (self.among_places, 2)):
            values = rows.movedim(among, 0).flatten(1)
            matrix.copy_(_power(values @ values.T / len(rows), -_FLATTENING, _SHRINKAGE))

    def forward(self, maps: Tensor) -> Tensor:
        rows = self.unit(maps.flatten(1)).view(-1, *self.mean.shape) - self.mean
        white: Tensor = self.unit((self.among_maps @ rows @ self.among_places).flatten(1))
        return white


def _in_parts(layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer makes of images, a few at a time: four times faster, since caches hold that."""
    return torch.cat([layer(part) for part in torch.split(images, _PART)])


def _block(height: int, width: int) -> int:
    """The side of the blocks over which images of this size are averaged first."""
    side = min(height, width)
    return side // (_LARGEST_SIDE // 2) if side >= _LARGEST_SIDE else 1


def _power(covariance: Tensor, power: float, shrinkage: float) -> Tensor:
    """A symmetric matrix to a power, with a share of its mean eigenvalue added to each; float64."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + shrinkage * values.mean()
    raised: Tensor = (vectors * values**power) @ vectors.T
    return raised


def _field(
    count: int, channels: int, size: tuple[int, int], roughness: Tensor, generator: torch.Generator
) -> Tensor:
    """Gaussian fields of deviation 1, whose spectrum falls by twice the power of `roughness`."""
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1]))
    frequency[0, 0] = torch.inf  # no mean
    noise = torch.randn(count, channels, *size, generator=generator)
    spectrum = torch.fft.rfft2(noise) * frequency ** -roughness.view(-1, 1, 1, 1)
    field: Tensor = torch.fft.irfft2(spectrum, s=size)
    return field / field.std((-2, -1), keepdim=True)


def _between(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


@lru_cache(maxsize=2)
def _drawn(shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """What a seed fills the buffers with; remembered, since it takes seconds."""
    features, generator = Handcrafted(*shape), torch.Generator().manual_seed(seed)
    features.fit(noise_images(_IMAGES, *shape, generator), generator)
    return features.state_dict()
