"""Checks of the attacks that an evaluation ran: would the standard, or a factor, have found more?

A robust accuracy is an upper bound, and how loose it is can be measured on some of the images: by
the standard AutoAttack (Croce & Hein 2020, arXiv 2003.01690), and by the same attacks on logits
that a factor makes too small or too large for a cross-entropy.
"""

from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.autoattack import ensemble
from defenses.checks.soundness import Finding
from defenses.checks.subject import Subject
from defenses.evaluation.counting import exceeds, wilson_interval

__all__ = ["Rescaled", "rescaled_logits_change_nothing", "standard_finds_little_more"]

_FACTORS = (0.02, 50.0)
_TOLERANCE = 0.02


@final
class Rescaled(nn.Module):
    """A model with its logits multiplied: the same classes, another cross-entropy."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self._model, self._factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        """Logits in at least float32, [n, classes]: half precision would overflow."""
        logits: Tensor = self._model(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) * self._factor


def rescaled_logits_change_nothing(subject: Subject) -> Finding:
    """Fails where the evaluation's attacks fool over 2 % more when the logits are multiplied.

    A factor changes no class, so it may change no attack. Where it does, the loss of the attacks
    vanishes or is blunt at the scale that the model has.
    """
    looked, left = subject.spot, subject.spot & ~subject.attacked
    if not bool(subject.right[looked].any()):
        return Finding(outcome="not checked", sentence="No image is classified correctly.")
    more = {}
    for factor in _FACTORS:
        seen = Rescaled(subject.model, factor)
        found = torch.zeros_like(left)
        for each in subject.attacks:
            found |= subject.fooled_by(each, among=left & ~found, seen_by=seen)
        more[factor] = int(found.sum())
    factor, count = max(more.items(), key=lambda item: item[1])
    samples = int(looked.sum())
    failed = exceeds(count, samples, _TOLERANCE)
    words = (
        f"On {samples} images the attacks fool {_fooled(subject)}; with the logits multiplied by "
        f"{' and by '.join(f'{each:g}' for each in _FACTORS)} they fool up to {count} more"
    )
    meaning = (
        f" (by {factor:g}): their loss depends on the scale of the logits; use the default attacks "
        "or autoattack."
    )
    return Finding(
        outcome="fail" if failed else "pass",
        figure=count / samples,
        sentence=words + (meaning if failed else "."),
    )


def standard_finds_little_more(subject: Subject) -> Finding:
    """Fails where the standard AutoAttack fools over 2 % of the images more, beyond chance."""
    if subject.threat.norm == "l0":
        return Finding(outcome="not checked", sentence="There is no standard in l0.")
    standard = ensemble(subject.threat)
    if set(map(repr, standard)) <= set(map(repr, subject.attacks)):
        sentence = "The attacks are the standard's."
        return Finding(outcome="pass", figure=0.0, sentence=sentence)
    looked, left = subject.spot, subject.spot & subject.right & ~subject.attacked
    if not bool(subject.right[looked].any()):
        return Finding(outcome="not checked", sentence="No image is classified correctly.")
    before, samples = int(left.sum()), int(looked.sum())
    for each in standard:
        left &= ~subject.fooled_by(each, among=left)
    more = before - int(left.sum())
    low, high = wilson_interval(more, samples)
    failed = exceeds(more, samples, _TOLERANCE)
    words = (
        f"On {samples} images the attacks leave {before}, the standard AutoAttack "
        f"{before - more}: {more / samples:.1%} of the images less (95 % interval {low:.1%} to "
        f"{high:.1%})"
    )
    meaning = ": the robust accuracy is overstated; use autoattack." if failed else "."
    return Finding(
        outcome="fail" if failed else "pass", figure=more / samples, sentence=words + meaning
    )


def _fooled(subject: Subject) -> int:
    """How many of the images looked at the attacks fool."""
    return int((subject.attacked & subject.spot).sum())
