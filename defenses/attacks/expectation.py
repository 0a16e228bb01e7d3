"""A random model as an attack asks it that knows no draws: through its mean (Athalye et al. 2018).

After arXiv 1802.00420: each question is asked several times, and the attack sees the mean of the
logits. Attacks that follow a loss of ours take the mean of each draw's gradient instead (`oracle`,
`projected_gradient`).
"""

from typing import final

import torch
from torch import Tensor, nn

__all__ = ["Expectation", "mean_of"]


@final
class Expectation(nn.Module):
    """A model whose answer is the mean of several.

    Args:
        draws: How many to take the mean of, at least 1.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self._model, self._draws = model, draws

    def forward(self, images: Tensor) -> Tensor:
        """The mean logits, [n, classes]."""
        answers = [self._model(images) for _ in range(self._draws)]
        return torch.stack(answers).mean(0)


def mean_of(model: nn.Module, draws: int) -> nn.Module:
    """The model itself for one draw, else its expectation."""
    return model if draws == 1 else Expectation(model, draws)
