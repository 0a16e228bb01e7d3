"""What searches climb or measure: margins, and losses that no factor on the logits changes.

Cross-entropy vanishes where a model is sure of itself, and a large factor on the logits makes it
sure everywhere; a small factor makes it mind the unlikely classes as much as the likely ones. The
difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690, equations 6 and 7) knows no factor,
nor does the cross-entropy of logits that are first brought to one range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dlr", "lead", "likeliest_wrong", "margin", "scaled_cross_entropy", "targeted_dlr"]

_TINY = 1e-12  # added to what divides: three equal logits have no ratio
_RANGE = 10.0  # 3, 10 and 30 tried on four networks: 10 finds as much as the logits as they are


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the logits, each row brought to one range, whatever it was.

    The range is taken as a constant: the gradient has the direction that the cross-entropy of the
    scaled logits has. No factor can saturate it.
    """
    high, low = logits.detach().amax(1, keepdim=True), logits.detach().amin(1, keepdim=True)
    # Shifted first: a large common part would cost the division its digits.
    level = (logits - high) / (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    return F.cross_entropy(_RANGE * level, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Away from the labels: above 0 where the model is wrong. Needs at least 3 classes."""
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return -margin(logits, labels, targeted=False) / (first - third + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """From the labels towards the targets: above 0 where the target beats the label.

    The ratio compares four logits. For two or three classes it is the difference alone.
    """
    difference = lead(logits, labels, targets)
    if logits.shape[1] < 4:
        return difference
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return difference / (first - (third + fourth) / 2 + _TINY)


def margin(logits: Tensor, classes: Tensor, *, targeted: bool) -> Tensor:
    """By how much the model still holds out, [n]: below 0 where it is fooled.

    The true class's logit above the best other one, or with `targeted` the best other one above the
    target's.
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, classes.unsqueeze(1), -torch.inf).amax(dim=1)
    return others - own if targeted else own - others


def lead(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """By how much the targets' logits are above the labels', [n]."""
    pair = logits.gather(1, torch.stack([labels, targets], dim=1))
    return pair[:, 1] - pair[:, 0]


def likeliest_wrong(logits: Tensor, labels: Tensor, most: int) -> Tensor:
    """The wrong classes of each image, the likeliest first, [n, min(most, classes - 1)]."""
    first = logits.scatter(1, labels[:, None], math.inf)
    return first.argsort(dim=1, descending=True)[:, 1 : most + 1]
