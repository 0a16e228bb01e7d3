"""The attack of Carlini & Wagner (2017, arXiv 1608.04644) in l2, for any image.

As published, pixels are tanh of a free variable, and a pixel on a bound is at infinity: it never
moves, and on digits most pixels are there. Here a pixel is the sine of its variable: a bound is at
a finite distance, and a step leaves it.
"""

import math
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

__all__ = ["search", "settle"]

# A variable begins this far from where the sine is flat: 5e-5 of half the range of a pixel.
_OFF_THE_BOUND = 0.01
_DEFAULTS: Mapping[str, Setting] = {
    "c": 1.0,
    "kappa": 0.0,
    "steps": 100,
    "lr": 0.1,
    "binary_search_steps": 5,
}


def settle(threat: ThreatModel, given: Mapping[str, Setting]) -> tuple[dict[str, Setting], float]:
    """All settings, and how far the attack reaches once it is shortened.

    Raises:
        AttackError: A setting that there is not, or a value that cannot be.
    """
    return settled("cw", given, _DEFAULTS), threat.eps


def search(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Looks for the shortest change that fools, and shortens it to eps where it is longer.

    Each image has its own constant and stops on its own, so the result does not depend on the rest
    of the batch. To be called within an `attack_scope`.

    Raises:
        AttackError: The model's logits are unusable.
    """
    settings, threat = attack.settings, attack.threat
    classes, targeted = (labels, False) if targets is None else (targets, True)
    clean = unit_images(images, threat)
    victim = Victim(
        mean_of(model, attack.draws),
        threat,
        images=images,
        largest_class=int(torch.maximum(labels, classes).max()),
    )

    def resistance(rows: Tensor, unit: Tensor) -> Tensor:
        return margin(victim(unit), classes[rows], targeted=targeted)

    def descend(c: Tensor) -> tuple[Tensor, Tensor]:
        return _descend(resistance, clean, c, settings)

    found = shortest_change(
        descend,
        clean,
        constant=float(settings["c"]),
        tries=int(settings["binary_search_steps"]),
    )
    return threat.project(images, pixels_of(found, threat).to(images.dtype))


def _descend(
    resistance: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    c: Tensor,
    settings: Mapping[str, Setting],
) -> tuple[Tensor, Tensor]:
    """Adam on squared length + c times the margin; a row whose loss no longer falls leaves."""
    steps, kappa = int(settings["steps"]), float(settings["kappa"])
    best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
    edge = math.cos(_OFF_THE_BOUND)
    rows = torch.arange(len(clean), device=clean.device)
    variable = torch.asin((2 * clean - 1).clamp(-edge, edge))
    first, second = torch.zeros_like(clean), torch.zeros_like(clean)
    before = best_length.clone()
    for step in range(1, steps + 1):
        unit = (torch.sin(variable.requires_grad_()) + 1) / 2
        length = (unit - clean[rows]).square().flatten(1).sum(dim=1)
        held = resistance(rows, unit)
        loss = length + c[rows] * (held + kappa).relu()
        (gradient,) = torch.autograd.grad(loss.sum(), variable)
        unit, length, held, variable = (each.detach() for each in (unit, length, held, variable))
        shorter = (held < 0) & (held <= -kappa) & (length < best_length[rows])
        best[rows[shorter]], best_length[rows[shorter]] = unit[shorter], length[shorter]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        rate = float(settings["lr"]) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        variable = variable - rate * first / (second.sqrt() + 1e-8)
        if step % max(steps // 10, 1) == 0:
            falling = loss.detach() < 0.9999 * before
            rows, variable, first, second = (
                each[falling] for each in (rows, variable, first, second)
            )
            before = loss.detach()[falling]
            if len(rows) == 0:
                break
    return best, best_length
