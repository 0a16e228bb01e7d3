"""The guard of a run's single-step training, at the end of each epoch, where it is asked for.

It costs a share of the epoch, and what it takes for a collapse was tuned on digits. Deliberately
not here: what a collapse is, and how one goes back (`defenses.OverfittingGuard`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from defenses import AdversarialTraining, OverfittingGuard, TrainingImages
from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage
from secure_cnn.errors import RunError
from secure_cnn.recipe.seams import Seams
from secure_cnn.recipe.settings import Recipe

__all__ = ["UNGUARDED_NOTE", "EpochGuard", "is_unguarded", "make_guard"]

_FEWEST, _MOST, _SHARE = 64, 256, 400
"""Images: one in 400. Their attacks cost 11 plain steps on them (measured): 1.4 % of an epoch of
N-FGSM on 60 000 images, but a quarter of the short ones on the digits; twice that where it acts.
"""
_TOLD = 5
UNGUARDED_NOTE = (
    "Training on single steps can overfit to them (catastrophic overfitting), and no guard watched "
    "for it. The robust accuracy shows whether it happened."
)


class EpochGuard:
    """Watches one training, takes it back, and remembers when; a class because it remembers.

    Args:
        average: Goes back too, where there is one.
    """

    def __init__(
        self,
        guard: OverfittingGuard,
        images: TrainingImages,
        *,
        model: nn.Module,
        objective: AdversarialTraining,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
    ) -> None:
        self._guard, self._images, self._model, self._objective = guard, images, model, objective
        # Only these go back. Whatever counts what was spent or done must not be among them.
        self._parts: list[Any] = [optimizer] if average is None else [optimizer, average]
        self._acts: list[str] = []

    def settle(self, epoch: int) -> str:
        """At the end of an epoch; what it did, in words, or nothing.

        Raises:
            DefenseError: The model's answers cannot be used.
        """
        before = self._objective.noise
        verdict = self._guard.settle(self._model, self._images, self._objective, self._parts)
        after = self._objective.noise
        if after == before and not verdict.returned:
            return ""
        act = (
            f"epoch {epoch}: {100 * verdict.single_step:.0f} % of its images right under FGSM, "
            f"{100 * verdict.iterative:.0f} % under PGD; "
            + ("taken back to the last good epoch, " if verdict.returned else "")
            + f"noise {before:.3g} -> {after:.3g} eps"
        )
        self._acts.append(act)
        return act

    @property
    def note(self) -> str:
        """What it did in the whole training, as a sentence; nothing where it did nothing."""
        if not self._acts:
            return ""
        more = len(self._acts) - _TOLD
        return (
            "The guard saw the training overfit to its own attack (catastrophic overfitting): "
            + ". ".join(self._acts[:_TOLD])
            + (f". And {more} times more." if more > 0 else ".")
        )

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed training could go back to, and what was done."""
        return {"guard": self._guard.state_dict(), "acts": list(self._acts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            RunError: The state is not one.
        """
        acts = state["acts"]
        if not isinstance(acts, list) or not all(isinstance(act, str) for act in acts):
            raise RunError("guard: expected a list of what it did under 'acts'")
        self._guard.load_state_dict(state["guard"])
        self._acts = list(acts)


def make_guard(
    recipe: Recipe, seams: Seams, model: nn.Module, average: WeightAverage | None, data: ImageData
) -> EpochGuard | None:
    """The guard of a training on single steps, where the recipe asks for it; None for others."""
    objective = seams.objective
    if not recipe.guard or not isinstance(objective, AdversarialTraining):
        return None
    count = min(len(data.train), max(_FEWEST, min(_MOST, len(data.train) // _SHARE)))
    draw = torch.Generator().manual_seed(recipe.seed)
    images, labels = data.train.batch(torch.randperm(len(data.train), generator=draw)[:count])
    return EpochGuard(
        OverfittingGuard(objective.attack.threat),
        TrainingImages(images=images, labels=labels),
        model=model,
        objective=objective,
        optimizer=seams.optimizer,
        average=average,
    )


def is_unguarded(recipe: Recipe) -> bool:
    """Whether the recipe's own training takes single steps, and nothing watches over it."""
    return recipe.variant.single_step and not recipe.guard
