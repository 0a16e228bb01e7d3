"""What a finished training can do: its figures, its robustness and what it may claim."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

import defenses
import privacy
from defenses import ThreatModel
from secure_cnn.data import ImageData, Split
from secure_cnn.engine import Objective
from secure_cnn.errors import RunError
from secure_cnn.evaluate import batch_for, evaluate_model
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.pages import Examples
from secure_cnn.recipe.front import Features
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.seams import objective_for
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.variant import Variant
from secure_cnn.record import PrivacyRecord, ResultRecord, Row, versions

__all__ = [
    "MeasureCost",
    "Outcome",
    "attacked_examples",
    "claims_of",
    "cost_of",
    "judge",
    "privacy_record",
]

_SHOWN = 8
_GROUPS = (2, 3, 4, 5, 7, 10)
"""How many may leave together, of whom claims say what the training promises."""
_CLIPPING = {"clipping": "flat", "float_safe": False, "copies": 1}
_READING = {"image_fit": "crop", "background": "white"}
"""Settings that claims name where they are others than these."""


class MeasureCost(Protocol):
    """Times a training step under each protection of a run; `secure_cnn.bench.step_costs` does."""

    def __call__(
        self,
        case: str,
        model: nn.Module,
        split: Split | Features,
        objectives: Mapping[str, Objective],
        *,
        private: bool,
        before_step: Callable[[], None],
    ) -> Sequence[Row]:
        """Rows of time and of its ratio to the plain step; `before_step` may end it by raising."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A training's result, its test loss and, where it was attacked, some of the images."""

    result: ResultRecord
    loss: float | None
    examples: Examples | None


def judge(
    recipe: Recipe,
    variant: Variant,
    model: nn.Module,
    data: ImageData,
    epsilon: float | None,
    stop: StopRequest,
) -> Outcome:
    """Accuracy, recall and confusion on the test images; robust accuracy where there is a threat.

    In batches as large as `secure-cnn evaluate` takes by default, since rounding depends on that. A
    stop is looked at in every forward pass.
    """
    stop_here(stop)
    watched = model.register_forward_pre_hook(lambda *_: stop_here(stop))
    try:
        size = batch_for(model, data.test)
        found = evaluate_model(model, data.test, data.spec.classes, batch_size=size)
        robust = None
        if recipe.threat is not None:
            robust = _robustness(recipe, recipe.threat, model, data, size)
    finally:
        watched.remove()
    result = ResultRecord(
        variant=variant.name,
        accuracy=found.accuracy,
        macro_recall=found.macro_recall,
        recall=tuple(_number(value) for value in found.recall),
        confusion=found.confusion,
        epsilon=epsilon,
        **({} if robust is None else _robust_fields(robust)),
    )
    examples = attacked_examples(robust, model, data.spec.classes, variant.name)
    return Outcome(result=result, loss=found.loss, examples=examples)


def privacy_record(recipe: Recipe, plan: privacy.DPPlan | None) -> PrivacyRecord | None:
    """The conditions of epsilon in the shape of the record."""
    if plan is None:
        return None
    return PrivacyRecord(
        epsilon=plan.epsilon(), steps=plan.steps, trials=recipe.trials, **plan.conditions()
    )


def claims_of(
    recipe: Recipe,
    private: privacy.PrivateTraining | None,
    outcome: Outcome,
    data: ImageData,
    identity: RunIdentity,
) -> dict[str, Any]:
    """What the finished model's file says of it, as plain values.

    Only what its own training supports and this process found: nothing of the unprotected baseline
    is in it, and nothing that was read from a record.
    """
    result = outcome.result
    claims: dict[str, Any] = {
        "variant": result.variant,
        "data": {
            "name": data.name,
            "fingerprint": identity.fingerprint(data),
            **identity.heap_fingerprints(data),
            "train": len(data.train),
            "split_seed": recipe.seed,
            **_unusual(recipe, _READING),
            # A path would say more than where persons were named.
            **(
                {"groups": "folder" if recipe.groups == "folder" else "file"}
                if recipe.groups
                else {}
            ),
        },
        "accuracy": result.accuracy,
        "macro_recall": result.macro_recall,
        "versions": versions(),
    }
    if private is not None:
        claims["privacy"] = {
            "epsilon": private.spent(),
            "steps": private.steps,
            **private.plan.conditions(),
            "groups": _groups(private),
            "trials": {"settings": recipe.trials, "charged": False},
            **_unusual(recipe, _CLIPPING),
        }
    if recipe.threat is not None and result.robust_accuracy is not None:
        claims["robustness"] = {
            **recipe.threat.to_dict(),
            "robust_accuracy": result.robust_accuracy,
            "interval": [result.robust_low, result.robust_high],
            "attacks": dict(result.attacks),
            "images": min(recipe.robust_samples or len(data.test), len(data.test)),
        }
    return claims


