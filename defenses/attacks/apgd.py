"""Auto-PGD: projected gradient ascent that finds its own step size (Croce & Hein 2020).

After arXiv 2003.01690, in l1 after 2103.01208. How it climbs is in `climb`; here are what it climbs
and when an image is won.

Cross-entropy vanishes where a model is sure of itself, as a large factor on the logits makes it
everywhere. The difference of logits ratio (equations 6 and 7) knows no factor, nor does the
cross-entropy of logits that are first brought to one range.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.adaptive import Adaptive, Loss, by_example, check_loss
from defenses.attacks.climb import PerRow, ascend
from defenses.attacks.oracle import Oracle, lead, likeliest_wrong, margin, until_fooled, widened
from defenses.errors import AttackError

__all__ = ["APGD", "APGDT", "dlr", "scaled_cross_entropy", "targeted_dlr"]

_TINY = 1e-12  # added to what divides: three equal logits have no ratio
_RANGE = 10.0  # 3, 10 and 30 tried on four networks: 10 finds as much as the logits as they are

_LossName = Literal["ce", "scaled-ce", "dlr"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class APGD(Adaptive):
    """Auto-PGD, up one loss.

    The first image that fooled the model, else the one of highest loss in the last restart; where
    the model is wrong already, the clean image.

    Attributes:
        steps: Gradient steps of each start.
        loss: `"ce"` (cross-entropy), `"scaled-ce"` (of logits brought to one range, which no factor
            on them changes), `"dlr"` (difference of logits ratio), or a function from logits
            [n, classes] and labels [n] to losses [n].
        restarts: Random starts; by default 1, in l1 5.

    Example:
        >>> from defenses import ThreatModel
        >>> APGD(ThreatModel(norm="l1", eps=5.0)).settings
        {'steps': 100, 'loss': 'ce', 'restarts': 5}
    """

    name = "apgd"
    norms = ("linf", "l2", "l1")
    targeted = True

    steps: int = 100
    loss: _LossName | Loss = "ce"
    restarts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.name, self.loss, get_args(_LossName))
        if self.restarts is None:
            object.__setattr__(self, "restarts", 5 if self.threat.norm == "l1" else 1)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        assert self.restarts is not None
        wanted, won = (labels, _is_wrong) if targets is None else (targets, _is_target)
        oracle = Oracle(model, images, torch.maximum(labels, wanted), draws=self.draws)
        clean = widened(images)
        logits = oracle.logits(clean)
        loss = self._climbed(logits.shape[1], targeted=targets is not None)

        def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
            return ascend(
                oracle, clean[rows], labels[rows], aim, self.threat, loss, won, self.steps
            )

        every = torch.arange(len(clean), device=clean.device)
        aims = wanted[:, None].expand(-1, self.restarts)
        graded = _graded(oracle, labels, wanted if targets is not None else None, self.draws)
        standing = ~won(logits, labels, wanted) if graded is None else graded(every, clean) < 1
        return until_fooled(clean, standing, aims, run, at_once=oracle.at_once, grade=graded)

    def _climbed(self, classes: int, *, targeted: bool) -> PerRow:
        """The loss to climb; towards targets, the one to go down turned over."""
        if self.loss == "dlr":
            if targeted:
                return targeted_dlr
            if classes < 3:
                raise AttackError(
                    f"the dlr loss compares 3 logits, but the model has {classes} classes; use "
                    "loss='ce'"
                )
            return lambda logits, labels, _: dlr(logits, labels)
        away = _ENTROPIES[self.loss] if isinstance(self.loss, str) else by_example(self.loss)
        if targeted:
            return lambda logits, _, targets: -away(logits, targets)
        return lambda logits, labels, _: away(logits, labels)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class APGDT(Adaptive):
    """APGD-T: Auto-PGD towards one wrong class after the other, the likeliest first.

    A search is over when the model is wrong, with whatever class. With two or three classes the
    loss cannot be the ratio of four logits: it is the difference of two.

    Attributes:
        steps: Gradient steps towards each class.
        target_classes: How many classes; by default 9, in l1 5, and never more than there are.

    Example:
        >>> from defenses import ThreatModel
        >>> APGDT(ThreatModel(norm="linf", eps=0.1)).settings
        {'steps': 100, 'target_classes': 9}
    """

    name = "apgdt"
    norms = ("linf", "l2", "l1")

    steps: int = 100
    target_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_classes is None:
            object.__setattr__(self, "target_classes", 5 if self.threat.norm == "l1" else 9)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        assert self.target_classes is not None
        oracle = Oracle(model, images, labels, draws=self.draws)
        clean = widened(images)
        logits = oracle.logits(clean)

        def run(rows: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
            batch = clean[rows], labels[rows], aim
            return ascend(oracle, *batch, self.threat, targeted_dlr, _is_wrong, self.steps)

        order = likeliest_wrong(logits, labels, self.target_classes)
        every = torch.arange(len(clean), device=clean.device)
        graded = _graded(oracle, labels, None, self.draws)
        standing = logits.argmax(1) == labels if graded is None else graded(every, clean) < 1
        return until_fooled(clean, standing, order, run, at_once=oracle.at_once, grade=graded)


def _is_wrong(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(1) != labels


def _is_target(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(1) == targets


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _graded(
    oracle: Oracle, labels: Tensor, targets: Tensor | None, draws: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Of a random model, in what share of its draws an image fools; None for one draw."""
    if draws == 1:
        return None
    if targets is not None:
        return lambda rows, images: 1 - oracle.wrong(images, targets[rows])
    return lambda rows, images: oracle.wrong(images, labels[rows])


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the logits, each row brought to one range, whatever it was.

    The range is taken as a constant: the gradient has the direction that the cross-entropy of the
    scaled logits has. No factor can saturate it.
    """
    high, low = logits.detach().amax(1, keepdim=True), logits.detach().amin(1, keepdim=True)
    # Shifted first: a large common part would cost the division its digits.
    level = (logits - high) / (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    return F.cross_entropy(_RANGE * level, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Away from the labels: above 0 where the model is wrong. Needs at least 3 classes."""
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return -margin(logits, labels, targeted=False) / (first - third + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """From the labels towards the targets: above 0 where the target beats the label.

    The ratio compares four logits. For two or three classes it is the difference alone.
    """
    difference = lead(logits, labels, targets)
    if logits.shape[1] < 4:
        return difference
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return difference / (first - (third + fourth) / 2 + _TINY)


_ENTROPIES: Mapping[str, Loss] = {"ce": _cross_entropy, "scaled-ce": scaled_cross_entropy}
