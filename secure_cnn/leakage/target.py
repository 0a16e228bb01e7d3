"""The target: the model of a run that is complete, with what it was trained on and how."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import nn

from privacy import DPPlan
from privacy.leakage import Promise, copies
from privacy.leakage.shadows import Indices
from secure_cnn.checkpoint import LoadedModel, Unlocking, model_digest
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.evaluate import ClassificationReport, batch_for, evaluate_model
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Recipe
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.recipe.initial import InitialModel, initial_model
from secure_cnn.recipe.outcome import privacy_record
from secure_cnn.recipe.seams import make_plan, make_schedule
from secure_cnn.record import ChosenRecord, PrivacyRecord, RunRecord

__all__ = ["Target", "target_of"]

_OF_THE_RUN = (
    *("out", "seed", "device", "data", "baseline", "robust_samples", "checkpoint_minutes"),
    *("trials", "groups"),
)
"""Settings that do not say how a model is trained, but where, on what and what else is done."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """The model of a complete run, and all that is needed to train others as it was trained.

    Attributes:
        record: Of the run.
        recipe: Its settings, with the batch size and the rate that they came to.
        data: Its images: the members, and test images, which are none.
        initial: How its training began.
        model: What it left, in evaluation mode.
        found: What that finds on the test images.
        certain: Whether the images were found to be those of the training. The fingerprint of a
            private run is keyed, and its key is in its sealed model alone.
    """

    record: RunRecord
    recipe: Recipe
    data: ImageData
    initial: InitialModel
    model: nn.Module
    found: ClassificationReport
    certain: bool

    @cached_property
    def everybody(self) -> Split:
        """All images that are guessed about: those of the training, then those of the test."""
        parts = (self.data.train, self.data.test)
        return Split(
            images=torch.cat([part.images for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
        )

    @property
    def members(self) -> Indices:
        """Indices in `everybody` of those that the model was trained on."""
        return np.arange(len(self.data.train))

    @property
    def others(self) -> Indices:
        """Indices in `everybody` of those that it was not."""
        return np.arange(len(self.data.train), len(self.everybody))

    @cached_property
    def copies(self) -> Indices:
        """Indices in `everybody` of images that are there more than once: of nobody it is told."""
        return copies(self.everybody)

    @cached_property
    def plan(self) -> DPPlan | None:
        """Of its training, if that was private."""
        return make_plan(self.recipe, len(self.data.train))

    @cached_property
    def promise(self) -> Promise | None:
        """What its training promised whom it was trained on, if anything."""
        plan = self.plan
        return None if plan is None else Promise.of([plan.event()], plan.delta_or_own(None))

    @property
    def weights(self) -> str:
        """SHA-256 of what the model has learned, its names and values."""
        return model_digest(self.model)

    @property
    def digest(self) -> str:
        """SHA-256 of how it was trained: the same for whatever was trained likewise."""
        settings = self.recipe.to_dict()
        told = {
            "settings": {n: value for n, value in settings.items() if n not in _OF_THE_RUN},
            "weights": self.initial.digest,
            "source": self.initial.record.source,
            "structure": self.initial.record.structure,
            "images": len(self.data.train),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def target_of(
    record: RunRecord,
    loaded: LoadedModel,
    data: str,
    *,
    network: OwnNetwork | None = None,
    unlocking: Unlocking | None = None,
    recognised: Callable[[ImageData], ImageData] = lambda images: images,
) -> Target:
    """The target of a run's record and the model that the run left.

    Args:
        record: Of a complete run.
        loaded: Its model, as read from its file.
        data: Where the images of the run are now.
        network: Makes the model where it is one of the user's own.
        unlocking: Opens the sealed weights that the run started from, where it did.
        recognised: Chooses those of the run among the images, where others are among them.

    Raises:
        RunError: The run is not complete or protects persons, its settings are not those of the
            training on its record, or the model is another one's, or was found to answer otherwise
            on these data.
        DataError: The data cannot be read.
        ModelError: The weights that the run began with are gone, or do not fit.
    """
    if record.status != "complete":
        raise RunError(
            f"run: expected one that is complete, got one that is {record.status}; end it with "
            "train --resume"
        )
    recipe = Recipe.from_dict({**record.settings, "data": data, "out": ""})
    _check_alone(recipe, loaded)
    images = recognised(recipe.images())
    recipe = _as_it_was(recipe.on(images), record)
    initial = initial_model(recipe, images, network, unlocking)
    target = Target(
        record=record,
        recipe=recipe,
        data=images,
        initial=initial,
        model=loaded.model.eval(),
        found=evaluate_model(
            loaded.model,
            images.test,
            images.spec.classes,
            batch_size=batch_for(loaded.model, images.test),
        ),
        certain=not record.data.keyed or "data_fingerprint_key" in loaded.private_claims,
    )
    _check_same(target, loaded)
    _check_training(target)
    return target


def _check_alone(recipe: Recipe, loaded: LoadedModel) -> None:
    """Refuses a model that no single training on all of the images left, and one of persons."""
    if recipe.is_sharded or loaded.claims.get("unlearned"):
        how = "in shards" if recipe.is_sharded else "and then changed by an unlearning method"
        raise RunError(
            f"run: expected a model that one training left, got one that was trained {how}; shadow "
            "models would be trained otherwise"
        )
    told = loaded.claims.get("data")
    if isinstance(told, dict) and told.get("left"):
        raise RunError(
            "run: expected one with all images of its training, got one whose model is that of the "
            "run before, since it promised enough to who left; measure the run before"
        )
    if recipe.unit == "person":
        raise RunError(
            "unit=person: expected a run whose unit is an example, got persons: membership of a "
            "person with all images of theirs is not measured yet; audit --run audits its promise"
        )


def _as_it_was(recipe: Recipe, record: RunRecord) -> Recipe:
    """With the batch size and rate that were chosen then: another version may choose otherwise."""
    chosen = _chosen(recipe, record)
    if chosen is None:
        return recipe
    for name in ("batch_size", "learning_rate"):
        given, came_to = getattr(recipe, name), getattr(chosen, name)
        if given is not None:
            _require_equal(name, given, came_to)
    return replace(recipe, batch_size=chosen.batch_size, learning_rate=chosen.learning_rate)


def _chosen(recipe: Recipe, record: RunRecord) -> ChosenRecord | None:
    return next((each for each in record.chosen if each.variant == recipe.variant.name), None)


def _check_training(target: Target) -> None:
    """Refuses settings that are not those of the training on record: shadows would be trained so.

    A model that learned longer than its shadow models leaks less in their eyes, and a larger ε
    promises less.
    """
    record, recipe, plan = target.record, target.recipe, target.plan
    if recipe.head == "ridge":
        return  # of which all settings are in the recipe, and no step is on record
    planned, told = privacy_record(recipe, plan), record.privacy
    for name in (each.name for each in fields(PrivacyRecord)):
        ours, its = getattr(planned, name, None), getattr(told, name, None)
        # Its words of a plan may be another version's.
        if name not in ("relation", "accountant"):
            _require_equal(name, ours, its)
    chosen, variant = _chosen(recipe, record), recipe.variant
    schedule = make_schedule(recipe, variant, len(target.data.train), plan=plan)
    if chosen is not None:
        _require_equal("steps", schedule.steps, chosen.steps)
    done = [each for each in record.epochs if each.variant == variant.name]
    # A private training that lost steps ends earlier.
    _require_equal("epochs", recipe.epochs if plan is None else len(done), len(done))
    for number, each in enumerate(done, start=1):
        _require_equal("epochs", number, each.epoch)
        _require_equal("epochs", each.epoch, schedule.epoch_ended(each.step))
        if chosen is not None:
            _require_equal("learning_rate", schedule.at(each.step - 1), each.learning_rate)


def _require_equal(name: str, given: object, told: object) -> None:
    """Raise unless a setting is what the record says of the training, but for rounding."""
    numbers = isinstance(given, float | int) and isinstance(told, float | int)
    if given == told or (numbers and math.isclose(given, told, rel_tol=1e-3)):  # type: ignore[arg-type]  # both are numbers
        return
    raise RunError(
        f"run.json: expected settings that are those of the training on its record, got {name} "
        f"{given} by its settings and {told} on its record; shadow models would be trained "
        "otherwise than the model: put it back as train wrote it, or train again"
    )


def _check_same(target: Target, loaded: LoadedModel) -> None:
    """Refuses data, or a model, that are not those of the record: members would be no members."""
    record, data, found = target.record, target.data, target.found
    told, key = record.data.fingerprint, loaded.private_claims.get("data_fingerprint_key")
    known = keyed_fingerprint(data.fingerprint, key) if isinstance(key, str) else data.fingerprint
    sizes = (record.data.train, record.data.test) == (len(data.train), len(data.test))
    unknown = told.startswith(KEYED) and not isinstance(key, str)
    if not sizes or (not unknown and told != known):
        raise RunError(
            f"data: expected the images that the run was trained on, got others in "
            f"{target.recipe.data}: who is a member would be wrong; put them back as they were"
        )
    result = next((r for r in record.results if r.variant == target.recipe.variant.name), None)
    expected = None if result is None else (result.accuracy, result.confusion)
    if expected != (found.accuracy, found.confusion):
        raise RunError(
            "model: expected what the run's record says that it finds on the test images, got "
            f"accuracy {found.accuracy:.4g}; data, model or record were changed since it was "
            "trained, or the model is of another run"
        )
    if record.model_digest and record.model_digest != target.weights:
        raise RunError(
            "model: expected the one that the run left, got other weights, whatever they find on "
            "the test images; give the model of this run, or the run that left it"
        )
    claimed = loaded.claims.get("variant")
    if claimed is not None and claimed != target.recipe.variant.name:
        raise RunError(
            f"model: expected one of {target.recipe.variant.name}, got one that says it is of "
            f"{claimed}; give the run that left it"
        )
