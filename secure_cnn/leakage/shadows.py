"""Shadow models: trained by the target's own recipe, on images that are known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn

from privacy.leakage.shadows import Indices
from secure_cnn.data import ImageData, Split
from secure_cnn.engine import train
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.leakage.target import Target
from secure_cnn.recipe.assembly import Assembly, assembled, frozen_front
from secure_cnn.recipe.guard import EpochGuard, make_guard
from secure_cnn.recipe.seams import make_device, make_plan

__all__ = ["ShadowTraining"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShadowTraining:
    """Trains others as the target was trained: a `privacy.leakage.Train`.

    Guarantee: the same seams, schedule, average and guard as in the run; of a private recipe the
    same plan, with noise and samples of its own. Nothing is written.

    Attributes:
        target: Whose recipe it is.
        stop: Looked at after every step.
        advance: Told after every step, with the share of this training that is done.
    """

    target: Target
    stop: StopRequest
    advance: Callable[[float], None]

    def __call__(self, indices: Indices, /, *, seed: int) -> nn.Module:
        """A finished model, in evaluation mode.

        Raises:
            Stopped: A stop was requested.
        """
        recipe = replace(self.target.recipe, seed=seed)
        variant, data, device = recipe.variant, self._data(indices), make_device(recipe)
        initial = replace(self.target.initial, recipe=recipe)
        parts = assembled(
            recipe,
            variant,
            initial,
            data,
            plan=make_plan(recipe, len(indices)),
            device=device,
            find_front=lambda: frozen_front(recipe, initial, data, device),
        )
        if parts.front is not None:
            parts.front.fill(self.stop)
        guard = make_guard(recipe, variant, parts.seams, parts.model, parts.average, data)
        train(
            parts.trained,
            parts.seams.objective,
            parts.seams.batches(0),
            parts.seams.update,
            optimizer=parts.seams.optimizer,
            schedule=parts.seams.schedule,
            monitor=_Monitor(guard, self.advance, steps=parts.seams.schedule.steps),
            average=parts.average,
            stop=self.stop,
        )
        stop_here(self.stop)
        return _finished(parts, initial.build().to(device))

    def _data(self, indices: Indices) -> ImageData:
        chosen = torch.from_numpy(indices)
        everybody, data = self.target.everybody, self.target.data
        # Of the test images only the front of a network looks at how many there are.
        return ImageData(
            name=data.name,
            train=Split(images=everybody.images[chosen], labels=everybody.labels[chosen]),
            test=data.test.first(1),
            spec=data.spec,
        )


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
