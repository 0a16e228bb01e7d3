"""Checks that compare attacks: signs that gradients lead them astray, or that others find more.

Where gradients are honest, more information or more work finds more: the signs of gradient masking
are from Athalye et al. (2018, arXiv 1802.00420) and Carlini et al. (2019, arXiv 1902.06705). A
robust accuracy is an upper bound, and how loose it is can be measured on some of the images: by the
standard AutoAttack (Croce & Hein 2020, arXiv 2003.01690), and by the same attacks on logits that a
factor makes too small or too large for a cross-entropy.
"""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.autoattack import ensemble
from defenses.attacks.by_name import attack
from defenses.checks.soundness import random_points
from defenses.checks.subject import Subject
from defenses.measuring.counting import exceeds, outnumbers, wilson_interval
from defenses.measuring.verdict import CurvePoint, Finding
from defenses.threat import ThreatModel

__all__ = [
    "Rescaled",
    "accuracy_falls",
    "black_box_does_not_beat_white_box",
    "iterative_beats_single_step",
    "noise_is_weaker",
    "radii",
    "rescaled_logits_change_nothing",
    "single_step_is_a_fair_guide",
    "standard_finds_little_more",
    "transfer_does_not_beat_white_box",
    "twice_the_steps_change_little",
]

_TOLERANCE = 0.01  # of the images: what should be none, or what more steps may still find
_MORE = 0.02  # what the standard, or a factor on the logits, may find beyond the attacks
_FACTORS = (0.02, 50.0)
_FAIR = 0.5  # of what many steps find; see `single_step_is_a_fair_guide`
_SHORTER = (0.25, 0.5)  # of eps: where the loss is bent, a shorter step fools more
_ABOUT_ZERO = 0.02  # what may be left where every image is allowed
_CURVE_POINTS = 4
_NOTHING = "No image is classified correctly"


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


def iterative_beats_single_step(subject: Subject) -> Finding:
    """Fails where one step fools what many steps do not, more than the other way round."""
    more, fewer = _discordant(subject.stepped, subject.iterated)
    return _compared(
        subject,
        outnumbers(more, fewer),
        (fewer - more) / max(1, subject.count),
        f"{subject.settings.steps} steps fool {_of(subject.iterated, subject)}, a single one "
        f"{_count(subject.stepped)}",
        "the iterations get stuck where one step gets through",
    )


def single_step_is_a_fair_guide(subject: Subject) -> Finding:
    """Fails where a single step misses most of what is there, or a fraction of it finds more.

    Models trained on single steps fail it once they collapse (catastrophic overfitting; Wong et
    al. 2020, arXiv 2001.03994). So may an undefended one whose loss is strongly curved within
    the ball: the check tells that single steps overstate the robustness, not why.

    "Most" is half, a choice and no counting noise: PGD-trained nets on Fashion-MNIST had 0.74 or
    more, collapsed ones 0.35 or less, barely collapsed ones lie between.
    """
    whole, many = subject.stepped, subject.iterated
    parts = [subject.fooled_by(subject.single_step(share)) for share in _SHORTER]
    best = max(parts, key=_count)
    shared, found = _count(whole & many), _count(many)
    bent = outnumbers(*_discordant(best, whole))
    blind = found > 0 and wilson_interval(shared, found)[1] < _FAIR
    return _compared(
        subject,
        bent or blind,
        shared / found if found else 1.0,
        f"A single step fools {shared} of the {found} images that {subject.settings.steps} steps "
        f"fool; it fools {_count(whole)} in all, and a shorter one {_count(best)}",
        "single steps overstate the robustness, as after training on them",
    )


def twice_the_steps_change_little(subject: Subject) -> Finding:
    """Fails where twice the steps fool over 1 % of the images more, beyond chance."""
    more, fewer = _discordant(subject.iterated_longer, subject.iterated)
    gain = (more - fewer) / max(1, subject.count)
    return _compared(
        subject,
        gain > _TOLERANCE and outnumbers(more, fewer),
        gain,
        f"{subject.settings.steps} steps fool {_of(subject.iterated, subject)}, twice as many "
        f"{_count(subject.iterated_longer)}",
        "the attack has not converged; give it more steps",
    )


