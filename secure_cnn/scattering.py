"""The scattering transform of images: features that nobody's data has shaped.

Two layers of wavelets with their moduli, averaged over 4x4 pixels (Bruna and Mallat, 2013,
arXiv:1203.1513). Every filter follows from a formula, so the features cost no privacy, and a linear
layer behind them is all that a private step has to learn (Tramèr and Boneh, 2021, arXiv:2011.11660,
which took J = 2 scales, L = 8 angles and the group normalisation that `scattering_layers` has).
"""

from functools import lru_cache
from itertools import product
from math import cos, pi, sin, sqrt
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PATHS", "Scattering", "UnitNorm", "scattering_features", "scattering_layers"]

_STEP = 4  # 2 to the power of J: the pixels, each way, that one output stands for
_ANGLES = 8
PATHS = 1 + 2 * _ANGLES + _ANGLES**2  # the mean; both scales; the coarse ones of the fine ones
_GROUPS = 27
_WIDTH = 0.8  # of the envelope at the finest scale, in pixels, as a standard deviation
_FREQUENCY = 0.75 * pi
_SLANT = 4 / _ANGLES
_ROUNDING = 1e-6


def scattering_layers(channels: int, height: int, width: int) -> dict[str, nn.Module]:
    """Layers without a parameter, from images to features of norm 1.

    Args:
        channels: Of the images.
        height: Of the images, in pixels, at least 8.
        width: Of the images, in pixels, at least 8.

    Returns:
        In order, by name: `Scattering`; groups of three maps brought to mean 0 and variance 1
        within each image; one row of `scattering_features` an image; rows of norm 1.

    Example:
        >>> rows = nn.Sequential(*scattering_layers(1, 28, 28).values())(torch.rand(2, 1, 28, 28))
        >>> rows.shape, rows.norm(dim=1).allclose(torch.ones(2))
        (torch.Size([2, 3969]), True)
    """
    norm = nn.GroupNorm(_GROUPS * channels, PATHS * channels, affine=False)
    scattering = Scattering(height, width)
    return {"scattering": scattering, "norm": norm, "flatten": nn.Flatten(), "unit": UnitNorm()}


