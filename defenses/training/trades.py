"""TRADES and MART: losses that also look at the clean image, and ask for the same answer around it.

Both add beta times the divergence of the attacked image's class probabilities from the clean ones'
and differ in what is attacked and weighed. Two forward passes of n rows and one backward pass: one
pass of 2 n rows would make every example count twice in a private update.
"""

import weakref
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting, check_setting, check_threat
from defenses.attacks.pgd import PGD
from defenses.attacks.projected_gradient import projected_gradient
from defenses.errors import AttackError
from defenses.scope import attack_scope, check_logits
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective, Precision

__all__ = ["Mart", "Trades"]

_START = 1e-3  # of the first noise, in widths of the bounds: at the image itself there is no slope
# Keeps the logarithm of one minus a probability finite; the authors' constant for MART.
_MARGIN = 1e-4


@final
class Trades(AdversarialObjective):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573), one loss per example.

    Cross-entropy of the clean image plus beta times the divergence, which is also what the attack
    climbs.

    The attack compares with the clean logits, taken once and in evaluation mode. Where the first
    batch shows that the model answers alike in training and in evaluation mode (GroupNorm and no
    dropout, say), the clean training pass is used for both.

    Args:
        threat: The ball to train for, `linf` or `l2`; its bounds are those of the images.
        beta: Weight of the divergence, at least 0; the paper takes 6 (and 1).
        steps: Gradient steps of the attack.
        step_size: Length of a step; 2.5 eps / steps by default.
        label_smoothing: Of the clean cross-entropy, in [0, 1).

    Attributes:
        threat: The ball at full strength.

    Raises:
        AttackError: A value cannot be.

    Example:
        >>> objective = Trades(ThreatModel(norm="linf", eps=0.1))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> objective(model, images, labels).shape
        torch.Size([5])
    """

    def __init__(
        self,
        threat: ThreatModel,
        *,
        beta: float = 6.0,
        steps: int = 10,
        step_size: float | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        check_threat(threat, "trades", norms=_Away.norms)
        check_setting("trades: beta", beta, float)
        check_setting("trades: steps", steps, int)
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        length = 2.5 * threat.eps / steps if step_size is None else step_size
        # Made once, so that its settings are checked now; each batch brings its own logits.
        self._away = _Away(threat, step_size=length, steps=steps)
        self.threat, self._beta = threat, beta
        self._alike = _AlikeModes()

    def _own_settings(self) -> dict[str, Setting]:
        return {
            "method": "trades",
            "step_size": self._away.step_size,
            "beta": self._beta,
            "steps": self._away.steps,
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes clean cross-entropy and divergence, [n]."""
        images = self._at_home(self.threat, model, images, labels)
        before = torch.get_rng_state()
        clean = model(images)
        still = torch.equal(before, torch.get_rng_state())
        answer = self._alike.answer(model, images, clean.detach(), still=still)
        logits = model(self._attacked(self._away.from_logits(answer), model, images, labels))
        divergence = F.kl_div(
            logits.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="none", log_target=True
        ).sum(dim=1)
        return self._cross_entropy(clean, labels) + float(self._beta) * divergence


@final
class Mart(AdversarialObjective):
    """MART: weighs each example by how sure the model is of its clean image (Wang et al. 2020).

    After "Improving adversarial robustness requires revisiting misclassified examples" (ICLR):
    boosted cross-entropy of the attacked image, plus beta times the divergence, weighted by one
    minus the clean probability of the true class. The attack is PGD on the cross-entropy.

    Args:
        threat: The ball to train for, `linf` or `l2`; its bounds are those of the images.
        beta: Weight of the divergence, at least 0; the authors' scripts take 5.
        steps: Gradient steps of the attack, PGD.
        precision: Of the attack's convolutions, as in `AdversarialTraining`.

    Attributes:
        attack: The configured attack, at full strength.

    Raises:
        AttackError: A value cannot be.

    Example:
        >>> objective = Mart(ThreatModel(norm="linf", eps=0.1))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> objective(model, images, labels).shape
        torch.Size([5])
    """

    def __init__(
        self,
        threat: ThreatModel,
        *,
        beta: float = 5.0,
        steps: int = 10,
        step_size: float | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        check_threat(threat, "mart", norms=PGD.norms)
        check_setting("mart: beta", beta, float)
        super().__init__(seed=seed, label_smoothing=label_smoothing, precision=precision)
        self.attack: Attack = PGD(threat, steps=steps, step_size=step_size)
        self._beta = float(beta)

    def _own_settings(self) -> dict[str, Setting]:
        return {
            "method": "mart",
            "beta": self._beta,
            "precision": self._precision,
            **self.attack.settings,
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes boosted cross-entropy and weighted divergence, [n]."""
        images = self._at_home(self.attack.threat, model, images, labels)
        attacked = model(self._attacked(self.attack, model, images, labels))
        clean = model(images).log_softmax(dim=1)
        truth = labels.to(attacked.device).unsqueeze(1)
        sure = clean.gather(1, truth).squeeze(1).exp()
        logs = attacked.log_softmax(dim=1)
        rival = attacked.detach().scatter(1, truth, -torch.inf).argmax(dim=1, keepdim=True)
        pushed = -torch.log(1 + _MARGIN - logs.exp().gather(1, rival).squeeze(1))
        boosted = pushed + self._cross_entropy(attacked, labels)
        divergence: Tensor = F.kl_div(logs, clean, reduction="none", log_target=True).sum(dim=1)
        losses: Tensor = boosted + self._beta * divergence * (1 - sure)
        return losses


class _AlikeModes:
    """Remembers whether a model answers alike in its training modes and in evaluation mode."""

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._flags: tuple[bool, ...] = ()
        self._alike = False

    def answer(self, model: nn.Module, images: Tensor, trained: Tensor, *, still: bool) -> Tensor:
        """The logits in evaluation mode; `still` if those in training mode drew nothing random."""
        flags = tuple(module.training for module in model.modules())
        known = self._model is not None and self._model() is model and self._flags == flags
        if len(images) == 0 or not any(flags) or (known and self._alike):
            return trained
        with attack_scope(model), torch.no_grad():
            evaluated: Tensor = model(images)
        if not known:
            self._model, self._flags = weakref.ref(model), flags
            self._alike = still and torch.allclose(trained, evaluated, rtol=1e-4, atol=1e-5)
        return evaluated


@final
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class _Away(Attack):
    """PGD on the divergence from the class probabilities of clean logits, [n, classes]."""

    name = "trades"
    norms = ("linf", "l2")
    lengths = ("step_size",)

    step_size: float
    steps: int
    clean: Tensor | None = field(default=None, repr=False)

    def from_logits(self, clean: Tensor) -> "_Away":
        return _Away(self.threat, step_size=self.step_size, steps=self.steps, clean=clean)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        assert self.clean is not None
        largest = int(labels.max())
        check_logits(self.clean, count=len(images), largest_label=largest, error=AttackError)
        noise = torch.randn_like(images).mul_(_START * self.threat.width)
        return projected_gradient(
            model,
            images,
            self.threat,
            _divergence,
            self.clean.softmax(dim=1),
            start=noise.add_(images).clamp_(*self.threat.bounds),
            steps=self.steps,
            step_size=self.step_size,
        )


def _divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """Of the logits' class probabilities from the clean ones, summed over the images."""
    return F.kl_div(logits.log_softmax(dim=1), clean, reduction="sum")
