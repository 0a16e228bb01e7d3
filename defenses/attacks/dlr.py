"""The difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690, equations 6 and 7).

Cross-entropy vanishes where a model is sure of itself, and a large factor on the logits makes it
sure everywhere. The ratio does not change when the logits are scaled or shifted.
"""

import math

import torch
from torch import Tensor

from defenses.attacks.shortest import margin

__all__ = ["dlr", "lead", "likeliest_wrong", "targeted_dlr"]

_TINY = 1e-12


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Away from the labels: above 0 where the model is wrong.

    Args:
        logits: [n, classes], at least 3 classes.
        labels: The true classes, int64, [n].

    Returns:
        Ratios, [n].

    Example:
        >>> dlr(torch.tensor([[5.0, 4.0, 1.0]]), torch.tensor([0]))
        tensor([-0.2500])
    """
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return -margin(logits, labels, targeted=False) / (first - third + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """From the labels towards the targets: above 0 where the target beats the label.

    The ratio compares four logits. For two or three classes it is the difference alone.

    Args:
        logits: [n, classes].
        labels: The true classes, int64, [n].
        targets: Other classes, int64, [n].

    Returns:
        Ratios, [n].

    Example:
        >>> logits = torch.tensor([[5.0, 4.0, 1.0, 1.0]])
        >>> targeted_dlr(logits, torch.tensor([0]), torch.tensor([1]))
        tensor([-0.2500])
        >>> targeted_dlr(logits[:, :2], torch.tensor([0]), torch.tensor([1]))
        tensor([-1.])
    """
    difference = lead(logits, labels, targets)
    if logits.shape[1] < 4:
        return difference
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return difference / (first - (third + fourth) / 2 + _TINY)


def lead(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """By how much the targets' logits are above the labels', [n].

    Example:
        >>> lead(torch.tensor([[3.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-2.])
    """
    pair = logits.gather(1, torch.stack([labels, targets], dim=1))
    return pair[:, 1] - pair[:, 0]


def likeliest_wrong(logits: Tensor, labels: Tensor, most: int) -> Tensor:
    """The wrong classes of each image, the likeliest first.

    Args:
        logits: [n, classes].
        labels: The true classes, int64, [n].
        most: How many at most.

    Returns:
        Classes, int64, [n, min(most, classes - 1)].

    Example:
        >>> likeliest_wrong(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), 9)
        tensor([[2, 1]])
    """
    first = logits.scatter(1, labels[:, None], math.inf)
    return first.argsort(dim=1, descending=True)[:, 1 : most + 1]