def accuracy_falls(subject: Subject) -> Finding:
    """Fails where a larger ball protects, or the largest, which holds every image, does not fall.

    The last radius admits any image in the bounds, so that every correct image can be fooled.
    """
    if subject.count == 0:
        return Finding.not_checked(_NOTHING)
    curve = [CurvePoint(eps=0.0, correct=subject.count, samples=len(subject.images))]
    before = torch.zeros_like(subject.right)
    rising: list[float] = []
    every = radii(subject.threat, subject.images[0])
    for eps in every:
        fooled = _at_radius(subject, eps)
        if outnumbers(*_discordant(before, fooled), level=0.01 / len(every)):
            rising.append(eps)
        curve.append(replace(curve[0], eps=eps, correct=subject.count - _count(fooled)))
        before = fooled
    last = curve[-1]
    found, meaning = f"Accuracy falls from {curve[0].accuracy:.1%} to {last.accuracy:.1%}", ""
    if rising:
        meaning = f", but rises on the way to eps {', '.join(f'{eps:g}' for eps in rising)}"
    elif exceeds(last.correct, last.samples, _ABOUT_ZERO):
        meaning = ", where any image is allowed: the attack does not find what is there"
    return Finding(
        outcome="fail" if meaning else "pass",
        figure=last.accuracy,
        sentence=f"{found} at eps {last.eps:g}{meaning}.",
        curve=tuple(curve),
    )


def noise_is_weaker(subject: Subject) -> Finding:
    """Fails where random noise of the same size fools what the gradient does not.

    One draw is compared with a single gradient step; in l1, where there is none, with many.
    """
    if subject.threat.norm == "l0":
        return Finding.not_checked("Only for linf, l2 and l1")
    stepwise = subject.threat.norm != "l1"
    guided = subject.stepped if stepwise else subject.iterated
    words = "a single gradient step" if stepwise else f"{subject.settings.steps} gradient steps"
    generator = torch.Generator().manual_seed(subject.seed)
    once = _fooled_by_noise(subject, generator)
    any_draw = once.clone()
    for _ in range(subject.settings.draws - 1):
        any_draw |= _fooled_by_noise(subject, generator)
    missed = _count(subject.missed_by_gradient(any_draw))
    return _compared(
        subject,
        outnumbers(*_discordant(once, guided)) or exceeds(missed, subject.count, _TOLERANCE),
        missed / max(1, subject.count),
        f"One draw of noise fools {_of(once, subject)}, {words} "
        f"{_count(guided)}; {subject.settings.draws} draws fool {missed} that no "
        "gradient attack does",
        "the gradient is a worse guide than chance",
    )


def black_box_does_not_beat_white_box(subject: Subject) -> Finding:
    """Fails where an attack that sees no gradient fools what survived the gradient."""
    search = attack("square", subject.threat, queries=subject.settings.queries)
    words = f"{subject.settings.queries} queries of the square attack"
    return _beyond_white_box(subject, subject.fooled_by(search, among=~subject.white_box), words)


def transfer_does_not_beat_white_box(subject: Subject) -> Finding:
    """Fails where what fools a surrogate fools the model too, and its own gradient did not."""
    surrogate = subject.settings.surrogate
    if surrogate is None:
        return Finding.not_checked("No surrogate model was given")
    search = subject.iterative(subject.threat, subject.settings.steps)
    found = subject.fooled_by(search, among=~subject.white_box, seen_by=surrogate)
    return _beyond_white_box(subject, found, "adversarial images of the surrogate")


def rescaled_logits_change_nothing(subject: Subject) -> Finding:
    """Fails where the evaluation's attacks fool over 2 % more when the logits are multiplied.

    A factor changes no class, so it may change no attack. Where it does, the loss of the attacks
    vanishes or is blunt at the scale that the model has.
    """
    looked, left = subject.spot, subject.spot & ~subject.attacked
    if not bool(subject.right[looked].any()):
        return Finding.not_checked(_NOTHING)
    more = {}
    for factor in _FACTORS:
        seen = Rescaled(subject.model, factor)
        found = torch.zeros_like(left)
        for each in subject.attacks:
            found |= subject.fooled_by(each, among=left & ~found, seen_by=seen)
        more[factor] = int(found.sum())
    factor, count = max(more.items(), key=lambda item: item[1])
    samples, attacked = int(looked.sum()), int((subject.attacked & looked).sum())
    words = (
        f"On {samples} images the attacks fool {attacked}; with the logits multiplied by "
        f"{' and by '.join(f'{each:g}' for each in _FACTORS)} they fool up to {count} more"
    )
    if not exceeds(count, samples, _MORE):
        return Finding.passed(words, count / samples)
    return Finding.failed(
        f"{words} (by {factor:g})",
        "their loss depends on the scale of the logits; use the default attacks or autoattack",
        count / samples,
    )


