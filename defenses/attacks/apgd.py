"""Auto-PGD: projected gradient ascent that finds its own step size (Croce & Hein 2020).

After arXiv 2003.01690: momentum, and checkpoints at which a search that stalls goes back to its
best image and halves its step. An image that is fooled leaves at once: its verdict is known. In l1
the steps are others (`apgd_l1`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.adaptive import by_example
from defenses.attacks.apgd_l1 import ascend_sparsely
from defenses.attacks.climb import Climb, PerRow
from defenses.attacks.dlr import dlr, likeliest_wrong, scaled_cross_entropy, targeted_dlr
from defenses.attacks.oracle import Oracle, until_fooled
from defenses.attacks.settings import Setting, settled
from defenses.errors import AttackError
from defenses.threat import ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Attack

__all__ = ["search", "search_targets", "settle", "settle_targets"]

_MOMENTUM = 0.75  # alpha in the paper
_RISING = 0.75  # rho: the share of steps that must rise for the step to stay as long as it is
_TINY = 1e-12
_LOSSES = ("ce", "scaled-ce", "dlr")


def settle(threat: ThreatModel, given: Mapping[str, Setting]) -> tuple[dict[str, Setting], float]:
    """APGD's settings, the standard's unless given, and its reach.

    The loss is `"ce"` (cross-entropy), `"scaled-ce"` (of logits brought to one range, which no
    factor on them changes) or `"dlr"` (difference of logits ratio). In l1 five restarts are
    standard.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    restarts = 5 if threat.norm == "l1" else 1
    defaults: dict[str, Setting] = {"steps": 100, "loss": "ce", "restarts": restarts}
    return settled("apgd", given, defaults, {"loss": _LOSSES}), threat.eps


