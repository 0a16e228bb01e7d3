"""DeepFool: over the nearest boundary, taken for a hyperplane at each step (Moosavi-Dezfooli 2016).

After arXiv 1511.04599: a step ends on the boundary to the nearest of the wrong classes, and the sum
of all steps, not each of them, is lengthened a little so that it crosses. It knows no radius: what
is longer than eps is shortened.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from defenses.attacks.dlr import lead, likeliest_wrong
from defenses.attacks.oracle import Oracle
from defenses.attacks.settings import Setting, settled
from defenses.threat import ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = ["search", "settle"]

_SMALLEST_SLOPE = 1e-12
# Of the width of the bounds, added to each step, as the authors' code does: where bounds cut the
# steps short, their sum would come ever closer to the boundary and never cross it.
_BEYOND = 1e-4


def settle(threat: ThreatModel, given: Mapping[str, Setting]) -> tuple[dict[str, Setting], float]:
    """DeepFool's settings, the paper's unless given, and its reach once it is shortened.

    `overshoot` (eta) lengthens the sum of the steps; of the wrong classes the `target_classes`
    likeliest are tried.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    defaults: dict[str, Setting] = {"steps": 50, "overshoot": 0.02, "target_classes": 9}
    return settled("deepfool", given, defaults), threat.eps


def search(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Steps from boundary to boundary until the model is wrong, image by image.

    It draws no random number; to be called within an `attack_scope`.

    Returns:
        The first image that fooled the model, or the last, shortened to eps, in at least float32,
        [n, ...]. Where the model is wrong already, the clean image.

    Raises:
        AttackError: The model cannot be searched.
    """
    oracle, threat = Oracle(model, images, labels, draws=attack.draws), attack.threat
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    logits = oracle.logits(clean)
    aims = likeliest_wrong(logits, labels, int(attack.settings["target_classes"]))
    rows = (logits.argmax(1) == labels).nonzero().flatten()
    found, total = clean.clone(), torch.zeros_like(clean)
    stretch = 1 + float(attack.settings["overshoot"])
    for _ in range(int(attack.settings["steps"])):
        if len(rows) == 0:
            break
        total[rows] += _onto_nearest(oracle, found[rows], labels[rows], aims[rows], threat)
        found[rows] = (clean[rows] + stretch * total[rows]).clamp(*threat.bounds)
        rows = rows[oracle.logits(found[rows]).argmax(1) == labels[rows]]
    return threat.project(clean, found)


def _onto_nearest(
    oracle: Oracle, point: Tensor, labels: Tensor, aims: Tensor, threat: ThreatModel
) -> Tensor:
    """The shortest step onto the nearest of the boundaries, each taken for a hyperplane."""
    nearest = torch.full_like(point[:, 0, 0, 0], torch.inf)
    step = torch.zeros_like(point)
    for aim in aims.unbind(1):
        _, height, normal = oracle.gradient(point, partial(lead, labels=labels, targets=aim))
        flat = normal.flatten(1)
        # The distance in a norm is the height over the dual norm of the slope.
        slope = flat.norm(p=1 if threat.norm == "linf" else 2, dim=1)
        distance = height.abs() / slope.clamp_min(_SMALLEST_SLOPE)
        way = (
            flat.sign()
            if threat.norm == "linf"
            else flat / slope.clamp_min(_SMALLEST_SLOPE)[:, None]
        )
        nearer = (slope > 0) & (distance < nearest)
        nearest = torch.where(nearer, distance, nearest)
        ahead = ((distance + _BEYOND * threat.width)[:, None] * way).view_as(point)
        step = torch.where(nearer.view(-1, 1, 1, 1), ahead, step)
    return step
