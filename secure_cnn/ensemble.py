"""Several networks that answer as one, by the mean of their probabilities.

Each was trained on images of its own, so that what one person can have left is in one of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Networks for the same images and classes; what they give is the logarithm of their mean.

    Images `[n, channels, height, width]` become log-probabilities `[n, classes]`: the logarithm of
    the mean of the members' probabilities, so that losses, attacks and figures take them as logits.

    Example:
        >>> one, other = nn.Flatten(), nn.Flatten()
        >>> Ensemble([one, other])(torch.zeros(3, 2, 1, 1)).exp()[0]
        tensor([0.5000, 0.5000])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities `[n, classes]`."""
        logits = torch.stack([member(images) for member in self.members])
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.members))

    def votes(self, images: Tensor) -> Tensor:
        """How many members name each class, int64 `[n, classes]`."""
        logits = torch.stack([member(images) for member in self.members])
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
