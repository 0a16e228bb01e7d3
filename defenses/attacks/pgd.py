"""PGD and its single-step relatives, the attacks that adversarial training is done with.

Each is a start, a number of steps and a length of step for `projected_gradient` on the
cross-entropy. With the same start, images and seed the results are torchattacks'.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.adaptive import Adaptive, Loss, by_example, check_loss
from defenses.attacks.attack import Attack
from defenses.attacks.projected_gradient import projected_gradient, random_start
from defenses.errors import AttackError

__all__ = ["FFGSM", "FGSM", "NFGSM", "PGD", "SingleStep"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class PGD(Adaptive):
    """Projected gradient descent, many steps from a random point (Madry et al. 2018).

    After arXiv 1706.06083.

    Attributes:
        step_size: Length of a step in the units of the pixels; 2.5 eps / steps by default.
        steps: 100 by default, as in an evaluation; training takes 10.
        random_start: Whether it starts from a random point of the ball, else from the image.
        early_stop: Whether an image is left alone once it is fooled.
        loss: What it climbs, from logits [n, classes] and labels [n] to losses [n], or with targets
            goes down; None is the cross-entropy.

    Example:
        >>> from defenses import ThreatModel
        >>> PGD(ThreatModel(norm="linf", eps=0.1), steps=10).settings
        {'step_size': 0.025, 'steps': 10, 'random_start': True, 'early_stop': False}
    """

    name = "pgd"
    norms = ("linf", "l2")
    targeted = True
    trainable = True
    training_steps = 10
    lengths = ("step_size",)

    step_size: float | None = None
    steps: int = 100
    random_start: bool = True
    early_stop: bool = False
    loss: Loss | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is None:
            object.__setattr__(self, "step_size", 2.5 * self.threat.eps / self.steps)
        if self.loss is not None:
            check_loss(self.name, self.loss)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        assert self.step_size is not None
        threat = self.threat
        if self.early_stop and targets is not None:
            raise AttackError("pgd: early_stop ends at any wrong class; leave it out with targets")
        start = random_start(images, threat, reach=threat.eps) if self.random_start else images
        return projected_gradient(
            model,
            images,
            threat,
            self._rise_or_fall(targets),
            labels if targets is None else targets,
            start=start,
            steps=self.steps,
            step_size=self.step_size,
            draws=self.draws,
            until_fooled=self.early_stop,
        )

    def _rise_or_fall(self, targets: Tensor | None) -> Loss:
        """Away from the labels or towards the targets, by the loss of the user's own if any."""
        if self.loss is None:
            return _rise if targets is None else _fall
        own = by_example(self.loss)
        return own if targets is None else lambda logits, classes: -own(logits, classes)


@dataclass(frozen=True, kw_only=True, repr=False)
class SingleStep(Attack):
    """One gradient step, from the image or from noise: cheap, and easily overfitted to."""

    norms = ("linf",)
    targeted = True
    trainable = True
    usual_step: ClassVar[float] = 1.0  # in multiples of eps

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "step_size", 0.0) is None:
            object.__setattr__(self, "step_size", self.usual_step * self.threat.eps)

    @property
    @abstractmethod
    def start_noise(self) -> float:
        """The uniform noise before the step, in multiples of eps."""

    @property
    def step_length(self) -> float:
        """Length of the step, in the units of the pixels: its `step_size`, if it has one."""
        length: float = getattr(self, "step_size", self.threat.eps)
        return length

    def with_noise(self, noise: float) -> "SingleStep":
        """The same step after other noise, which makes it an N-FGSM."""
        if noise == self.start_noise:
            return self
        return NFGSM(self.threat, noise=noise, step_size=self.step_length, draws=self.draws)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        threat, noise = self.threat, self.start_noise
        # N-FGSM is clipped to what it can reach and to the bounds, not to the ball.
        if self.radius != threat.eps:
            threat = replace(threat, eps=min(self.radius, threat.width))
        return projected_gradient(
            model,
            images,
            threat,
            _rise if targets is None else _fall,
            labels if targets is None else targets,
            start=images
            if noise == 0
            else random_start(images, threat, reach=noise * self.threat.eps),
            steps=1,
            step_size=self.step_length,
            draws=self.draws,
        )


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class FGSM(SingleStep):
    """The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step of eps.

    Example:
        >>> from defenses import ThreatModel
        >>> FGSM(ThreatModel(norm="linf", eps=0.1))
        FGSM(linf eps=0.1 in [0, 1])
    """

    name = "fgsm"

    @property
    def start_noise(self) -> float:
        """None: the step starts from the image."""
        return 0.0


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class FFGSM(SingleStep):
    """FGSM-RS (Wong et al. 2020, arXiv 2001.03994): from a random point, back into the ball.

    Attributes:
        step_size: 1.25 eps by default.

    Example:
        >>> from defenses import ThreatModel
        >>> FFGSM(ThreatModel(norm="linf", eps=0.1)).step_size
        0.125
    """

    name = "ffgsm"
    lengths = ("step_size",)
    usual_step = 1.25

    step_size: float | None = None

    @property
    def start_noise(self) -> float:
        """The whole ball."""
        return 1.0


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class NFGSM(SingleStep):
    """N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): a step from strong noise, for training.

    Noise and step are never clipped to the ball, only to the bounds: it reaches further than eps.

    Attributes:
        noise: Half the width of the uniform noise, in multiples of eps.
        step_size: eps by default.

    Example:
        >>> from defenses import ThreatModel
        >>> NFGSM(ThreatModel(norm="linf", eps=0.125)).radius
        0.375
    """

    name = "n-fgsm"
    lengths = ("step_size",)

    noise: float = 2.0
    step_size: float | None = None

    @property
    def radius(self) -> float:
        """What noise and step reach together."""
        return self.noise * self.threat.eps + self.step_length

    @property
    def start_noise(self) -> float:
        """The `noise`."""
        return self.noise


def _rise(logits: Tensor, labels: Tensor) -> Tensor:
    """Away from the labels; the sum, so that no image's gradient depends on how many there are."""
    return F.cross_entropy(logits, labels, reduction="sum")


def _fall(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="sum")
