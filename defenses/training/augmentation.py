"""Training on noisy images as an objective: `(model, images, labels) -> losses[n]`.

A smoothed classifier is as good as the model is under noise, so the model must have seen noise.
Each image is trained on with fresh noise of its own; nothing is shared between examples, so a
private update may clip each loss. Deliberately not here: what is certified (`certification`).
"""

from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.inputs import Setting, check_batch, check_classes
from defenses.errors import AttackError
from defenses.quantities import LARGEST_SIGMA, as_real, shown
from defenses.scope import check_module
from defenses.training.objective import checked_smoothing, generator_from, generator_in

__all__ = ["GaussianAugmentation"]


@final
class GaussianAugmentation:
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

    per_example: ClassVar[bool] = True

    def __init__(self, *, sigma: float, seed: int = 0, label_smoothing: float = 0.0) -> None:
        self._sigma, self._label_smoothing = as_real(sigma), checked_smoothing(label_smoothing)
        if not 0 < self._sigma <= LARGEST_SIGMA:
            raise AttackError(
                f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {shown(sigma)}"
            )
        self._generator = generator_from(seed)

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""
        return {
            "method": "gaussian",
            "sigma": self._sigma,
            "label_smoothing": self._label_smoothing,
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adds noise to the images, then takes the losses of the noisy ones, [n].

        Images are floating point, [n, channels, height, width], in any range; n may be 0.
        """
        check_module(model)
        check_batch(images, labels)
        noise = torch.randn(images.shape, generator=self._generator)
        noisy = images + self._sigma * noise.to(device=images.device, dtype=images.dtype)
        logits = check_classes(model(noisy), labels)
        return F.cross_entropy(
            logits,
            labels.to(logits.device),
            reduction="none",
            label_smoothing=self._label_smoothing,
        )

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, so that a resumed run draws what this one would have."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict` of an objective with the same settings.

        Raises:
            AttackError: The state is not one; this objective is left as it was.
        """
        self._generator.set_state(generator_in(state, "a GaussianAugmentation objective"))
