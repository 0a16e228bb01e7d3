"""One training of a recipe from its first step to its last, of which nothing is written.

Shadow models, and the stages of a training in shards, are trained so.
"""

from collections.abc import Callable

import torch
from torch import nn

from secure_cnn.data import ImageData
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.recipe.assembly import Assembly, assembled, frozen_front
from secure_cnn.recipe.guard import EpochGuard, make_guard
from secure_cnn.recipe.initial import InitialModel
from secure_cnn.recipe.ridge import ridge_head, with_head
from secure_cnn.recipe.seams import make_device, make_plan
from secure_cnn.recipe.settings import Recipe

__all__ = ["train_once"]


def train_once(
    recipe: Recipe,
    initial: InitialModel,
    data: ImageData,
    *,
    stop: StopRequest,
    advance: Callable[[float], None],
) -> nn.Module:
    """A finished model of the recipe's own variant, in evaluation mode, on its device.

    Guarantee: the same seams, schedule, average and guard as in a run of the recipe; of a private
    recipe the same plan, with noise and samples of its own.

    Args:
        recipe: What to do.
        initial: How the training begins; of the same seed as the recipe.
        data: What to train on. Of its test images only a frozen front looks at how many there are.
        stop: Looked at after every step.
        advance: Told after every step, with the share of this training that is done.

    Raises:
        Stopped: A stop was requested.
    """
    if recipe.head == "ridge":
        return _solved(recipe, initial, data, stop=stop, advance=advance)
    variant, device = recipe.variant, make_device(recipe)
    parts = assembled(
        recipe,
        variant,
        initial,
        data,
        plan=make_plan(recipe, len(data.train)),
        device=device,
        find_front=lambda: frozen_front(recipe, initial, data, device),
    )
    if parts.front is not None:
        parts.front.fill(stop)
    guard = make_guard(recipe, variant, parts.seams, parts.model, parts.average, data)
    parts.train(_Monitor(guard, advance, steps=parts.seams.schedule.steps), stop)
    stop_here(stop)
    return _finished(parts, initial.build().to(device))


def _solved(
    recipe: Recipe,
    initial: InitialModel,
    data: ImageData,
    *,
    stop: StopRequest,
    advance: Callable[[float], None],
) -> nn.Module:
    """With a last layer that is solved for."""
    model, images = initial.build(), len(data.train)
    head = ridge_head(recipe, model, data, stop=stop, advance=lambda n: advance(n / images))
    return with_head(model, head).to(make_device(recipe))


def _finished(parts: Assembly, twin: nn.Module) -> nn.Module:
    """The model as a run leaves it: averaged weights, no layer replaced, the usual layout."""
    if parts.average is not None:
        parts.average.write_to(parts.model)
    if parts.seams.private is not None:
        parts.seams.private.detach()
    twin.load_state_dict(parts.model.state_dict())
    return twin.eval()


class _Monitor:
    """Tells how far a training is, and lets its guard look after each epoch."""

    def __init__(
        self, guard: EpochGuard | None, advance: Callable[[float], None], *, steps: int
    ) -> None:
        self._guard, self._advance, self._steps = guard, advance, steps

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """After a batch."""
        self._advance(min(1.0, step / self._steps))

    def epoch(self, epoch: int, *, step: int) -> None:
        """At the end of an epoch."""
        if self._guard is not None:
            self._guard.end_epoch(epoch)
