"""Searches that step onto the nearest boundary, taken for a hyperplane: FAB and DeepFool.

FAB, fast adaptive boundary (Croce & Hein 2020, arXiv 1907.02044): the boundary between the label
and a target class, within the bounds, while the search is drawn towards the clean image. Without a
target it is the nearest of those to all wrong classes, at each step anew. What it finds outside of
the ball is no success. Deliberately not here: the final bisection, which the standard has not.

DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599): the sum of all steps, not each of them,
is lengthened a little so that it crosses. What is longer than eps is shortened.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.oracle import Oracle, lead, likeliest_wrong, until_fooled, widened
from defenses.shape import beside
from defenses.threat import ThreatModel

__all__ = ["FAB", "DeepFool", "UntargetedFAB", "step_onto_hyperplane"]

_LARGEST_PULL = 0.1  # alpha_max: towards the clean image
_OVERSHOOT = 1.05  # eta
_WAY_BACK = 0.9  # beta: of the way to the clean image that is kept after a success
_SHORTEST = 1e-8
_FLAT = 1e-12  # a slope without a direction
# Of the width of the bounds, added to each step, as the authors' code does: where bounds cut the
# steps short, their sum would come ever closer to the boundary and never cross it.
_BEYOND = 1e-4
_NEWTON_STEPS = 60  # ten are usual; each passes a bound that a pixel meets


@dataclass(frozen=True, kw_only=True, repr=False)
class _Boundary(Attack):
    """What both have in common: all but which boundary a search heads for, and from where."""

    norms = ("linf", "l2", "l1")

    steps: int = 100

    @abstractmethod
    def _aims(self, others: Tensor) -> Tensor:
        """One number a search, int64, [n, searches], given all wrong classes, [n, classes - 1]."""

    @abstractmethod
    def _begin(self, clean: Tensor, others: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        """From the numbers of one search, [n]: where it begins, and its target classes, [n, k]."""

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        oracle = Oracle(model, images, labels, draws=self.draws)
        clean = widened(images)
        logits = oracle.logits(clean)
        others = likeliest_wrong(logits, labels, logits.shape[1])

        def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
            begin, wanted = self._begin(clean[rows], others[rows], aim)
            batch = begin, clean[rows], labels[rows], wanted
            return _approach(oracle, *batch, self.threat, self.steps)

        standing = logits.argmax(1) == labels
        return until_fooled(clean, standing, self._aims(others), run, at_once=oracle.at_once)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class FAB(_Boundary):
    """FAB-T: a search across the boundary to one wrong class after the other, likeliest first.

    The first image in the ball that fooled the model, else the clean one. It draws no random
    number.

    Attributes:
        steps: Towards each class.
        target_classes: How many classes, at most; a model of fewer has fewer searches.

    Example:
        >>> FAB(ThreatModel(norm="l2", eps=0.5), steps=20)
        FAB(l2 eps=0.5 in [0, 1]; steps=20, target_classes=9)
    """

    name = "fab"

    target_classes: int = 9

    def _aims(self, others: Tensor) -> Tensor:
        return others[:, : self.target_classes]

    def _begin(self, clean: Tensor, others: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        return clean, aim[:, None]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class UntargetedFAB(_Boundary):
    """FAB across the nearest boundary, from the image and then from random points.

    A step takes as many gradients as there are wrong classes. Random points are half of eps away.

    Attributes:
        steps: Of each start.
        restarts: Starts, the first of them the image; AutoAttack-plus takes 5.

    Example:
        >>> UntargetedFAB(ThreatModel(norm="l2", eps=0.5)).settings
        {'steps': 100, 'restarts': 5}
    """

    name = "fab-untargeted"

    restarts: int = 5

    def _aims(self, others: Tensor) -> Tensor:
        return torch.arange(self.restarts, device=others.device).expand(len(others), -1)

    def _begin(self, clean: Tensor, others: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        again = beside(aim > 0, clean)
        return torch.where(again, _halfway(clean, self.threat), clean), others


def _halfway(clean: Tensor, threat: ThreatModel) -> Tensor:
    """Random points at half of eps from the clean images, within the bounds."""
    noise = torch.rand_like(clean) * 2 - 1 if threat.norm == "linf" else torch.randn_like(clean)
    share = 0.5 * threat.eps / _length(noise, threat)
    return (clean + beside(share, clean) * noise).clamp(*threat.bounds)


def _approach(
    oracle: Oracle,
    begin: Tensor,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One search towards the nearest of the targets, [n, k]: its images, and which of them won."""
    found = clean.clone()
    over = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    rows, point = torch.arange(len(clean), device=clean.device), begin
    for _ in range(steps):
        point = _step(oracle, point, clean, labels, targets, threat)
        wrong = oracle.logits(point).argmax(1) != labels
        won = wrong & threat.contains(clean, point)
        if won.any():
            found[rows[won]], over[rows[won]] = point[won], True
            rows, point, clean, labels, targets, wrong = (
                each[~won] for each in (rows, point, clean, labels, targets, wrong)
            )
            if len(rows) == 0:
                break
        kept = 1 - (1 - _WAY_BACK) * wrong.to(point.dtype)
        point = clean.lerp(point, beside(kept, clean))
    return found, over


