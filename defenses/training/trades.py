"""TRADES: accuracy on the clean images, and the same answer around them (Zhang et al. 2019).

After arXiv 1901.08573: cross-entropy of the clean image plus beta times the divergence of the
attacked image's class probabilities from the clean ones', which is also what the attack climbs.

Two forward passes of n rows and one backward pass. One pass of 2 n rows would make every example
count twice in a private update.
"""

import weakref
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting
from defenses.attacks.inputs import check_threat
from defenses.attacks.projected_gradient import projected_gradient
from defenses.attacks.settings import check_settings
from defenses.errors import AttackError
from defenses.scope import attack_scope, check_logits
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective

__all__ = ["Trades"]

_START = 1e-3  # of the first noise, in widths of the bounds: at the image itself there is no slope


@final
class Trades(AdversarialObjective):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573), one loss per example.

    The attack compares with the clean logits, taken once and in evaluation mode. Where the first
    batch shows that the model answers alike in training and in evaluation mode (GroupNorm and no
    dropout, say), the clean training pass is used for both.

    Args:
        threat: The ball to train for, `linf` or `l2`; its bounds are those of the images.
        beta: Weight of the divergence, at least 0; the paper takes 6 (and 1).
        steps: Gradient steps of the attack.
        step_size: Length of a step; 2.5 eps / steps by default.
        seed: Seed of the generator, 0 <= seed < 2**63.
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
        check_threat(threat, "trades", norms=("linf", "l2"))
        given: dict[str, Setting] = {"beta": beta, "steps": steps}
        given |= {} if step_size is None else {"step_size": step_size}
        check_settings("trades", given, {"beta": 6.0, "steps": 10, "step_size": 1.0})
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self.threat, self._beta = threat, float(beta)
        self._search = {"step_size": 2.5 * threat.eps / steps, **given}
        self._alike = _AlikeModes()

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""
        return {"method": "trades", "label_smoothing": self._label_smoothing, **self._search}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes clean cross-entropy and divergence.

        Args:
            model: In whatever modes training wants; they are kept.
            images: [n, channels, height, width] in the threat model's bounds; n may be 0.
            labels: int64, [n].

        Returns:
            Losses, [n], with a graph to the parameters (unless gradients are disabled).

        Raises:
            ThreatModelError: The images are not in the bounds.
            AttackError: The labels or the model's logits are unusable.
        """
        images = self._at_home(self.threat, model, images, labels)
        before = torch.get_rng_state()
        clean = model(images)
        still = torch.equal(before, torch.get_rng_state())
        answer = self._alike.answer(model, images, clean.detach(), still=still)
        logits = model(self._attacked(self._away(answer), model, images, labels))
        divergence = F.kl_div(
            logits.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="none", log_target=True
        ).sum(dim=1)
        natural = F.cross_entropy(
            clean,
            labels.to(clean.device),
            reduction="none",
            label_smoothing=self._label_smoothing,
        )
        return natural + self._beta * divergence

    def _away(self, clean: Tensor) -> Attack:
        """The attack that leads away from these logits, [n, classes]."""
        return Attack(
            name="trades",
            threat=self.threat,
            radius=self.threat.eps,
            configuration=tuple(self._search.items()),
            targeted=False,
            search=_Away(clean),
        )


class _AlikeModes:
    """Knows whether a model answers alike in its training modes and in evaluation mode.

    A class because it remembers: one comparison for each model and set of training flags.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._flags: tuple[bool, ...] = ()
        self._alike = False

    def answer(self, model: nn.Module, images: Tensor, trained: Tensor, *, still: bool) -> Tensor:
        """The logits in evaluation mode, given those in training mode.

        `still`: whether the training pass drew no random number.
        """
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


@dataclass(frozen=True)
class _Away:
    """The search: away from the class probabilities of the clean logits, [n, classes]."""

    clean: Tensor

    def __call__(
        self,
        attack: Attack,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
    ) -> Tensor:
        settings, threat = attack.settings, attack.threat
        largest = int(labels.max())
        check_logits(self.clean, count=len(images), largest_label=largest, error=AttackError)
        noise = torch.randn_like(images).mul_(_START * threat.width)
        return projected_gradient(
            model,
            images,
            threat,
            _divergence,
            self.clean.softmax(dim=1),
            start=noise.add_(images).clamp_(*threat.bounds),
            steps=int(settings["steps"]),
            step_size=float(settings["step_size"]),
        )


def _divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """Of the logits' class probabilities from the clean ones, summed over the images."""
    return F.kl_div(logits.log_softmax(dim=1), clean, reduction="sum")
