"""One backward pass from every example's loss, and whose rows are whose.

A gradient is only worth clipping if a row of every recorded layer belongs to the example that it is
clipped with. As many rows as examples may still be others: tokens, another order, copies in the
order of `repeat`. One backward pass from some of the examples tells: it may reach their rows only.
It needs gradients that are not zero: what begins at zero is told from its first steps only. Where
the batch itself was repeated in another order, every layer agrees with the losses: what the first
layer saw is compared with the images given. A loss that begins to mix later shows in the graph of
the losses, or in the gradients of the layers that they are made from: both are looked at each step.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from privacy.clipping.gradients import PerExampleGradients
from privacy.clipping.tape import Tape
from privacy.errors import NotFollowed, StepError, UnsupportedLayer

__all__ = ["Parts", "about_half", "check_rows", "differentiate", "halves"]

Parts = dict[nn.Parameter, PerExampleGradients]
"""Per-example gradients of every parameter that a batch's losses depend on."""
_SELDOM = 32
"""One step in so many asks again of the whole network."""
_ALIKE = 0.9
"""Correlation from which on a row is taken to be an image, or a little changed one."""
_APART = 0.2
"""How much more alike rows must be to other images than to their own."""
_FEWEST = 4
"""Among fewer images, changed copies are alike to others by chance."""
_REENTRANT = "CheckpointFunctionBackward"


