"""Whose rows are whose: a layer's row must belong to the example that it is clipped with.

A layer that sees as many rows as there are examples may still see others: tokens or channels in
dimension 0, examples in another order, copies in the order of `repeat`. One backward pass from some
of the examples tells: it may reach their own rows only. It needs gradients that are not zero, so a
part of a network that is initialised to zero is told from its first steps only.
"""

import torch

from privacy.clipping import Tape
from privacy.errors import UnsupportedLayer

__all__ = ["check_rows", "halves", "some_of"]


def check_rows(losses: torch.Tensor, tape: Tape, chosen: torch.Tensor) -> None:
    """Runs backward from the chosen examples' losses and refuses if others' rows are reached.

    The graph of the losses is kept; the tape stays empty.

    Args:
        losses: One loss an example, float [examples], or K, float [examples, K].
        tape: The tape that the model's layers write on.
        chosen: Some of the examples, bool [examples].

    Raises:
        UnsupportedLayer: A layer saw rows that are not examples, or those of others.

    Example:
        >>> from torch import nn
        >>> from privacy.clipping import install, rule_of
        >>> model, tape = nn.Linear(2, 1), Tape()
        >>> installation = install(model, tape, rule_of)
        >>> copies = torch.ones(3, 2).repeat(2, 1)
        >>> losses = model(copies).view(2, 3).t()
        >>> check_rows(losses, tape, torch.tensor([True, False, False]))
        Traceback (most recent call last):
        ...
        privacy.errors.UnsupportedLayer: Linear: the loss of an example reached rows of others: ...
    """
    examples, copies = len(losses), losses.numel() // len(losses)
    chosen = chosen.to(losses.device)
    weights = chosen.to(losses.dtype).view(-1, *[1] * (losses.dim() - 1)).expand_as(losses)
    with tape.trace(examples=examples, copies=copies, chosen=chosen) as strayed:
        torch.autograd.backward(losses, weights, retain_graph=True)
    if not strayed or not bool(torch.stack([wrong for _, wrong in strayed]).any()):
        return
    layer = next(name for name, wrong in reversed(strayed) if bool(wrong))
    cure = (
        "a layer mixes or reorders examples, or a loss depends on other examples than its own"
        if copies == 1
        else f"the {copies} copies of an example must be adjacent rows: repeat_interleave, not "
        f"repeat, and losses.view(rows, {copies})"
    )
    raise UnsupportedLayer(f"{layer}: the loss of an example reached rows of others: {cure}")


def halves(examples: int) -> list[torch.Tensor]:
    """Sets of examples that together tell any order from any other, bool [examples] each.

    The examples whose number has a bit set, for each bit: rows that are in other places than they
    should be differ in some bit.

    Example:
        >>> [chosen.tolist() for chosen in halves(3)]
        [[False, True, False], [False, False, True]]
    """
    numbers = torch.arange(examples)
    return [(numbers >> bit) % 2 == 1 for bit in range((examples - 1).bit_length())]


def some_of(examples: int, *, seed: int) -> torch.Tensor:
    """About half of the examples, the first among them and the last not; bool [examples].

    Args:
        examples: How many, at least 1.
        seed: Another one chooses others.

    Example:
        >>> some_of(2, seed=0)
        tensor([ True, False])
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(examples, generator=generator) < 0.5
    chosen[-1], chosen[0] = False, True
    return chosen
