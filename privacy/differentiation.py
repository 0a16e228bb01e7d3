"""One backward pass from every example's loss: what it says of each parameter, example by example.

Everything that would make a row of the losses something else than an example is refused here.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from privacy.clipping import PerExampleGradients
from privacy.clipping.tape import Tape
from privacy.errors import StepError, UnsupportedLayer
from privacy.graph import graph_of
from privacy.rows import check_head, check_rows, some_of

__all__ = ["Parts", "differentiate"]

Parts = dict[nn.Parameter, PerExampleGradients]
"""Per-example gradients of every parameter that a batch's losses depend on."""
_SELDOM = 32
"""One step in so many asks again of the whole network."""


def differentiate(
    losses: torch.Tensor,
    parameters: Mapping[str, nn.Parameter],
    tape: Tape,
    *,
    examples: int,
    images: torch.Tensor | None = None,
) -> Parts:
    """Runs backward from `losses`; every `.grad` stays as it was.

    Where each example has K losses, its gradient is that of their mean: the copies are averaged
    inside the example, before anything is clipped (De et al. 2022, arXiv 2204.13650). The layers
    may see them in rows that follow one another, [examples * K], or in K passes of [examples].

    Args:
        losses: One loss an example, float [examples], or K, float [examples, K], with a graph that
            leads to the model.
        images: The examples as they were given, [examples, ...], where that is known: copies are
            held against them.

    Raises:
        StepError: The losses have the wrong shape, or no graph that leads to the model.
        UnsupportedLayer: A layer saw rows that are not examples, or a parameter is used outside of
            the layer that owns it.
    """
    _check_losses(losses, examples)
    tape.check()
    copies = losses.numel() // examples
    kept = [(parameter, parameter.grad) for parameter in parameters.values()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        _check_order(losses, tape, images)
        with tape.record(examples=examples, copies=copies):
            _run_backward(losses)
        bypassed = [name for name, p in parameters.items() if p.grad is not None]
    finally:
        parts = tape.take()
        for parameter, gradient in kept:
            parameter.grad = gradient
    tape.prove()
    if bypassed:
        raise UnsupportedLayer(
            f"{', '.join(bypassed)}: the gradient did not come through the forward of the layer "
            "that owns the parameter, so it cannot be clipped example by example; call that layer "
            "instead of using its parameter; after private.detach(), attach the model again"
        )
    if not parts:
        raise StepError(
            "losses: their graph reaches no trainable layer of the attached model; compute them "
            "with private.model, outside torch.no_grad()"
        )
    return parts


def _check_order(losses: torch.Tensor, tape: Tape, images: torch.Tensor | None) -> None:
    """Looks whose rows are whose: of the losses at each step, of the network where they are new.

    And of the network now and then besides, when nobody can foresee it.
    """
    examples, graph = len(losses), graph_of(losses, tape)
    copies = losses.numel() // examples
    first = tape.due(examples=examples, copies=copies, graph=graph.fingerprint)
    whole = first or graph.hidden or secrets.randbelow(_SELDOM) == 0
    chosen = some_of(examples, seed=secrets.randbelow(2**31))
    # The others, too: what all losses take from one example is seen where that one is not chosen.
    asked = [chosen, ~chosen] if first else [chosen ^ (secrets.randbelow(2) == 1)]
    try:
        with _graph_used():
            for some in asked:
                if whole:
                    check_rows(losses, tape, some, images)
                else:
                    check_head(losses, tape, some, graph)
    except BaseException:
        tape.ask_again()
        raise


def _run_backward(losses: torch.Tensor) -> None:
    """One backward pass from every example's loss, or the mean over its copies, at once."""
    with _graph_used():
        torch.autograd.backward(losses, torch.full_like(losses, len(losses) / losses.numel()))


@contextmanager
def _graph_used() -> Iterator[None]:
    """Says what it means that the graph of the losses is gone."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise StepError(
            "losses: they were differentiated before; give the losses of the batch that "
            "private.batches gave last, fresh from the model"
        ) from error


def _check_losses(losses: torch.Tensor, rows: int) -> None:
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
