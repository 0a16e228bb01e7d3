"""PGD and its single-step relatives, as rows for the table of attacks.

Each is a start, a number of steps and a length of step for `projected_gradient` on the
cross-entropy. With the same start, images and seed the results are torchattacks'.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.adaptive import Loss, by_example
from defenses.attacks.projected_gradient import projected_gradient, random_start
from defenses.attacks.settings import Setting, check_settings
from defenses.errors import AttackError
from defenses.threat import ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = [
    "search_ffgsm",
    "search_fgsm",
    "search_n_fgsm",
    "search_pgd",
    "settle_ffgsm",
    "settle_fgsm",
    "settle_n_fgsm",
    "settle_pgd",
]

_Settled = tuple[dict[str, Setting], float]

_STEPS = 100  # of the evaluation; training takes 10


def settle_pgd(threat: ThreatModel, given: Mapping[str, Setting]) -> _Settled:
    """PGD's settings (Madry et al. 2018, arXiv 1706.06083) and its reach.

    The step is 2.5 eps / steps unless given; `early_stop` leaves an image alone once it is fooled.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    defaults: dict[str, Setting] = {
        "step_size": threat.eps,
        "steps": _STEPS,
        "random_start": True,
        "early_stop": False,
    }
    check_settings("pgd", given, defaults)
    settled = defaults | dict(given)
    if "step_size" not in given:
        settled["step_size"] = 2.5 * threat.eps / int(settled["steps"])
    return settled, threat.eps


def search_pgd(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Many steps, from a random point or from the image."""
    settings, threat = attack.settings, attack.threat
    if settings["early_stop"] and targets is not None:
        raise AttackError("pgd: early_stop ends at any wrong class; leave it out with targets")
    begin = random_start(images, threat, reach=threat.eps) if settings["random_start"] else images
    return projected_gradient(
        model,
        images,
        threat,
        _rise_or_fall(attack, targets),
        labels if targets is None else targets,
        start=begin,
        steps=int(settings["steps"]),
        step_size=float(settings["step_size"]),
        draws=attack.draws,
        until_fooled=bool(settings["early_stop"]),
    )


def settle_fgsm(threat: ThreatModel, given: Mapping[str, Setting]) -> _Settled:
    """FGSM (Goodfellow et al. 2015, arXiv 1412.6572) has no settings: one step of eps.

    Raises:
        AttackError: A setting was given.
    """
    check_settings("fgsm", given, {})
    return {}, threat.eps


def search_fgsm(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """One step from the image."""
    return _one_step(attack, model, images, labels, targets, attack.threat, images)


def settle_ffgsm(threat: ThreatModel, given: Mapping[str, Setting]) -> _Settled:
    """FGSM-RS's settings (Wong et al. 2020, arXiv 2001.03994) and its reach.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    defaults: dict[str, Setting] = {"step_size": 1.25 * threat.eps}
    check_settings("ffgsm", given, defaults)
    return defaults | dict(given), threat.eps


def search_ffgsm(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """One step from a random point of the ball, back into the ball."""
    begin = random_start(images, attack.threat, reach=attack.threat.eps)
    return _one_step(attack, model, images, labels, targets, attack.threat, begin)


def settle_n_fgsm(threat: ThreatModel, given: Mapping[str, Setting]) -> _Settled:
    """N-FGSM's settings (de Jorge et al. 2022, arXiv 2202.01181) and its reach.

    Noise and step are never clipped to the ball: it reaches further than eps.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    settled: dict[str, Setting] = {"noise": 2.0, "step_size": threat.eps}
    check_settings("n-fgsm", given, settled)
    settled |= given
    return settled, float(settled["noise"]) * threat.eps + float(settled["step_size"])


def search_n_fgsm(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """One step from a point with strong uniform noise, clipped to the bounds only."""
    threat = attack.threat
    begin = random_start(images, threat, reach=float(attack.settings["noise"]) * threat.eps)
    reached = replace(threat, eps=min(attack.radius, threat.width))
    return _one_step(attack, model, images, labels, targets, reached, begin)


def _one_step(
    attack: "Attack",
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    threat: ThreatModel,
    begin: Tensor,
) -> Tensor:
    """One step of the attack's `step_size`, or of eps where it has none."""
    return projected_gradient(
        model,
        images,
        threat,
        _rise if targets is None else _fall,
        labels if targets is None else targets,
        start=begin,
        steps=1,
        step_size=float(attack.settings.get("step_size", attack.threat.eps)),
        draws=attack.draws,
    )


def _rise_or_fall(attack: "Attack", targets: Tensor | None) -> Loss:
    """Away from the labels or towards the targets, by the attack's own loss if it has one."""
    if attack.loss is None:
        return _rise if targets is None else _fall
    own = by_example(attack.loss)
    return own if targets is None else lambda logits, classes: -own(logits, classes)


def _rise(logits: Tensor, labels: Tensor) -> Tensor:
    """Away from the labels; the sum, so that no image's gradient depends on how many there are."""
    return F.cross_entropy(logits, labels, reduction="sum")


def _fall(logits: Tensor, targets: Tensor) -> Tensor:
    """Towards the targets."""
    return -F.cross_entropy(logits, targets, reduction="sum")
