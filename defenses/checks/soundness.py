"""Checks of the model itself: are its answers and its gradients such that an attack can work?"""

from dataclasses import dataclass
from typing import final

import torch

from defenses.checks.planted import plant
from defenses.checks.subject import Subject
from defenses.checks.verdict import CurvePoint, Outcome
from defenses.errors import AttackError, EvaluationError
from defenses.evaluation.counting import exceeds, wilson_interval

__all__ = [
    "Finding",
    "gradients_are_not_zero",
    "outputs_are_logits",
    "planted_is_found",
]

_WITHOUT_GRADIENT = 0.01
_FOUND_AT_LEAST = 0.9


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found; with its name it becomes a verdict.

    Attributes:
        outcome: `"pass"`, `"fail"` or `"not checked"`.
        figure: What was measured.
        sentence: What it means.
        curve: The accuracy curve, if one was measured.
    """

    outcome: Outcome
    sentence: str
    figure: float | None = None
    curve: tuple[CurvePoint, ...] = ()


def outputs_are_logits(subject: Subject) -> Finding:
    """Fails where the answers cannot be used: probabilities, NaN, too few classes, no tensor."""
    try:
        logits = subject.logits
    except EvaluationError as error:
        return Finding(outcome="fail", sentence=f"{error}.")
    least, most = (float(value) for value in torch.aminmax(logits))
    return Finding(
        outcome="pass",
        figure=most - least,
        sentence=f"They are finite, between {least:.3g} and {most:.3g}, and no probabilities.",
    )


def gradients_are_not_zero(subject: Subject) -> Finding:
    """Fails where the loss of too many images has no slope at all, or none that is finite."""
    try:
        gradients = subject.input_gradients().flatten(1)
    except AttackError as error:
        return Finding(outcome="fail", figure=1.0, sentence=f"There is no slope: {error}.")
    usable = torch.isfinite(gradients).all(dim=1) & (gradients != 0).any(dim=1)
    count, zero = len(usable), int((~usable).sum())
    failed = exceeds(zero, count, _WITHOUT_GRADIENT)
    words = f"{zero} of {count} images have a gradient that is zero or not finite"
    meaning = ": what follows the gradient cannot find what is there." if failed else "."
    return Finding(
        outcome="fail" if failed else "pass", figure=zero / count, sentence=words + meaning
    )


def planted_is_found(subject: Subject) -> Finding:
    """Fails where the iterative attack misses what was planted for it."""
    if subject.threat.norm == "l0":
        return Finding(outcome="not checked", sentence="Only for linf, l2 and l1.")
    search = subject.iterative(subject.threat, subject.settings.steps)
    chosen = subject.images[subject.right][: subject.settings.planted]
    if len(chosen) == 0:
        return Finding(outcome="not checked", sentence="No image is classified correctly.")
    made = plant(subject.model, chosen, subject.threat, search, seed=subject.seed)
    if made.planted == 0:
        return Finding(
            outcome="not checked",
            sentence="The features do not tell a planted point from the clean ones.",
        )
    failed = wilson_interval(made.found, made.planted)[1] < _FOUND_AT_LEAST
    words = f"{search.name} finds {made.found} of {made.planted} planted vulnerabilities"
    meaning = ": it misses what is certainly there." if failed else "."
    return Finding(
        outcome="fail" if failed else "pass",
        figure=made.found / made.planted,
        sentence=words + meaning,
    )
