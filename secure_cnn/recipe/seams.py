"""From a recipe to the three seams: the only place where a protection is chosen.

The plain training is not a branch of the loop; it is what this room returns when nothing was asked
for.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

import defenses
import privacy
from defenses import AdversarialObjective, FreeAdversarialTraining, check_per_example, replayed
from defenses.training.by_name import ObjectiveName
from secure_cnn.data import Augmentation, ImageData, ShuffledBatches
from secure_cnn.engine import CrossEntropy, MeanUpdate, Objective, Schedule, Update, on_device
from secure_cnn.recipe.settings import Recipe, Variant

__all__ = ["Seams", "batches_for", "make_plan", "make_seams", "make_threat", "objective_for"]

_MOMENTUM = 0.9
_PROBED = 6


@dataclass(frozen=True, kw_only=True)
class Seams:
    """Everything one training needs besides the model.

    Attributes:
        objective: One loss an example.
        update: Turns losses into steps.
        optimizer: What steps.
        schedule: Learning rate and number of steps.
        private: The private training, where the variant is one.
    """

    objective: Objective
    update: Update
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    private: privacy.PrivateTraining | None


def make_threat(recipe: Recipe) -> defenses.ThreatModel | None:
    """The threat model, where the recipe names one.

    Raises:
        ThreatModelError: A value is out of its range.
    """
    return None if recipe.eps is None else defenses.ThreatModel(norm=recipe.norm, eps=recipe.eps)


def make_plan(recipe: Recipe, samples: int) -> privacy.DPPlan | None:
    """The calibrated plan, where the recipe asks for privacy.

    Raises:
        PlanError: The budget cannot be reached, or a value is out of its range.
    """
    if recipe.epsilon is None:
        return None
    plan = privacy.DPPlan(
        samples=samples,
        batch_size=recipe.batch_size_for(recipe.variant, samples),
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
    )
    return plan.calibrate(epsilon=recipe.epsilon, delta=recipe.delta_for(samples))


def objective_for(recipe: Recipe, variant: Variant) -> Objective:
    """What the variant minimises.

    Raises:
        AttackError: The method is unknown, or cannot be configured so.
    """
    threat = make_threat(recipe)
    if variant.method is not None and recipe.gaussian_sigma is not None:
        return defenses.GaussianAugmentation(
            sigma=recipe.gaussian_sigma, seed=recipe.seed, label_smoothing=recipe.label_smoothing
        )
    if variant.method is None or threat is None:
        return CrossEntropy(label_smoothing=recipe.label_smoothing)
    return defenses.adversarial_objective(
        cast(ObjectiveName, variant.method),
        threat,
        steps=recipe.attack_steps,
        precision=recipe.attack_precision,
        seed=recipe.seed,
        label_smoothing=recipe.label_smoothing,
    )


def make_seams(
    recipe: Recipe, variant: Variant, model: nn.Module, data: ImageData, plan: privacy.DPPlan | None
) -> Seams:
    """Puts one training together.

    Args:
        plan: The calibrated plan; used where the variant is private.

    Raises:
        PrivacyError: The model or the objective cannot be trained privately.
        ObjectiveError: The objective's losses depend on other examples, against its word.
        RunError: A setting is out of range.
    """
    objective = objective_for(recipe, variant)
    optimizer = _optimizer(recipe, variant, model)
    private = None
    update: Update = MeanUpdate(optimizer)
    if variant.private:
        assert plan is not None, "a private variant has a plan"
        twin = copy.deepcopy(model)
        private = privacy.attach(plan, model, optimizer, data.train)
        examples = _random_examples(data, recipe.seed)
        private.check_objective(objective, examples=examples)
        # And what it adds: gradients at weights that record nothing, and losses that are drawn.
        device = next(twin.parameters()).device
        check_per_example(objective, twin, *(values.to(device) for values in examples))
        update = private.step
        steps = plan.steps
    else:
        batch_size = recipe.batch_size_for(variant, len(data.train))
        steps = math.ceil(len(data.train) / batch_size) * recipe.epochs
    if isinstance(objective, AdversarialObjective) and recipe.eps_warmup:
        update = _WarmingUp(update, objective, steps=max(1, int(recipe.eps_warmup * steps)))
    schedule = Schedule(
        peak=recipe.learning_rate_for(variant),
        steps=steps,
        epochs=recipe.epochs,
        warmup=min(int(recipe.warmup * steps), steps - 1),
    )
    return Seams(
        objective=objective, update=update, optimizer=optimizer, schedule=schedule, private=private
    )


def batches_for(
    recipe: Recipe,
    variant: Variant,
    seams: Seams,
    data: ImageData,
    *,
    device: torch.device,
    memory_format: torch.memory_format,
    start_step: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all steps from `start_step` on, augmented, on the device."""
    augment = (
        Augmentation(flip=recipe.flip, shift=recipe.shift) if recipe.flip or recipe.shift else None
    )
    if seams.private is not None:
        batches: Any = seams.private.batches
        if augment is not None:
            generator = torch.Generator().manual_seed(recipe.seed + start_step)
            batches = ((augment(images, generator), labels) for images, labels in batches)
    else:
        objective = seams.objective
        times = objective.replays if isinstance(objective, FreeAdversarialTraining) else 1
        batches = ShuffledBatches(
            data.train,
            batch_size=recipe.batch_size_for(variant, len(data.train)),
            epochs=recipe.epochs,
            seed=recipe.seed,
            start_step=start_step // times,
            augment=augment,
        )
        batches = replayed(batches, times, done=start_step % times)
    return on_device(batches, device, memory_format)


class _WarmingUp:
    """An update after whose steps the objective's perturbations grow; it remembers which."""

    def __init__(self, update: Update, objective: AdversarialObjective, *, steps: int) -> None:
        self._update, self._objective, self._growth = update, objective, 1 / steps
        objective.strength = self._growth

    def __call__(self, losses: torch.Tensor) -> bool:
        """Steps; the strength is the objective's, so that a resumed training goes on with it."""
        stepped = self._update(losses)
        if stepped:
            self._objective.strength = min(1.0, self._objective.strength + self._growth)
        return stepped


def _random_examples(data: ImageData, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """To test the objective's claim with: no private image is looked at."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(_PROBED, *data.spec.shape, generator=generator)
    return images, torch.arange(_PROBED) % len(data.spec.classes)


def _optimizer(recipe: Recipe, variant: Variant, model: nn.Module) -> torch.optim.Optimizer:
    rate = recipe.learning_rate_for(variant)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=rate, momentum=_MOMENTUM, weight_decay=recipe.weight_decay
    )
