"""Answers from several views of each image: a little more accuracy for a little more time.

Nothing is trained, and no other image is looked at.
"""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from secure_cnn.errors import ModelError

__all__ = ["Views"]


@final
class Views(nn.Module):
    """A model that answers with the mean of its logits over views of each image.

    The views are the image and, if asked for, its mirror image; with `shift`, half of the weight is
    that of the same ones moved by so many pixels to the upper left and to the lower right, what
    comes in being 0 (airbench, Jordan 2024). For images whose mirror image is of the same class.

    Args:
        model: Takes float images `[n, channels, height, width]`, gives logits `[n, classes]`.
        mirror: Whether mirror images are views.
        shift: At least 0, and less than the side of an image.

    Raises:
        ModelError: `shift` is out of range.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = torch.rand(3, 1, 8, 8)
        >>> views = Views(model, mirror=True)
        >>> torch.allclose(views(images), views(images.flip(-1)))
        True
    """

    def __init__(self, model: nn.Module, *, mirror: bool, shift: int = 0) -> None:
        super().__init__()
        if shift < 0:
            raise ModelError(f"shift: expected at least 0 pixels, got {shift}")
        self.model, self._mirror, self._shift = model, mirror, shift

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float `[n, classes]`."""
        whole = self._answers(images)
        if not self._shift:
            return whole
        by = self._shift
        if by >= min(images.shape[-2:]):
            raise ModelError(f"shift: expected less than the side of an image, got {by}")
        wide = F.pad(images, (by, by, by, by))
        height, width = images.shape[-2:]
        upper = self._answers(wide[..., 2 * by : 2 * by + height, 2 * by : 2 * by + width])
        lower = self._answers(wide[..., :height, :width])
        return 0.5 * whole + 0.25 * (upper + lower)

    def _answers(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if not self._mirror:
            return logits
        mirrored: Tensor = self.model(images.flip(-1))
        return 0.5 * (logits + mirrored)