def scattering_features(channels: int, height: int, width: int) -> int:
    """How many features `scattering_layers` gives for an image of this shape."""
    return PATHS * channels * -(-height // _STEP) * -(-width // _STEP)


@final
class UnitNorm(nn.Module):
    """Rows of Euclidean norm 1, `[n, features]`; a row of zeros stays one.

    A linear layer behind it has gradients of norm at most the square root of 2 for each example
    under cross-entropy, or of 2 with its bias.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """`rows`, each divided by its norm."""
        return F.normalize(rows)


@final
class Scattering(nn.Module):
    """Images `[n, c, height, width]` to `[n, 81 c, ceil(height / 4), ceil(width / 4)]`, float.

    Guarantee: for each channel there is the image averaged by a Gaussian; the averaged moduli of
    its products with 8 Morlet wavelets at each of 2 scales; and those of the fine moduli with the 8
    coarse wavelets, in this order. The frame bound of the filters is at most 1. Images are mirrored
    at their borders. The same images give the same features whatever else is in the batch. There is
    no parameter, and a state dict holds nothing of it.

    Args:
        height: Of the images, at least 8.
        width: Of the images, at least 8.

    Example:
        >>> Scattering(28, 28)(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 81, 7, 7])
    """

    low: Tensor
    waves: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)
        # A whole number of steps, one of them of margin before the image and at least one behind.
        rows, columns = (_STEP * (-(-side // _STEP) + 2) for side in self.size)
        self.margins = (_STEP, columns - width - _STEP, _STEP, rows - height - _STEP)
        # By scale and angle, at each frequency; all are real there.
        self.register_buffer("low", torch.empty(rows, columns), persistent=False)
        self.register_buffer("waves", torch.empty(2, _ANGLES, rows, columns), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Write the filters by their formulas, in place; after `to_empty` they hold anything."""
        low, waves = _filters((self.low.shape[0], self.low.shape[1]))
        self.low.copy_(low)
        self.waves.copy_(waves.view(self.waves.shape))

    def lipschitz_constant(self) -> float:
        """How much faster than the images their features move in l2, at most.

        Guarantee: an upper bound for all images of its size, computed in float64 from the filters
        that this has and rounded upwards. About a half above what small changes were seen to do.

        Example:
            >>> 0.25 < Scattering(8, 8).lipschitz_constant() < 1
            True
        """
        return _lipschitz_constant(self)

    def forward(self, images: Tensor) -> Tensor:
        """The features of `images`, which have the size that this was made for."""
        fine, coarse = self.waves
        image = torch.fft.fft2(F.pad(images, self.margins, mode="reflect")).unsqueeze(2)
        moduli = _modulus(image * fine, 1)
        maps = [image, moduli, _modulus(image * coarse, 2)]
        # An angle at a time: all at once need eight times the memory.
        maps += [_modulus(moduli[:, :, [angle]] * coarse, 2) for angle in range(_ANGLES)]
        return torch.cat([self._average(each) for each in maps], 2).flatten(1, 2)

    def _average(self, spectrum: Tensor) -> Tensor:
        """What has this spectrum, averaged, at one of `_STEP` pixels each way, without margins."""
        done = self.low.shape[-1] // spectrum.shape[-1]
        averaged = _sampled(spectrum * _alias(self.low, done), _STEP // done).real
        rows, columns = (-(-side // _STEP) for side in self.size)
        return averaged[..., 1 : 1 + rows, 1 : 1 + columns]

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"{self.size[0]}x{self.size[1]}, scales=2, angles={_ANGLES}"


def _modulus(spectrum: Tensor, step: int) -> Tensor:
    """The spectrum of the absolute values of what has this one, at one of `step` pixels."""
    moduli: Tensor = torch.fft.fft2(_sampled(spectrum, step).abs())
    return moduli


def _sampled(spectrum: Tensor, step: int) -> Tensor:
    """The values of what has this spectrum, at one of `step` pixels each way."""
    values: Tensor = torch.fft.ifft2(_alias(spectrum, step) / step**2)
    return values


def _alias(spectrum: Tensor, step: int) -> Tensor:
    """The sum of the `step` times `step` blocks of frequencies that sampling takes for one."""
    *others, rows, columns = spectrum.shape
    blocks = spectrum.reshape(*others, step, rows // step, step, columns // step)
    return blocks.sum((-4, -2))


def _lipschitz_constant(scattering: Scattering) -> float:
    """The norm of a linear map whose outputs are, at each image, as long as features can move.

    A modulus moves no faster than what it is of, so that its energy may be taken for what follows.
    What follows a modulus keeps frequencies apart, but for those that sampling takes for one: its
    energy is a quadratic form of a small matrix for each such group.
    """
    low, (fine, coarse) = scattering.low.double(), scattering.waves.double()
    # Coarse moduli are at one of two pixels, and are averaged to one of two of those.
    after_coarse = float(_alias(_alias(low, 2).square(), 2).max()) / 4
    # Moduli are real, and see a filter as they see its mirror image.
    both = torch.cat([coarse, _mirrored(coarse)]) / sqrt(2)
    after_fine = _largest(_energy(low[None], 4) + after_coarse * _energy(both, 2))
    energy = _energy(low[None], 4) + after_coarse * _energy(coarse, 2)
    energy += after_fine * torch.diag_embed(_groups(fine.square().sum(0)))
    pixels = torch.eye(scattering.size[0] * scattering.size[1], dtype=torch.float64)
    padded = F.pad(pixels.view(-1, 1, *scattering.size), scattering.margins, mode="reflect")
    spectra = _groups(torch.fft.fft2(padded[:, 0], norm="ortho"))
    total = torch.zeros_like(pixels)
    for group, form in enumerate(energy):
        values = spectra[:, group]
        total += ((values @ form.to(values.dtype)) @ values.mH).real
    return sqrt(float(torch.linalg.eigvalsh(total)[-1])) * (1 + _ROUNDING)


def _groups(spectrum: Tensor) -> Tensor:
    """Frequencies `[..., rows, columns]` by those that end as one, `[..., groups, 16]`."""
    *others, rows, columns = spectrum.shape
    blocks = spectrum.reshape(*others, _STEP, rows // _STEP, _STEP, columns // _STEP)
    return blocks.movedim(-4, -2).flatten(-4, -3).flatten(-2)


def _energy(filters: Tensor, step: int) -> Tensor:
    """Of each group the form `[16, 16]`: the energy of all filtered and sampled, one of `step`."""
    # Which frequencies sampling takes for one: those at the same place modulo the sampled size.
    rows, columns = (side // step for side in filters.shape[-2:])
    down, right = torch.arange(filters.shape[-2]), torch.arange(filters.shape[-1])
    names = _groups((down % rows)[:, None] * columns + right % columns)
    one = names[:, :, None] == names[:, None, :]
    values = _groups(filters)
    return torch.einsum("fgi,fgj->gij", values, values) * one / step**2


def _largest(energy: Tensor) -> float:
    """Of all groups, what a change of energy 1 can come to."""
    return float(torch.linalg.eigvalsh(energy)[:, -1].max())


def _mirrored(filters: Tensor) -> Tensor:
    """Each at the opposite frequencies."""
    return filters.flip(-2, -1).roll((1, 1), (-2, -1))


@lru_cache(maxsize=2)
def _filters(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """At each frequency that which averages, and the wavelets; remembered, since they take long."""
    waves = [_morlet(shape, scale, angle) for scale, angle in product(range(2), range(_ANGLES))]
    return torch.from_numpy(_lowpass(shape)), torch.from_numpy(np.stack(waves))


def _envelope(
    shape: tuple[int, int], width: float, angle: float, slant: float, frequency: float
) -> npt.NDArray[np.complex128]:
    """A Gaussian times a plane wave on a torus, around pixel 0, 0.

    It is `width` wide along the wave, `1 / slant` times as wide across.
    """
    total = np.zeros(shape, np.complex128)
    for down, right in product((-2, -1, 0, 1), repeat=2):  # further off it is below 1e-20
        y, x = np.ogrid[: shape[0], : shape[1]]
        y, x = y + down * shape[0], x + right * shape[1]
        along, across = y * cos(angle) + x * sin(angle), x * cos(angle) - y * sin(angle)
        decay = np.exp(-(along**2 + (slant * across) ** 2) / (2 * width**2))
        total += decay * np.exp(1j * frequency * along)
    return total


def _lowpass(shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """At each frequency the Gaussian that averages; constants keep their value."""
    low = _envelope(shape, 2 * _WIDTH, 0, 1, 0)
    return np.fft.fft2(low / low.sum()).real


def _morlet(shape: tuple[int, int], scale: int, angle: int) -> npt.NDArray[np.float64]:
    """At each frequency the wavelet of this scale and angle, of mean 0."""
    width, turned = _WIDTH * 2**scale, (_ANGLES // 2 - 1 - angle) * pi / _ANGLES
    wave = _envelope(shape, width, turned, _SLANT, _FREQUENCY / 2**scale)
    gauss = _envelope(shape, width, turned, _SLANT, 0)
    mean_free = wave - wave.sum() / gauss.sum() * gauss
    return np.fft.fft2(mean_free * _SLANT / (2 * pi * width**2)).real
