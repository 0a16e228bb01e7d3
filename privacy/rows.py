"""Whose rows are whose: a layer's row must belong to the example that it is clipped with.

A layer that sees as many rows as there are examples may still see others: tokens or channels in
dimension 0, examples in another order, copies in the order of `repeat`. One backward pass from some
of the examples tells: it may reach their own rows only. It needs gradients that are not zero, so a
part of a network that is initialised to zero is told from its first steps only.

Where the batch itself was repeated in another order, every layer agrees with the losses. What the
first layer saw is therefore compared with the images that were given.
"""

import torch
from torch.autograd.graph import GradientEdge

from privacy.clipping.tape import Tape
from privacy.errors import UnsupportedLayer
from privacy.graph import Graph

__all__ = ["check_head", "check_rows", "halves", "some_of"]


_ALIKE = 0.9
"""Correlation from which on a row is taken to be an image, or a little changed one."""
_APART = 0.2
"""How much more alike rows must be to other images than to their own."""
_FEWEST = 4
"""Among fewer images, changed copies are alike to others by chance."""


def check_rows(
    losses: torch.Tensor,
    tape: Tape,
    chosen: torch.Tensor,
    images: torch.Tensor | None = None,
) -> None:
    """Runs backward from the chosen examples' losses and refuses if others' rows are reached.

    The graph of the losses is kept; the tape stays empty.

    Args:
        losses: One loss an example, float [examples], or K, float [examples, K].
        chosen: Some of the examples, bool [examples].
        images: The examples as they were given, [examples, ...]; copies are held against them.

    Raises:
        UnsupportedLayer: A layer saw rows that are not examples, or those of others, or copies are
            those of other examples.
    """
    examples, copies = len(losses), losses.numel() // len(losses)
    with tape.trace(examples=examples, copies=copies, chosen=chosen.to(losses.device)) as strayed:
        torch.autograd.backward(losses, _weights(losses, chosen), retain_graph=True)
    if not strayed:
        return
    _refuse_strayed(strayed, copies)
    seen = tape.first_inputs()
    if copies > 1 and images is not None and any(_of_others(rows, images) for rows in seen):
        raise UnsupportedLayer(
            f"{strayed[-1][0]}: the copies that it saw look like other examples than those whose "
            f"losses they have: {_adjacent(copies)}"
        )


def check_head(losses: torch.Tensor, tape: Tape, chosen: torch.Tensor, graph: Graph) -> None:
    """`check_rows` of the losses alone, down to the outputs of the layers that they are made from.

    Cheap enough for every step: the network itself is not passed. What mixes inside of it is left
    to `check_rows`.

    Raises:
        UnsupportedLayer: As of `check_rows`.
    """
    if not graph.heads:
        return
    edges = [GradientEdge(node, 0) for _, node in graph.heads]
    copies, chosen = losses.numel() // len(losses), chosen.to(losses.device)
    with tape.trace(examples=len(losses), copies=copies, chosen=chosen) as strayed:
        gradients = torch.autograd.grad(
            losses, edges, _weights(losses, chosen), retain_graph=True, allow_unused=True
        )
        for (layer, _), gradient in zip(graph.heads, gradients, strict=True):
            if gradient is not None:
                tape.note(layer, gradient, gradient)
    tape.first_inputs()
    if strayed:
        _refuse_strayed(strayed, copies)


def _weights(losses: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """One for every loss of a chosen example, zero for the others."""
    weights = chosen.to(losses).view(-1, *[1] * (losses.dim() - 1))
    return weights.expand_as(losses)


def _refuse_strayed(strayed: list[tuple[str, torch.Tensor]], copies: int) -> None:
    """Refuses a trace that reached others' rows, by the layer where it did so first."""
    if not bool(torch.stack([wrong for _, wrong in strayed]).any()):
        return
    layer = next(name for name, wrong in reversed(strayed) if bool(wrong))
    cure = (
        "a layer mixes or reorders examples, or a loss depends on other examples than its own"
        if copies == 1
        else _adjacent(copies)
    )
    raise UnsupportedLayer(f"{layer}: the loss of an example reached rows of others: {cure}")


def _adjacent(copies: int) -> str:
    """What is expected of copies."""
    return (
        f"the {copies} copies of an example must be adjacent rows: repeat_interleave, not repeat, "
        f"and losses.view(rows, {copies})"
    )


@torch.no_grad()
def _of_others(seen: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether rows are plainly copies of other images than those in whose places they are.

    Copies that augmentation or a first part of the network has changed beyond recognition are not
    told, nor those of another size, nor of fewer than four images: correlation with every image
    given decides, which neither a factor nor an offset changes.
    """
    examples = len(images)
    rows, given = seen.reshape(len(seen), -1), images.reshape(examples, -1)
    if examples < _FEWEST or len(rows) % examples or rows.shape[1] != given.shape[1]:
        return False
    alike = _directions(rows) @ _directions(given).T
    each = torch.arange(len(rows), device=alike.device)
    own = alike[each, each // (len(rows) // examples)]
    best = alike.max(1).values
    told = best > _ALIKE
    strayed = told & (best - own > _APART)
    repeated = alike[each, each % examples].mean()
    as_repeat = (repeated > _ALIKE / 3) & (repeated - own.mean() > _APART)
    return bool((2 * strayed.sum() > told.sum()) | as_repeat)


def _directions(rows: torch.Tensor) -> torch.Tensor:
    """Each row's difference to their mean, of length one; float32, zeros where it is none."""
    rows = rows.float().nan_to_num()
    return torch.nn.functional.normalize(rows - rows.mean(0), dim=1)


def halves(examples: int) -> list[torch.Tensor]:
    """Sets of examples that together tell any order from any other, bool [examples] each.

    The examples whose number has a bit set, for each bit: rows that are in other places than they
    should be differ in some bit.
    """
    numbers = torch.arange(examples)
    return [(numbers >> bit) % 2 == 1 for bit in range((examples - 1).bit_length())]


def some_of(examples: int, *, seed: int) -> torch.Tensor:
    """About half of the examples, the first among them and the last not; bool [examples].

    Args:
        examples: How many, at least 1.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(examples, generator=generator) < 0.5
    chosen[-1], chosen[0] = False, True
    return chosen
