"""From a recipe to the three seams: the only place where a protection is chosen.

The plain training is not a branch of the loop; it is what this room returns when nothing was asked
for.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn

import defenses
import privacy
from secure_cnn.data import Augmentation, ImageData, ShuffledBatches, Split
from secure_cnn.engine import CrossEntropy, MeanUpdate, Objective, Schedule, Update, on_device
from secure_cnn.errors import RunError
from secure_cnn.optimizers import Muon
from secure_cnn.recipe.front import Features, FrozenFront
from secure_cnn.recipe.ranges import ClippingKind
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.variant import Variant

__all__ = [
    "Batches",
    "Seams",
    "make_device",
    "make_plan",
    "make_schedule",
    "make_seams",
    "objective_for",
]

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

_CLIPPINGS: Mapping[ClippingKind, Callable[[], Any]] = {
    "flat": privacy.FlatClipping,
    "automatic": privacy.AutomaticClipping,
    "per-layer": privacy.PerLayerClipping,
    "adaptive": privacy.AdaptiveClipping,
}
_MOMENTUM = 0.9
_PROBED = 6


@dataclass(frozen=True, kw_only=True)
class Seams:
    """Everything one training needs besides the model.

    `batches` gives those of all steps from the given one on, augmented, on the device; of a private
    training they are fresh samples of all steps that are left. `private` is None where it is not.
    """

    objective: Objective
    batches: Callable[[int], Batches]
    update: Update
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    private: privacy.PrivateTraining | None


def make_device(recipe: Recipe) -> torch.device:
    """The device by name; `auto` takes a GPU where there is one."""
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(recipe.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device: expected one that this machine has, got {recipe.device}: {error}"
        ) from error
    return device


def make_plan(recipe: Recipe, samples: int) -> privacy.DPPlan | None:
    """The calibrated plan for so many images, or persons, where the recipe asks for privacy."""
    if recipe.epsilon is None:
        return None
    plan = privacy.DPPlan(
        samples=samples,
        batch_size=recipe.batch_size_for(recipe.variant, samples),
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        clipping=_CLIPPINGS[recipe.clipping](),
        float_safe=recipe.float_safe,
        unit=recipe.unit,
        images_per_person=recipe.images_per_person,
    )
    return plan.calibrate(epsilon=recipe.epsilon, delta=recipe.delta_for(samples))


def make_schedule(
    recipe: Recipe, variant: Variant, samples: int, *, plan: privacy.DPPlan | None
) -> Schedule:
    """How many steps the variant takes on so many images, and its learning rate at each."""
    steps = math.ceil(samples / recipe.batch_size_for(variant, samples)) * recipe.epochs
    if variant.private:
        assert plan is not None, "a private variant has a plan"
        steps = plan.steps
    noise = 0.0
    if plan is not None and plan.noise_multiplier is not None:
        noise = plan.noise_multiplier / (plan.sampling_rate * plan.samples)
    return Schedule(
        peak=recipe.learning_rate_for(variant, steps, noise=noise),
        steps=steps,
        epochs=recipe.epochs,
        warmup=min(int(recipe.warmup * steps), steps - 1),
    )


def objective_for(recipe: Recipe, variant: Variant) -> Objective:
    """What the variant minimises."""
    found = None if variant.method is None else recipe.robust_objective()
    return CrossEntropy(label_smoothing=recipe.label_smoothing) if found is None else found


def make_seams(
    recipe: Recipe,
    variant: Variant,
    model: nn.Module,
    data: ImageData,
    *,
    plan: privacy.DPPlan | None,
    front: FrozenFront | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Seams:
    """Puts one training together; the calibrated `plan` is used where the variant is private.

    `model` is what is trained: behind a `front` the rest of the network, which sees features.
    """
    objective = objective_for(recipe, variant)
    examples = data.train if front is None else front.train
    batch_size = recipe.batch_size_for(variant, len(data.train))
    schedule = make_schedule(recipe, variant, len(data.train), plan=plan)
    optimizer = _optimizer(recipe, schedule.peak, model)
    device = next(model.parameters()).device
    private, update = None, _mean_update(recipe, optimizer)
    batches = partial(_epochs, recipe, objective, examples, batch_size)
    if plan is not None and variant.private:
        private = _attached(recipe, plan, model, optimizer, data, objective, front)
        update = partial(_step, private, recipe.copies)
        batches = partial(_samples, recipe, private)
    if recipe.eps_warmup and variant.method is not None:
        growing = cast(_Strengthened, objective)
        warming = max(1, int(recipe.eps_warmup * schedule.steps))
        update = _WarmingUp(update, growing, steps=warming)
    return Seams(
        objective=objective,
        batches=lambda start_step: on_device(batches(start_step), device, memory_format),
        update=update,
        optimizer=optimizer,
        schedule=schedule,
        private=private,
    )


def _mean_update(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Update:
    return MeanUpdate(optimizer, clip_grad_norm=recipe.clip_grad_norm)


def _attached(
    recipe: Recipe,
    plan: privacy.DPPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    objective: Objective,
    front: FrozenFront | None,
) -> privacy.PrivateTraining:
    """The private training of an objective that keeps examples apart."""
    twin = copy.deepcopy(model)
    rows = privacy.PhysicalBatches()
    # Copies are rows too: as many rows in memory at a time as without them.
    least = max(rows.multiple, plan.images_per_person or 1)
    cut = privacy.PhysicalBatches(size=max(least, rows.size // recipe.copies))
    groups = data.groups if plan.unit == "person" else None
    dataset = data.train if front is None else front.train
    private = privacy.attach(plan, model, optimizer, dataset, physical_batches=cut, groups=groups)
    images, labels = _random_examples(data, recipe.seed)
    examples = images if front is None else front.train.of_images(images), labels
    private.check_objective(objective, examples=examples)
    # And what it adds: gradients at weights that record nothing, and losses that are drawn.
    device = next(twin.parameters()).device
    defenses.check_per_example(objective, twin, *(values.to(device) for values in examples))
    return private


def _samples(recipe: Recipe, private: privacy.PrivateTraining, start_step: int) -> Batches:
    """The samples of a private training, each example in as many copies as the recipe wants.

    Copies are adjacent rows that are augmented apart, so the objective sees them as examples.
    """
    generator = torch.Generator().manual_seed(recipe.seed + start_step)
    augment = _augmentation(recipe)
    for images, labels in private.batches:
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(recipe.copies)
        copied, known = (images, labels) if recipe.copies == 1 else (images[rows], labels[rows])
        yield copied if augment is None else augment(copied, generator), known


def _step(private: privacy.PrivateTraining, copies: int, losses: torch.Tensor) -> bool:
    """A private step on losses of adjacent copies, whose gradients are averaged, then clipped."""
    return private.step(losses if copies == 1 else losses.view(len(losses) // copies, copies))


def _epochs(
    recipe: Recipe,
    objective: Objective,
    examples: Split | Features,
    batch_size: int,
    start_step: int,
) -> Batches:
    """Shuffled epochs, each batch as often in a row as the objective says."""
    times = int(getattr(objective, "replays", 1))
    shuffled = ShuffledBatches(
        examples,
        batch_size=batch_size,
        epochs=recipe.epochs,
        seed=recipe.seed,
        start_step=start_step // times,
        augment=_augmentation(recipe),
    )
    return defenses.replayed(shuffled, times, done=start_step % times)


def _augmentation(recipe: Recipe) -> Augmentation | None:
    wanted = recipe.flip or recipe.shift
    return Augmentation(flip=recipe.flip, shift=recipe.shift) if wanted else None


class _Strengthened(Protocol):
    """An objective whose perturbations may grow."""

    strength: float


class _WarmingUp:
    """An update after whose steps the objective's perturbations grow; it remembers which."""

    def __init__(self, update: Update, objective: _Strengthened, *, steps: int) -> None:
        self._update, self._objective, self._growth = update, objective, 1 / steps
        objective.strength = self._growth

    def __call__(self, losses: torch.Tensor) -> bool:
        """Steps; the strength is the objective's, so that a resumed training goes on with it."""
        stepped = self._update(losses)
        if stepped:
            self._objective.strength = min(1.0, self._objective.strength + self._growth)
        return stepped


def _random_examples(data: ImageData, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples to test the objective's claim with: no private image is looked at."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(_PROBED, *data.spec.shape, generator=generator)
    return images, torch.arange(_PROBED) % len(data.spec.classes)


def _optimizer(recipe: Recipe, rate: float, model: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "muon":
        return Muon(model, momentum=_MOMENTUM, **settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings)
    return torch.optim.SGD(trained, momentum=_MOMENTUM, **settings)
