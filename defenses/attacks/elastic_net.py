"""EAD, the elastic-net attack (Chen et al. 2018, arXiv 1709.04114): sparse changes, for l1 balls.

Squared l2 length + beta times l1 length + c times the margin, by FISTA. `eadl1` keeps what is
shortest in l1, `eaden` what is shortest in the elastic-net distance.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from defenses.attacks._victim import Victim, pixels_of, unit_images
from defenses.attacks.expectation import mean_of
from defenses.attacks.settings import Setting, settled
from defenses.attacks.shortest import margin, shortest_change
from defenses.threat import ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = ["search_elastic_net", "search_l1", "settle_elastic_net", "settle_l1"]

_DEFAULTS: Mapping[str, Setting] = {
    "kappa": 0.0,
    "lr": 0.01,
    "binary_search_steps": 9,
    "max_iterations": 100,
    "initial_const": 0.001,
    "beta": 0.01,  # 0.001, as published for EAD, fools 9 of 60 digits fewer in an l1 ball
}


def settle_l1(
    threat: ThreatModel, given: Mapping[str, Setting]
) -> tuple[dict[str, Setting], float]:
    """All settings of `eadl1`, and how far it reaches once it is shortened.

    Raises:
        AttackError: A setting that there is not, or a value that cannot be.
    """
    return settled("eadl1", given, _DEFAULTS), threat.eps


def settle_elastic_net(
    threat: ThreatModel, given: Mapping[str, Setting]
) -> tuple[dict[str, Setting], float]:
    """All settings of `eaden`, and how far it reaches once it is shortened.

    Raises:
        AttackError: A setting that there is not, or a value that cannot be.
    """
    return settled("eaden", given, _DEFAULTS), threat.eps


def search_l1(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Looks for the change that is shortest in l1, and shortens it to eps where it is longer.

    Each image has its own constant and runs all its steps, so the result does not depend on the
    rest of the batch. To be called within an `attack_scope`.

    Raises:
        AttackError: The model's logits are unusable.
    """
    return _search(attack, model, images, labels, targets, _l1_length)


def search_elastic_net(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """As `search_l1`, but keeps what is shortest in squared l2 length + beta times l1 length.

    Raises:
        AttackError: The model's logits are unusable.
    """
    beta = float(attack.settings["beta"])

    def length(change: Tensor) -> Tensor:
        return change.square().sum(dim=1) + beta * _l1_length(change)

    return _search(attack, model, images, labels, targets, length)


def _l1_length(change: Tensor) -> Tensor:
    """The sum of a change, [n]."""
    return change.abs().sum(dim=1)


def _search(
    attack: "Attack",
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    length: Callable[[Tensor], Tensor],
) -> Tensor:
    """The shortest change by this length, shortened into the ball."""
    settings, threat = attack.settings, attack.threat
    classes, targeted = (labels, False) if targets is None else (targets, True)
    clean = unit_images(images, threat)
    victim = Victim(
        mean_of(model, attack.draws),
        threat,
        images=images,
        largest_class=int(torch.maximum(labels, classes).max()),
    )

    def resistance(unit: Tensor) -> Tensor:
        return margin(victim(unit), classes, targeted=targeted)

    def descend(c: Tensor) -> tuple[Tensor, Tensor]:
        return _descend(resistance, clean, c, length, settings)

    found = shortest_change(
        descend,
        clean,
        constant=float(settings["initial_const"]),
        tries=int(settings["binary_search_steps"]),
    )
    return threat.project(images, pixels_of(found, threat).to(images.dtype))


def _descend(
    resistance: Callable[[Tensor], Tensor],
    clean: Tensor,
    c: Tensor,
    length: Callable[[Tensor], Tensor],
    settings: Mapping[str, Setting],
) -> tuple[Tensor, Tensor]:
    """FISTA: a gradient step on the smooth part, shrinkage towards the clean image, momentum."""
    best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
    steps, beta = int(settings["max_iterations"]), float(settings["beta"])
    kappa, last, ahead = float(settings["kappa"]), clean, clean
    for step in range(steps):
        ahead = ahead.detach().requires_grad_()
        loss = c * (resistance(ahead) + kappa).relu() + (ahead - clean).square().flatten(1).sum(
            dim=1
        )
        (gradient,) = torch.autograd.grad(loss.sum(), ahead)
        rate = float(settings["lr"]) * (1 - step / steps) ** 0.5
        change = ahead.detach() - rate * gradient - clean
        change = change.sign() * (change.abs() - beta).relu()
        current = (clean + change).clamp(0, 1)
        with torch.no_grad():
            held = resistance(current)
        measured = length((current - clean).flatten(1))
        shorter = (held < 0) & (held <= -kappa) & (measured < best_length)
        best[shorter], best_length[shorter] = current[shorter], measured[shorter]
        ahead = (current + (step + 1) / (step + 4) * (current - last)).clamp(0, 1)
        last = current
    return best, best_length