def _step(
    oracle: Oracle,
    point: Tensor,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    threat: ThreatModel,
) -> Tensor:
    """Onto the boundary as it looks from the point, and a little towards the clean image."""
    value, normal = _nearest_boundary(oracle, point, labels, targets, threat)
    height = value + (normal * (clean - point)).flatten(1).sum(1)  # of the clean image
    across, across_from_clean = step_onto_hyperplane(
        torch.cat([point, clean]), torch.cat([normal, normal]), torch.cat([value, height]), threat
    ).chunk(2)
    near, far = _length(across, threat), _length(across_from_clean, threat)
    pull = beside((near / (near + far)).clamp_max(_LARGEST_PULL), point)
    ahead = point + _OVERSHOOT * across
    return ahead.lerp(clean + _OVERSHOOT * across_from_clean, pull).clamp(*threat.bounds)


def _nearest_boundary(
    oracle: Oracle, point: Tensor, labels: Tensor, targets: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """Of the hyperplanes that the boundaries look like, the nearest: its height and normal."""
    dual = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[threat.norm]
    value, normal = point.new_zeros(len(point)), torch.zeros_like(point)
    nearest = torch.full_like(value, torch.inf)
    for aim in targets.unbind(1):
        _, height, slope = oracle.gradient(point, partial(lead, labels=labels, targets=aim))
        if targets.shape[1] == 1:
            return height, slope
        length = torch.linalg.vector_norm(slope.flatten(1), ord=dual, dim=1)
        distance = height.abs() / (length + _FLAT)
        nearer = distance < nearest
        nearest, value = torch.where(nearer, distance, nearest), torch.where(nearer, height, value)
        normal = torch.where(beside(nearer, normal), slope, normal)
    return value, normal


def step_onto_hyperplane(
    points: Tensor, normals: Tensor, heights: Tensor, threat: ThreatModel
) -> Tensor:
    """The shortest change that brings each point onto its hyperplane, within the bounds.

    A pixel moves against its share of the normal until it meets a bound. In linf and l2 all move
    together: what that gains is a piecewise linear, concave function of how far, so that Newton's
    method from 0 finds its solution in a few steps, without the sort that the paper uses. In l1
    they move one after the other, those of the largest shares first.

    Heights over the hyperplanes are times the length of the normals, [n]. Where a hyperplane does
    not meet the bounds, the change comes nearest to it.
    """
    # Arithmetic in place of masks: selecting by a mask is thirty times as slow on a CPU.
    downhill = normals.flatten(1) * -heights.sign()[:, None]
    way, weight, height = downhill.sign(), downhill.abs(), heights.abs()
    middle, half = sum(threat.bounds) / 2, threat.width / 2
    room = (half * way.abs() + way * (middle - points.flatten(1))).clamp_min(0)
    if threat.norm == "l1":
        return (way * _one_by_one(weight, room, height)).view_as(points)
    speed = way.abs() if threat.norm == "linf" else weight
    pull, reach = weight * speed, torch.zeros_like(height)
    for _ in range(_NEWTON_STEPS):
        path = reach[:, None] * speed
        missing = height - torch.linalg.vecdot(weight, torch.minimum(path, room))
        slope = torch.linalg.vecdot(pull, (room - path).sign().clamp_min(0))
        further = reach + (missing / slope).nan_to_num(0, 0, 0).clamp_min(0)
        if torch.equal(further, reach):
            break
        reach = further
    return (way * torch.minimum(reach[:, None] * speed, room)).view_as(points)


def _one_by_one(weight: Tensor, room: Tensor, height: Tensor) -> Tensor:
    """How far each pixel moves, [n, pixels], when the heaviest goes first and as far as it can."""
    order = weight.argsort(dim=1, descending=True)
    heavy, far = weight.gather(1, order), room.gather(1, order)
    gain = heavy * far
    missing = (height[:, None] - gain.cumsum(1) + gain).clamp_min(0)
    moved = torch.minimum((missing / heavy).nan_to_num(0), far)
    return torch.zeros_like(weight).scatter(1, order, moved)


def _length(change: Tensor, threat: ThreatModel) -> Tensor:
    """Of each row in the norm, never 0."""
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[threat.norm]
    length: Tensor = torch.linalg.vector_norm(change.flatten(1), ord=order, dim=1)
    return length.clamp_min(_SHORTEST)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class DeepFool(Attack):
    """Steps from boundary to boundary until the model is wrong, image by image.

    The first image that fooled the model, or the last, shortened to eps. It draws no random number.

    Attributes:
        steps: At most.
        overshoot: By which share the sum of the steps is lengthened (eta).
        target_classes: How many of the wrong classes are tried, the likeliest.

    Example:
        >>> DeepFool(ThreatModel(norm="l2", eps=0.5)).settings
        {'steps': 50, 'overshoot': 0.02, 'target_classes': 9}
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
    nearest = point.new_full(point.shape[:1], torch.inf)
    step = torch.zeros_like(point)
    for aim in aims.unbind(1):
        _, height, normal = oracle.gradient(point, partial(lead, labels=labels, targets=aim))
        flat = normal.flatten(1)
        # The distance in a norm is the height over the dual norm of the slope.
        slope = flat.norm(p=1 if threat.norm == "linf" else 2, dim=1)
        distance = height.abs() / slope.clamp_min(_FLAT)
        way = flat.sign() if threat.norm == "linf" else flat / slope.clamp_min(_FLAT)[:, None]
        nearer = (slope > 0) & (distance < nearest)
        nearest = torch.where(nearer, distance, nearest)
        ahead = ((distance + _BEYOND * threat.width)[:, None] * way).view_as(point)
        step = torch.where(beside(nearer, step), ahead, step)
    return step
