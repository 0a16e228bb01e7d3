"""Adversarial training as an objective: `(model, images, labels) -> losses[n]`.

Each loss depends on its own example and the model only, so a private update may clip it per
example. The images are attacked first, behind `attack_scope`, and then go through the model once,
in the model's own modes: a recorder of per-example gradients sees exactly n examples.

Deliberately not here: methods whose perturbation is shared between examples or carried to others
(free adversarial training, universal perturbations, weight perturbation). They have no bounded
contribution per example, so ordinary DP-SGD accounting does not hold for them.
"""

from typing import Any, ClassVar, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks import Attack, Setting, attack
from defenses.errors import AttackError
from defenses.threat import ThreatModel

__all__ = ["AdversarialTraining", "Method"]

Method = Literal["n-fgsm", "ffgsm", "fgsm", "pgd"]

_PGD_STEPS = 10


@final
class AdversarialTraining:
    """Cross-entropy on adversarial images, one loss per example.

    Methods: `"n-fgsm"` (one step from strong noise; de Jorge et al. 2022, arXiv 2202.01181: the
    cheapest that does not collapse, linf only), `"pgd"` (Madry et al. 2018, arXiv 1706.06083; 10
    steps), `"ffgsm"` (FGSM-RS; Wong et al. 2020, arXiv 2001.03994, linf only) and `"fgsm"`
    (Goodfellow et al. 2015, arXiv 1412.6572; linf only, collapses at large eps: a baseline).

    The randomness of the attacks comes from a generator of its own, seeded once and advanced by
    one draw a call; the global random states and a private update's noise never move. Labels may
    be smoothed; the attack always uses the hard ones.

    Args:
        threat: The ball to train for; its bounds are those of the images.
        method: How the adversarial images are found.
        steps: Gradient steps, for `"pgd"` only.
        step_size: Length of a step; by default 2.5 eps / steps for `"pgd"`, 1.25 eps for
            `"ffgsm"` and eps for `"n-fgsm"`.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: In [0, 1).

    Attributes:
        per_example: True: each loss depends on its own example only.
        attack: The configured attack.

    Raises:
        AttackError: An unknown method or a value that cannot be.

    Example:
        >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> losses = objective(model, images, labels)
        >>> losses.shape, losses.requires_grad
        (torch.Size([5]), True)
    """

    per_example: ClassVar[bool] = True

    def __init__(
        self,
        threat: ThreatModel,
        method: Method = "n-fgsm",
        *,
        steps: int | None = None,
        step_size: float | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        if method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise AttackError(f"method: expected one of {known}; got {method!r}")
        if not 0 <= label_smoothing < 1:
            raise AttackError(
                f"label_smoothing: expected a number in [0, 1), got {label_smoothing}"
            )
        if not 0 <= seed < 2**63:
            raise AttackError(f"seed: expected an integer in [0, 2**63), got {seed}")
        if method == "pgd" and steps is None:
            steps = _PGD_STEPS
        self.attack: Attack = attack(method, threat, steps=steps, step_size=step_size)
        self._label_smoothing = label_smoothing
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run.

        Example:
            >>> AdversarialTraining(ThreatModel(norm="linf", eps=0.1), "pgd").settings["steps"]
            10
        """
        return {
            "method": self.attack.name,
            "label_smoothing": self._label_smoothing,
            **self.attack.settings,
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes the losses of the adversarial ones.

        Args:
            model: In whatever modes training wants; they are kept.
            images: [n, channels, height, width] in the threat model's bounds; n may be 0.
            labels: int64, [n].

        Returns:
            Losses, [n], with a graph to the parameters (unless gradients are disabled).

        Raises:
            ThreatModelError: The images are not in the bounds.
            AttackError: The labels or the model's logits are unusable.

        Example:
            >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.2), "fgsm")
            >>> images, labels = torch.tensor([[[[0.6, 0.4]]]]), torch.tensor([0])
            >>> objective(nn.Flatten(), images, labels)  # the logits become [0.4, 0.6]
            tensor([0.7981])
        """
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        adversarial = self.attack(model, images, labels, seed=seed)
        logits = model(adversarial)
        return F.cross_entropy(
            logits,
            labels.to(logits.device),
            reduction="none",
            label_smoothing=self._label_smoothing,
        )

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, so that a resumed run crafts what this one would have.

        Example:
            >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
            >>> objective.state_dict()["generator"].dtype
            torch.uint8
        """
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict` of an objective with the same settings.

        Raises:
            AttackError: The state is not one; this objective is left as it was.

        Example:
            >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
            >>> objective.load_state_dict(objective.state_dict())
        """
        try:
            self._generator.set_state(state["generator"].cpu())
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise AttackError(
                "expected the state_dict of an AdversarialTraining objective, with the state of a "
                f"generator under 'generator': {error}"
            ) from error