def _groups(private: privacy.PrivateTraining) -> list[dict[str, float]]:
    """What the same steps promise to several who leave together, where that is a number."""
    events, delta = private.ledger.events, private.plan.delta_or_own(None)
    found = {size: privacy.group_epsilon(events, delta, size=size) for size in _GROUPS}
    return [
        {"size": size, "epsilon": epsilon, "delta": delta}
        for size, epsilon in found.items()
        if math.isfinite(epsilon)
    ]


def cost_of(
    recipe: Recipe,
    model: nn.Module,
    examples: Split | Features,
    measure_cost: MeasureCost,
    stop: StopRequest,
) -> tuple[Row, ...]:
    """Has the recipe's protections timed on what is trained of a new model, and on its examples.

    Raises:
        RunError: What came is no sequence of rows.
        Stopped: A stop was requested.
    """
    variant = recipe.variant
    own: dict[str, Objective] = {}
    if variant.method is not None:
        own[variant.method] = objective_for(recipe, variant)
    found: object = measure_cost(
        recipe.model,
        model,
        examples,
        own,
        private=variant.private,
        before_step=partial(stop_here, stop),
    )
    if not isinstance(found, Sequence) or not all(isinstance(row, Row) for row in found):
        raise RunError(
            "measure_cost: expected a sequence of secure_cnn.record.Row, got "
            f"{type(found).__name__}; the training is kept: go on with resume=True"
        )
    return tuple(found)


def _unusual(recipe: Recipe, usual: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: getattr(recipe, name) for name in usual}
    return {name: value for name, value in own.items() if value != usual[name]}


def _robustness(
    recipe: Recipe, threat: ThreatModel, model: nn.Module, data: ImageData, batch_size: int
) -> defenses.RobustnessReport:
    """The default attacks of `defenses.evaluate`, on the recipe's number of test images."""
    samples = recipe.robust_samples
    chosen = None if samples is None else min(samples, len(data.test))
    return defenses.evaluate(
        model, data.test, threat, samples=chosen, batch_size=batch_size, seed=recipe.seed
    )


def _robust_fields(report: defenses.RobustnessReport) -> dict[str, Any]:
    low, high = report.worst_case_interval
    return {
        "robust_accuracy": report.worst_case_accuracy,
        "robust_low": low,
        "robust_high": high,
        "robust_recall": tuple(_number(value) for value in report.worst_case_recall),
        "attacks": report.attack_accuracy,
    }


def attacked_examples(
    report: defenses.RobustnessReport | None, model: nn.Module, classes: Sequence[str], name: str
) -> Examples | None:
    """A few attacked test images for a page, on which the model is called `name`."""
    if report is None or report.examples is None:
        return None
    fields = ("indices", "clean", "adversarial", "labels", "predictions")
    found = defenses.AdversarialExamples(
        **{each: getattr(report.examples, each)[:_SHOWN] for each in fields}
    )
    device = next(model.parameters()).device
    with torch.no_grad():
        before = model(found.clean.to(device)).argmax(1).cpu()
    return Examples(
        clean=found.clean.cpu().float(),
        adversarial=found.adversarial.cpu().float(),
        labels=found.labels.cpu(),
        before=before,
        after=found.predictions.cpu(),
        classes=tuple(classes),
        variant=name,
        attack=" and ".join(report.robust),
    )


def _number(value: float | None) -> float:
    """NaN for a class without test images."""
    return float("nan") if value is None else value