def differentiate(
    losses: Tensor,
    parameters: Mapping[str, nn.Parameter],
    tape: Tape,
    *,
    examples: int,
    images: Tensor | None = None,
    shares: Tensor | None = None,
) -> Parts:
    """Runs backward from losses, float [examples] or [examples, K]; every `.grad` stays as it was.

    Where each example has K losses, its gradient is that of their mean: the copies are averaged
    inside the example, before anything is clipped (De et al. 2022, arXiv 2204.13650). The layers
    may see them in rows that follow one another, [examples * K], or in K passes of [examples]. They
    are held against the `images`, [examples, ...], where these are known.

    Where a person is the example, its images are copies: `shares` [examples, R] says what each of
    its R rows counts in the mean, and losses are [examples * R] or [examples * R, K].
    """
    _check_losses(losses, examples if shares is None else shares.numel())
    tape.check()
    if shares is not None:
        losses = losses.reshape(examples, -1)
    copies = losses.numel() // examples
    kept = [(parameter, parameter.grad) for parameter in parameters.values()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        _check_order(losses, tape, images)
        with tape.record(examples=examples, copies=copies), _graph_used():
            torch.autograd.backward(losses, _mean_of(losses, shares))
        bypassed = [name for name, p in parameters.items() if p.grad is not None]
        parts = tape.take()
    finally:
        # Not taken: where the pass was broken off, a parameter may have half of its uses.
        tape.reset()
        for parameter, gradient in kept:
            parameter.grad = gradient
    tape.prove()
    if bypassed:
        raise NotFollowed(
            f"{', '.join(bypassed)}: the gradient did not come through the forward of the layer "
            "that owns the parameter, so it cannot be clipped example by example; call that layer "
            "instead of using its parameter; after private.detach(), attach the model again",
            layers=tuple({name.rpartition(".")[0] for name in bypassed}),
        )
    if not parts:
        raise StepError(
            "losses: their graph reaches no trainable layer of the attached model; compute them "
            "with private.model, outside torch.no_grad()"
        )
    return parts


def _mean_of(losses: Tensor, shares: Tensor | None) -> Tensor:
    """What each loss counts in its example's mean: all the same, or as its row's share says."""
    if shares is None:
        return torch.full_like(losses, len(losses) / losses.numel())
    of_rows = shares.to(losses)
    copies = losses.shape[1] // of_rows.shape[1]
    return (of_rows / copies).repeat_interleave(copies, dim=1)


def _check_order(losses: Tensor, tape: Tape, images: Tensor | None) -> None:
    """Asks whose rows are whose: of the losses in each step, of the network where they are new.

    The whole network is asked again now and then besides, when nobody can foresee it.
    """
    examples, graph = len(losses), _graph_of(losses, tape)
    copies = losses.numel() // examples
    first = tape.due(examples=examples, copies=copies, graph=graph.fingerprint)
    whole = first or graph.hidden or secrets.randbelow(_SELDOM) == 0
    chosen = about_half(examples, seed=secrets.randbelow(2**31))
    # The others, too: what all losses take from one example is seen where that one is not chosen.
    asked = [chosen, ~chosen] if first else [chosen ^ (secrets.randbelow(2) == 1)]
    try:
        with _graph_used():
            for some in asked:
                if whole:
                    check_rows(losses, tape, some, images)
                else:
                    _check_head(losses, tape, some, graph)
    except BaseException:
        tape.ask_again()
        raise


@contextmanager
def _graph_used() -> Iterator[None]:
    """Explains torch's error for a graph that was used already."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise StepError(
            "losses: they were differentiated before; give the losses of the batch that "
            "private.batches gave last, fresh from the model"
        ) from error


def _check_losses(losses: Tensor, rows: int) -> None:
    """Refuses losses that were averaged, belong to another batch, or have no graph."""
    if losses.shape[:1] != (rows,) or losses.dim() > 2 or not losses.numel():
        raise StepError(
            f"losses: expected one loss an example, shape [{rows}], got {list(losses.shape)}: "
            'do not average them (reduction="none"), and give the losses of the batch that '
            f"private.batches gave last; with K copies of each example, shape [{rows}, K]"
        )
    if not losses.is_floating_point() or losses.layout != torch.strided:
        raise StepError(
            f"losses: expected real numbers in a dense tensor, got {losses.dtype}, {losses.layout}"
        )
    if torch.is_inference_mode_enabled():
        raise StepError("private.step cannot run under torch.inference_mode(); call it outside")
    if not losses.requires_grad:
        raise StepError(
            "losses: they carry no graph; compute them with private.model, outside torch.no_grad()"
        )


def check_rows(losses: Tensor, tape: Tape, chosen: Tensor, images: Tensor | None = None) -> None:
    """Runs backward from the losses of `chosen` examples, bool [examples]; refuses others' rows.

    The graph of the losses, [examples] or [examples, K], is kept; the tape stays empty. Copies are
    held against the `images` as they were given.
    """
    examples, copies = len(losses), losses.numel() // len(losses)
    with tape.trace(examples=examples, copies=copies, chosen=chosen.to(losses.device)) as strayed:
        torch.autograd.backward(losses, _weights(losses, chosen), retain_graph=True)
    if not strayed:
        return
    _refuse_strayed(strayed, copies)
    seen = tape.first_inputs()
    if images is None or losses.numel() == len(images):
        return
    if any(_of_others(rows, images) for rows in seen):
        raise UnsupportedLayer(
            f"{strayed[-1][0]}: the copies that it saw look like other examples than those whose "
            f"losses they have: {_adjacent(copies)}"
        )


def _check_head(losses: Tensor, tape: Tape, chosen: Tensor, graph: "_Graph") -> None:
    """`check_rows` of the losses alone, down to the outputs of the layers that they are made from.

    Cheap enough for every step; what mixes inside of the network is left to `check_rows`.
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


def _weights(losses: Tensor, chosen: Tensor) -> Tensor:
    weights = chosen.to(losses).view(-1, *[1] * (losses.dim() - 1))
    return weights.expand_as(losses)


def _refuse_strayed(strayed: list[tuple[str, Tensor]], copies: int) -> None:
    """Refuses a trace that reached others' rows, and names the layer where it did so first."""
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
    """How copies must be ordered, for a message."""
    return (
        f"the {copies} copies of an example must be adjacent rows: repeat_interleave, not repeat, "
        f"and losses.view(rows, {copies})"
    )


@torch.no_grad()
def _of_others(seen: Tensor, images: Tensor) -> bool:
    """Whether rows are plainly copies of other images than those in whose places they are.

    Correlation with every image decides. Copies changed beyond recognition are not told, nor those
    of another size, nor of fewer than four images.
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


def _directions(rows: Tensor) -> Tensor:
    """Each row minus the mean of all, scaled to length one; float32."""
    rows = rows.float().nan_to_num()
    return torch.nn.functional.normalize(rows - rows.mean(0), dim=1)


def halves(examples: int) -> list[Tensor]:
    """Sets of examples that together tell any order from any other, bool [examples] each.

    The examples whose number has a bit set, for each bit: rows that are in other places than they
    should be differ in some bit.
    """
    numbers = torch.arange(examples)
    return [(numbers >> bit) % 2 == 1 for bit in range((examples - 1).bit_length())]


def about_half(examples: int, *, seed: int) -> Tensor:
    """About half of the examples, the first among them and the last not; bool [examples]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(examples, generator=generator) < 0.5
    chosen[-1], chosen[0] = False, True
    return chosen


@dataclass(frozen=True)
class _Graph:
    """What a walk through the graph of the losses finds."""

    # The same for graphs of the same operations put together in the same way, in this process.
    fingerprint: int
    # The recorded layers from which the losses are made with no other one between.
    heads: tuple[tuple[str, Any], ...]
    # A part exists in a backward pass only (a reentrant checkpoint), which cannot stop half way.
    hidden: bool


def _graph_of(losses: Tensor, tape: Tape) -> _Graph:
    """Walks from the losses to the leaves; about a microsecond a node."""
    start: Any = losses.grad_fn
    if start is None:
        return _Graph(0, (), hidden=False)
    numbers, order = {start: 0}, [start]
    shape: list[Any] = []
    for node in order:
        shape.append(type(node))
        for following, _ in node.next_functions:
            if following is not None and following not in numbers:
                numbers[following] = len(order)
                order.append(following)
            shape.append(numbers.get(following))
    hidden = any(type(node).__name__ == _REENTRANT for node in order)
    return _Graph(hash(tuple(shape)), _heads(start, tape), hidden)


def _heads(start: Any, tape: Tape) -> tuple[tuple[str, Any], ...]:
    """Names and nodes of the recorded layers that are reached without passing another one."""
    heads: list[tuple[str, Any]] = []
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if getattr(node, "tape", None) is tape:
            heads.append((node.layer, node))
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return tuple(heads)
