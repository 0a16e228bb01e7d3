"""A plain recipe as a benchmark trains it: with no folder, no checkpoint and no page."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import nn

from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe.assembly import Assembly, assembled, frozen_front
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.seams import make_device
from secure_cnn.recipe.settings import Recipe

__all__ = ["RecipeTraining"]


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
        initial, device = initial_model(recipe, data, None, None), make_device(recipe)
        parts = assembled(
            recipe,
            recipe.variant,
            initial,
            data,
            plan=None,
            device=device,
            find_front=lambda: frozen_front(recipe, initial, data, device),
        )
        if parts.front is not None:
            parts.front.train.fill(lambda _: None)
        parts.train(_Judging(watch, parts), StopRequest())


@final
@dataclass(frozen=True)
class _Judging:
    """Has the whole model judged, with its averaged weights where there are such."""

    watch: _Watch
    parts: Assembly

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """Nothing to do after a batch."""

    def epoch(self, epoch: int, *, step: int) -> None:
        """Judges."""
        average = self.parts.average
        with nullcontext() if average is None else average.applied(self.parts.trained):
            self.watch.judge(self.parts.model)
