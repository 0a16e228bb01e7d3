"""Training on noisy images as an objective: `(model, images, labels) -> losses[n]`.

A smoothed classifier is as good as the model is under noise, so the model must have seen noise.
Each image is trained on with fresh noise of its own; nothing is shared between examples, so a
private update may clip each loss. Deliberately not here: what is certified (`certification`).
"""

from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.inputs import Setting, check_batch, check_classes
from defenses.errors import AttackError
from defenses.quantities import LARGEST_SIGMA, as_real, shown
from defenses.scope import check_module
from defenses.training.objective import SeededObjective

__all__ = ["GaussianAugmentation"]


@final
class GaussianAugmentation(SeededObjective):
    """Cross-entropy on images with Gaussian noise, one loss per example.

    The noise is not clipped to the images' range, as it is not when a smoothed classifier is
    certified (Cohen et al. 2019, arXiv 1902.02918). It comes from a generator of its own, seeded
    once; the global random states and a private update's noise never move.

    Args:
        sigma: Standard deviation, in the units of the pixels, in (0, 10]; best the one of the
            certificate.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: In [0, 1).

    Attributes:
        per_example: True: each loss depends on its own example only.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> objective = GaussianAugmentation(sigma=0.25)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> losses = objective(model, images, labels)
        >>> losses.shape, losses.requires_grad
        (torch.Size([5]), True)
    """

    _called = "a GaussianAugmentation objective"

    def __init__(self, *, sigma: float, seed: int = 0, label_smoothing: float = 0.0) -> None:
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self._sigma = as_real(sigma)
        if not 0 < self._sigma <= LARGEST_SIGMA:
            raise AttackError(
                f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {shown(sigma)}"
            )

    def _own_settings(self) -> dict[str, Setting]:
        return {"method": "gaussian", "sigma": self._sigma}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adds noise to the images, then takes the losses of the noisy ones, [n].

        Images are floating point, [n, channels, height, width], in any range; n may be 0.
        """
        check_module(model)
        check_batch(images, labels)
        noise = torch.randn(images.shape, generator=self._generator)
        noisy = images + self._sigma * noise.to(device=images.device, dtype=images.dtype)
        return self._cross_entropy(check_classes(model(noisy), labels), labels)
