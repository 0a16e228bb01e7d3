"""A training put together: the model at its first step, what of it is trained, and by what."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import privacy
from secure_cnn.data import ImageData
from secure_cnn.engine import Monitor, WeightAverage, train
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe.front import FrozenFront
from secure_cnn.recipe.initial import InitialModel
from secure_cnn.recipe.seams import Seams, make_seams
from secure_cnn.recipe.settings import Recipe, images_stay
from secure_cnn.recipe.variant import Variant

__all__ = ["Assembly", "assembled", "frozen_front"]

_LAYOUT = torch.channels_last
"""The layout in which training is fastest, plain and private."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What a training is made of.

    What is trained is `trained`: the `model`, or what of it stands behind its frozen `front`, with
    which it shares its layers.
    """

    model: nn.Module
    trained: nn.Module
    front: FrozenFront | None
    seams: Seams
    average: WeightAverage | None

    def train(self, monitor: Monitor, stop: StopRequest) -> None:
        """Trains from the first step to the last, or until a stop is requested."""
        train(
            self.trained,
            self.seams.objective,
            self.seams.batches(0),
            self.seams.update,
            optimizer=self.seams.optimizer,
            schedule=self.seams.schedule,
            monitor=monitor,
            average=self.average,
            stop=stop,
        )


def assembled(
    recipe: Recipe,
    variant: Variant,
    initial: InitialModel,
    data: ImageData,
    *,
    plan: privacy.DPPlan | None,
    device: torch.device,
    find_front: Callable[[], FrozenFront | None],
) -> Assembly:
    """The training of one variant, at its first step; a front is looked for where images stay."""
    model = initial.build().to(device).to(memory_format=_LAYOUT)
    front = find_front() if images_stay(recipe, variant) else None
    trained = model if front is None else front.put_before(model)
    seams = make_seams(
        recipe, variant, trained, data, plan=plan, front=front, memory_format=_LAYOUT
    )
    decay = recipe.average_decay
    average = WeightAverage(trained, decay=decay) if decay else None
    return Assembly(model=model, trained=trained, front=front, seams=seams, average=average)


def frozen_front(
    recipe: Recipe, initial: InitialModel, data: ImageData, device: torch.device
) -> FrozenFront | None:
    """What of all models of a run is frozen, if features of the images are worth keeping."""
    return FrozenFront.of(
        initial.build(), data, seed=recipe.seed, device=device, memory_format=_LAYOUT
    )
