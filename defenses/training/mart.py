"""MART: weighs each example by how sure the model is of its clean image (Wang et al. 2020).

After "Improving adversarial robustness requires revisiting misclassified examples" (ICLR 2020):
boosted cross-entropy of the attacked image, plus beta times the divergence from the clean
probabilities, weighted by one minus the clean probability of the true class. The attack is PGD on
the cross-entropy. Two forward passes of n rows and one backward pass.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Attack, attack
from defenses.attacks.inputs import check_threat
from defenses.attacks.settings import Setting, check_settings
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective
from defenses.training.precision import Precision

__all__ = ["Mart"]

# Keeps the logarithm of one minus a probability finite; the authors' constant.
_MARGIN = 1e-4


@final
class Mart(AdversarialObjective):
    """MART (Wang et al. 2020, ICLR), one loss per example.

    Args:
        threat: The ball to train for, `linf` or `l2`; its bounds are those of the images.
        beta: Weight of the divergence, at least 0; the authors' scripts take 5.
        steps: Gradient steps of the attack.
        step_size: Length of a step; 2.5 eps / steps by default.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: Of the cross-entropy, in [0, 1).
        precision: Of the convolutions within the attack; the losses are always taken in the model's
            own. `"bfloat16"` is faster where the processor has matrix units for it (AMX, tensor
            cores), and slower elsewhere; a few of a hundred signs of the gradient turn.

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
        check_threat(threat, "mart", norms=("linf", "l2"))
        check_settings("mart", {"beta": beta}, {"beta": 5.0})
        super().__init__(seed=seed, label_smoothing=label_smoothing, precision=precision)
        self.attack: Attack = attack("pgd", threat, steps=steps, step_size=step_size)
        self._beta = float(beta)

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""
        return {
            "method": "mart",
            "beta": self._beta,
            "label_smoothing": self._label_smoothing,
            "precision": self._precision,
            **self.attack.settings,
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes the boosted cross-entropy and the weighted divergence.

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
        images = self._at_home(self.attack.threat, model, images, labels)
        attacked = model(self._attacked(self.attack, model, images, labels))
        clean = model(images).log_softmax(dim=1)
        truth = labels.to(attacked.device).unsqueeze(1)
        sure = clean.gather(1, truth).squeeze(1).exp()
        logs = attacked.log_softmax(dim=1)
        rival = attacked.detach().scatter(1, truth, -torch.inf).argmax(dim=1, keepdim=True)
        pushed = -torch.log(1 + _MARGIN - logs.exp().gather(1, rival).squeeze(1))
        boosted = pushed + F.cross_entropy(
            attacked, truth.squeeze(1), reduction="none", label_smoothing=self._label_smoothing
        )
        divergence: Tensor = F.kl_div(logs, clean, reduction="none", log_target=True).sum(dim=1)
        losses: Tensor = boosted + self._beta * divergence * (1 - sure)
        return losses
