"""What a client shares of a batch of images: a gradient, as it is or as a private step makes it.

Noise here is drawn from a seed: this is for experiments on images that their caller has, and
nothing of it is a release that a privacy budget would cover. `privacy` makes those.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from privacy.leakage import shared_gradient
from secure_cnn.errors import RunError
from secure_cnn.leakage import arguments

__all__ = ["Gradient", "Protection", "Sharing"]

Gradient = dict[str, Tensor]
Protection = Literal["plain", "clipped", "noised"]


@final
@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a client shares of a batch: its mean gradient, or what a private step makes of it.

    Attributes:
        max_grad_norm: Each example's gradient is shortened to it first; None clips nothing.
        noise_multiplier: Times `max_grad_norm` over the images of the batch: the deviation of the
            Gaussian noise on each value of the mean; 0 adds none.

    Raises:
        RunError: A number is out of range, or there is noise without clipping.

    Example:
        >>> Sharing().protection, Sharing(max_grad_norm=1.0).protection
        ('plain', 'clipped')
    """

    max_grad_norm: float | None = None
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        norm, noise = self.max_grad_norm, self.noise_multiplier
        if norm is not None:
            wanted = "a finite number > 0"
            arguments.number("max_grad_norm", norm, wanted, lambda x: 0 < x < math.inf)
        wanted = "a finite number >= 0"
        arguments.number("noise_multiplier", noise, wanted, lambda x: 0 <= x < math.inf)
        if self.noise_multiplier and norm is None:
            raise RunError("noise_multiplier: expected max_grad_norm with it, which is its unit")

    @property
    def protection(self) -> Protection:
        """Its word in a record."""
        if self.max_grad_norm is None:
            return "plain"
        return "noised" if self.noise_multiplier else "clipped"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, random: torch.Generator
    ) -> Gradient:
        """The gradient of a batch as it is shared, by parameter."""
        if self.max_grad_norm is None:
            return shared_gradient(model, images, labels)
        total: Gradient = {}
        for image, label in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
            own = shared_gradient(model, image, label)
            length = math.sqrt(sum(float(each.double().square().sum()) for each in own.values()))
            factor = min(1.0, self.max_grad_norm / max(length, 1e-30)) / len(images)
            for name, each in own.items():
                total[name] = total.get(name, torch.zeros_like(each)) + factor * each
        deviation = self.noise_multiplier * self.max_grad_norm / len(images)
        return {
            name: each + deviation * torch.randn(each.shape, generator=random)
            for name, each in total.items()
        }
