"""The guard of single-step training, and whether a finished one overfitted to its single step.

The guard works at the end of each epoch, where it is asked for: it costs a share of the epoch, and
what it takes for a collapse was tuned on digits. What a collapse is, and how one goes back, is in
`defenses.OverfittingGuard`.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from defenses import AdversarialTraining, HeldOut, OverfittingGuard, ThreatModel, TrainingImages
from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage
from secure_cnn.errors import RunError
from secure_cnn.recipe.seams import Seams
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.variant import Variant

__all__ = ["EpochGuard", "make_guard", "overfitting_note"]

_FEWEST, _MOST, _SHARE = 64, 256, 400
"""Images of the guard: one in 400. Their attacks cost 11 plain steps on them (measured): 1.4 % of
an epoch of N-FGSM on 60 000 images, but a quarter of the short ones on the digits; twice that where
it acts."""
_TOLD = 5
_FAR = 0.5
"""PGD leaves less than this part of what one step leaves: a model early in its training can be far
apart by difference, but not by this ratio too."""


class EpochGuard:
    """Watches one training, takes it back, its average too, and remembers when it did."""

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

    def end_epoch(self, epoch: int) -> str:
        """Checks the training at the end of an epoch; returns what it did in words, or nothing."""
        before = self._objective.noise
        verdict = self._guard.rescue(self._model, self._images, self._objective, self._parts)
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
        """Goes on from `state_dict`."""
        acts = state["acts"]
        if not isinstance(acts, list) or not all(isinstance(act, str) for act in acts):
            raise RunError("guard: expected a list of what it did under 'acts'")
        self._guard.load_state_dict(state["guard"])
        self._acts = list(acts)


def make_guard(
    recipe: Recipe,
    variant: Variant,
    seams: Seams,
    model: nn.Module,
    average: WeightAverage | None,
    data: ImageData,
) -> EpochGuard | None:
    """The guard of a training on single steps, where the recipe asks for it; None for others."""
    if not (recipe.guard and variant.single_step):
        return None
    # A single-step method is adversarial training whose noise can be raised.
    objective = cast(AdversarialTraining, seams.objective)
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


def overfitting_note(
    variant: Variant, threat: ThreatModel | None, model: nn.Module, data: ImageData, *, seed: int
) -> str:
    """What shows that a training on single steps has overfitted to them; empty where none does.

    Those of a private training too are test images: epsilon need not cover what they tell.
    """
    if threat is None or not variant.single_step:
        return ""
    draw = torch.Generator().manual_seed(seed)
    images, labels = data.test.batch(torch.randperm(len(data.test), generator=draw)[:_MOST])
    found = OverfittingGuard(threat).check(model, HeldOut(images=images, labels=labels))
    if not found.overfitted or found.iterative >= _FAR * found.single_step:
        return ""
    return (
        f"The training {variant.name} has overfitted to its own single step (catastrophic "
        f"overfitting): of {len(labels)} test images {100 * found.single_step:.0f} % are right "
        f"under FGSM, {100 * found.iterative:.0f} % under PGD. Train with attack=pgd, with more "
        f"attack_noise{'' if variant.private else ', or with guard'}."
    )