def standard_finds_little_more(subject: Subject) -> Finding:
    """Fails where the standard AutoAttack fools over 2 % of the images more, beyond chance."""
    if subject.threat.norm == "l0":
        return Finding.not_checked("There is no standard in l0")
    standard = ensemble(subject.threat)
    if set(map(repr, standard)) <= set(map(repr, subject.attacks)):
        return Finding.passed("The attacks are the standard's", 0.0)
    looked, left = subject.spot, subject.spot & subject.right & ~subject.attacked
    if not bool(subject.right[looked].any()):
        return Finding.not_checked(_NOTHING)
    before, samples = int(left.sum()), int(looked.sum())
    for each in standard:
        left &= ~subject.fooled_by(each, among=left)
    more = before - int(left.sum())
    low, high = wilson_interval(more, samples)
    words = (
        f"On {samples} images the attacks leave {before}, the standard AutoAttack "
        f"{before - more}: {more / samples:.1%} of the images less (95 % interval {low:.1%} to "
        f"{high:.1%})"
    )
    if not exceeds(more, samples, _MORE):
        return Finding.passed(words, more / samples)
    meaning = "the robust accuracy is overstated; use autoattack"
    return Finding.failed(words, meaning, more / samples)


def radii(threat: ThreatModel, image: Tensor) -> tuple[float, ...]:
    """Half of eps, eps, and from there in equal ratios to the radius that admits every image."""
    pixels, positions = image.numel(), image[0].numel()
    largest = {
        "linf": threat.width,
        "l2": threat.width * pixels**0.5,
        "l1": threat.width * pixels,
        "l0": positions,
    }[threat.norm]
    ratio = (largest / threat.eps) ** (1 / _CURVE_POINTS)
    found = [threat.eps / 2, *(threat.eps * ratio**k for k in range(_CURVE_POINTS)), largest]
    if threat.norm == "l0":
        found = [max(1, round(eps)) for eps in found]
    return tuple(sorted({float(eps) for eps in found if eps <= largest}))


def _at_radius(subject: Subject, eps: float) -> Tensor:
    if eps == subject.threat.eps:
        return subject.iterated
    threat = replace(subject.threat, eps=eps)
    return subject.fooled_by(subject.iterative(threat, subject.settings.steps))


def _fooled_by_noise(subject: Subject, generator: torch.Generator) -> Tensor:
    """What one draw of noise on the edge of the ball fools, [n]."""
    noisy = random_points(subject.images, subject.threat, generator)
    return subject.right & subject.mistaken(noisy, slice(None), "noise")


def _beyond_white_box(subject: Subject, found: Tensor, words: str) -> Finding:
    """Judges an attack that should find nothing after the gradient's."""
    beyond = _count(subject.missed_by_gradient(found))
    left = _count(subject.right & ~subject.white_box)
    return _compared(
        subject,
        exceeds(beyond, subject.count, _TOLERANCE),
        beyond / max(1, subject.count),
        f"Of {left} images that survive the gradient, {words} fool {_count(found)}, {beyond} of "
        "which no gradient attack finds",
        "the gradient hides what can be found without it",
    )


def _compared(subject: Subject, failed: bool, figure: float, found: str, meaning: str) -> Finding:
    """A finding with its sentence; nothing can be compared where no image is right."""
    if subject.count == 0:
        return Finding.not_checked(_NOTHING)
    return Finding.failed(found, meaning, figure) if failed else Finding.passed(found, figure)


def _discordant(one: Tensor, other: Tensor) -> tuple[int, int]:
    """How many only the first fools, and how many only the second."""
    return _count(one & ~other), _count(other & ~one)


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _of(mask: Tensor, subject: Subject) -> str:
    return f"{_count(mask)} of {subject.count} images"