def search(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """Searches for images that are misclassified, or taken for their targets.

    To be called within an `attack_scope`.

    Returns:
        The first image that fooled the model, else the one of highest loss in the last restart,
        in at least float32, [n, ...]. Where the model is wrong already, the clean image.

    Raises:
        AttackError: The model cannot be searched, or has too few classes for the loss.
    """
    wanted, won = (labels, _is_wrong) if targets is None else (targets, _is_target)
    oracle = Oracle(model, images, torch.maximum(labels, wanted), draws=attack.draws)
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    logits, steps = oracle.logits(clean), int(attack.settings["steps"])
    loss = _loss(attack, logits.shape[1], targeted=targets is not None)

    def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        return _ascend(oracle, clean[rows], labels[rows], aim, attack.threat, loss, won, steps)

    every = torch.arange(len(clean), device=clean.device)
    aims = wanted[:, None].expand(-1, int(attack.settings["restarts"]))
    graded = _graded(oracle, labels, wanted if targets is not None else None, attack.draws)
    standing = ~won(logits, labels, wanted) if graded is None else graded(every, clean) < 1
    return until_fooled(clean, standing, aims, run, at_once=oracle.at_once, grade=graded)


def settle_targets(
    threat: ThreatModel, given: Mapping[str, Setting]
) -> tuple[dict[str, Setting], float]:
    """APGD-T's settings, the standard's unless given, and its reach.

    In l1 five target classes are standard.

    Raises:
        AttackError: A setting that is unknown, or a value that cannot be.
    """
    classes = 5 if threat.norm == "l1" else 9
    return settled("apgdt", given, {"steps": 100, "target_classes": classes}), threat.eps


def search_targets(
    attack: "Attack", model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Tensor:
    """APGD-T: a search towards one wrong class after the other, the likeliest first.

    A search is over when the model is wrong, with whatever class. A model of fewer than ten
    classes has as many searches as wrong classes. With two or three classes the loss cannot be
    the ratio of four logits: it is the difference of two. To be called within an `attack_scope`.

    Returns:
        As `search` does, the last class in the place of the last restart.

    Raises:
        AttackError: The model cannot be searched.
    """
    oracle = Oracle(model, images, labels, draws=attack.draws)
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    logits, steps = oracle.logits(clean), int(attack.settings["steps"])

    def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        batch = clean[rows], labels[rows], aim
        return _ascend(oracle, *batch, attack.threat, targeted_dlr, _is_wrong, steps)

    order = likeliest_wrong(logits, labels, int(attack.settings["target_classes"]))
    every = torch.arange(len(clean), device=clean.device)
    graded = _graded(oracle, labels, None, attack.draws)
    standing = logits.argmax(1) == labels if graded is None else graded(every, clean) < 1
    return until_fooled(clean, standing, order, run, at_once=oracle.at_once, grade=graded)


def _is_wrong(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Won with any class but the label."""
    return logits.argmax(1) != labels


def _is_target(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Won with the target only."""
    return logits.argmax(1) == targets


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row."""
    return F.cross_entropy(logits, labels, reduction="none")


def _graded(
    oracle: Oracle, labels: Tensor, targets: Tensor | None, draws: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Of a random model, in how many draws an image fools; None for one draw."""
    if draws == 1:
        return None
    if targets is not None:
        return lambda rows, images: 1 - oracle.wrong(images, targets[rows])
    return lambda rows, images: oracle.wrong(images, labels[rows])


def _loss(attack: "Attack", classes: int, *, targeted: bool) -> PerRow:
    """The loss to climb."""
    name = str(attack.settings["loss"])
    if attack.loss is not None or name != "dlr":
        entropy = _cross_entropy if name == "ce" else scaled_cross_entropy
        away = entropy if attack.loss is None else by_example(attack.loss)
        if targeted:
            return lambda logits, _, targets: -away(logits, targets)
        return lambda logits, labels, _: away(logits, labels)
    if targeted:
        return targeted_dlr
    if classes < 3:
        raise AttackError(
            f"the dlr loss compares 3 logits, but the model has {classes} classes; use loss='ce'"
        )
    return lambda logits, labels, _: dlr(logits, labels)


def _ascend(
    oracle: Oracle,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    loss: PerRow,
    won: PerRow,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One search from one start: the images it gives, and which of them won."""
    if threat.norm == "l1":
        return ascend_sparsely(oracle, clean, labels, targets, threat, loss, won, steps)
    climb = _Climb(clean, labels, targets, _random_start(clean, threat))
    found = climb.point.clone()
    over = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    period = since = max(int(0.22 * steps), 1)
    for step in range(steps + 1):
        if step > 0:
            climb.move(threat, 1.0 if step == 1 else _MOMENTUM)
        climb.leave(won(climb.look(oracle, loss), climb.labels, climb.targets), found, over)
        if len(climb.rows) == 0:
            break
        if step == 0:
            climb.mark()
            continue
        since -= 1
        if since == 0:
            climb.check(period)
            period = since = max(period - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    found[climb.rows] = climb.best
    return found, over


@dataclass
class _Climb(Climb):
    """A search in linf or l2."""

    previous: Tensor = field(init=False)
    step: Tensor = field(init=False)  # in eps
    rises: Tensor = field(init=False)  # since the last checkpoint
    marked_loss: Tensor = field(init=False)  # the best at the last checkpoint
    halved: Tensor = field(init=False)  # at the last checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        self.previous, self.marked_loss = self.point, self.best_loss
        self.step, self.rises = torch.full_like(self.loss, 2.0), torch.zeros_like(self.loss)
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)

    def look(self, oracle: Oracle, loss: PerRow) -> Tensor:
        """Counts the rises, too."""
        before = self.loss
        logits = super().look(oracle, loss)
        self.rises = self.rises + (self.loss > before)
        return logits

    def move(self, threat: ThreatModel, momentum: float) -> None:
        """One step up the gradient, mixed with the way of the last step."""
        length = (self.step * threat.eps).view(-1, 1, 1, 1)
        linf = threat.norm == "linf"
        direction = self.gradient.sign() if linf else _of_length_one(self.gradient, 2)
        ahead = threat.project(self.clean, self.point + length * direction)
        inertia = (1 - momentum) * (self.point - self.previous)
        mixed = self.point + momentum * (ahead - self.point) + inertia
        self.previous, self.point = self.point, threat.project(self.clean, mixed)

    def mark(self) -> None:
        """Counts rises and compares losses from here."""
        self.marked_loss, self.rises = self.best_loss, torch.zeros_like(self.rises)

    def check(self, steps: int) -> None:
        """After so many steps: where the search stalls, half the step from the best point."""
        stalled = ~self.halved & (self.marked_loss >= self.best_loss)
        self.halved = (self.rises <= _RISING * steps) | stalled
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.go_back(self.halved)
        self.mark()


def _random_start(clean: Tensor, threat: ThreatModel) -> Tensor:
    """A random direction from the clean images to the surface of the ball, within the bounds."""
    if threat.norm == "linf":
        direction = _of_length_one(torch.empty_like(clean).uniform_(-1, 1), math.inf)
    else:
        direction = _of_length_one(torch.randn_like(clean), 2)
    return (clean + threat.eps * direction).clamp(*threat.bounds)


def _of_length_one(direction: Tensor, order: float) -> Tensor:
    """Each row scaled."""
    length: Tensor = torch.linalg.vector_norm(direction.flatten(1), ord=order, dim=1)
    return direction / (length + _TINY).view(-1, 1, 1, 1)
