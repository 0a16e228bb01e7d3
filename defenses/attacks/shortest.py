"""The shortest change that fools, by penalty: length + c times the margin, c searched per example.

What CW (Carlini & Wagner 2017, arXiv 1608.04644) and EAD (Chen et al. 2018, arXiv 1709.04114) have
in common; how one c is tried is theirs. Each image has its own c, so that the result does not
depend on the rest of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["margin", "shortest_change"]


def margin(logits: Tensor, classes: Tensor, *, targeted: bool) -> Tensor:
    """By how much the model still holds out: below 0 where it is fooled.

    Args:
        logits: [n, classes].
        classes: The true classes, or with `targeted` the ones to reach, int64, [n].

    Returns:
        The true class's logit above the best other one, or the best other one above the target's,
        [n].
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, classes.unsqueeze(1), -torch.inf).amax(dim=1)
    return others - own if targeted else own - others


def shortest_change(
    descend: Callable[[Tensor], tuple[Tensor, Tensor]],
    clean: Tensor,
    *,
    constant: float,
    tries: int,
) -> Tensor:
    """Tries a c per image, ten times more where it failed, halfway back where it fooled.

    Args:
        descend: From c [n] to images and their lengths [n], infinite where none was found.
        clean: What stays where no c works, [n, ...].
        constant: The first c, above 0.
        tries: How many, at least 1.

    Returns:
        For each image the shortest of what was found, [n, ...].
    """
    best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
    low, high = torch.zeros_like(best_length), best_length.clone()
    c = torch.full_like(best_length, constant)
    for _ in range(tries):
        found, length = descend(c)
        shorter, fooled = length < best_length, length < torch.inf
        best[shorter], best_length = found[shorter], torch.minimum(length, best_length)
        low, high = torch.where(fooled, low, c), torch.where(fooled, c, high)
        c = torch.where(high < torch.inf, (low + high) / 2, c * 10)
    return best
