"""A plain recipe as a benchmark trains it: with no folder, no checkpoint and no page."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import nn

from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage, train
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe.front import FrozenFront
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.seams import make_device, make_seams
from secure_cnn.recipe.settings import Recipe, images_stay

__all__ = ["RecipeTraining"]

_LAYOUT = torch.channels_last


class _Watch(Protocol):
    """Judges a model, such as `secure_cnn.bench.watch.Watch`."""

    def judge(self, model: nn.Module, /) -> None: ...


@final
@dataclass(frozen=True, kw_only=True)
class RecipeTraining:
    """The training of `run(recipe)` alone, with the seams of this recipe, on any data.

    Called as `training(data, seed=0, watch=watch)` it trains once, with that seed in place of the
    recipe's, and has the model judged after each epoch as it would be kept.

    Raises:
        RunError: The recipe has a protection.

    Example:
        >>> RecipeTraining(recipe=Recipe(out="runs/1")).recipe.variant.name
        'plain'
    """

    recipe: Recipe

    def __post_init__(self) -> None:
        name = self.recipe.variant.name
        if name != "plain":
            raise RunError(f"recipe: expected one without protections, got {name}")

    def __call__(self, data: ImageData, *, seed: int, watch: _Watch) -> None:
        """Trains once on `data.train`."""
        recipe = replace(self.recipe, seed=seed).on(data)
        variant, initial = recipe.variant, initial_model(recipe, data, None, None)
        device = make_device(recipe)
        model = initial.build().to(device).to(memory_format=_LAYOUT)
        front = None
        if images_stay(recipe, variant):
            front = FrozenFront.of(
                initial.build(), data, seed=seed, device=device, memory_format=_LAYOUT
            )
        trained = model if front is None else front.put_before(model)
        seams = make_seams(
            recipe, variant, trained, data, plan=None, front=front, memory_format=_LAYOUT
        )
        decay = recipe.average_decay
        average = WeightAverage(trained, decay=decay) if decay else None
        if front is not None:
            front.train.fill(lambda _: None)
        train(
            trained,
            seams.objective,
            seams.batches(0),
            seams.update,
            optimizer=seams.optimizer,
            schedule=seams.schedule,
            monitor=_Judging(watch, model, trained, average),
            average=average,
            stop=StopRequest(),
        )


@final
@dataclass(frozen=True)
class _Judging:
    """Has the whole model judged, with its averaged weights where there are such."""

    watch: _Watch
    model: nn.Module
    trained: nn.Module
    average: WeightAverage | None

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """Nothing to do after a batch."""

    def epoch(self, epoch: int, *, step: int) -> None:
        """Judges."""
        with nullcontext() if self.average is None else self.average.applied(self.trained):
            self.watch.judge(self.model)
