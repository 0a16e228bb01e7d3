"""DeepFool: over the nearest boundary, taken for a hyperplane at each step (Moosavi-Dezfooli 2016).

After arXiv 1511.04599: a step ends on the boundary to the nearest of the wrong classes, and the sum
of all steps, not each of them, is lengthened a little so that it crosses. It knows no radius: what
is longer than eps is shortened.
"""

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.oracle import Oracle, lead, likeliest_wrong, widened
from defenses.threat import ThreatModel

__all__ = ["DeepFool"]

_SMALLEST_SLOPE = 1e-12
# Of the width of the bounds, added to each step, as the authors' code does: where bounds cut the
# steps short, their sum would come ever closer to the boundary and never cross it.
_BEYOND = 1e-4


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class DeepFool(Attack):
    """Steps from boundary to boundary until the model is wrong, image by image.

    The first image that fooled the model, or the last, shortened to eps. It draws no random number.

    Attributes:
        steps: At most.
        overshoot: By which share the sum of the steps is lengthened (eta).
        target_classes: How many of the wrong classes are tried, the likeliest.
    """

    name = "deepfool"
    norms = ("linf", "l2")

    steps: int = 50
    overshoot: float = 0.02
    target_classes: int = 9

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        oracle, threat = Oracle(model, images, labels, draws=self.draws), self.threat
        clean = widened(images)
        logits = oracle.logits(clean)
        aims = likeliest_wrong(logits, labels, self.target_classes)
        rows = (logits.argmax(1) == labels).nonzero().flatten()
        found, total = clean.clone(), torch.zeros_like(clean)
        for _ in range(self.steps):
            if len(rows) == 0:
                break
            total[rows] += _onto_nearest(oracle, found[rows], labels[rows], aims[rows], threat)
            longer = (1 + self.overshoot) * total[rows]
            found[rows] = (clean[rows] + longer).clamp(*threat.bounds)
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
