"""Adversarial training as an objective: cross-entropy on attacked images, one loss per example.

Each loss depends on its own example and the model only, so a private update may clip it per
example. The images are attacked first, behind `attack_scope`, and then go through the model once,
in the model's own modes: a recorder of per-example gradients sees exactly n examples.

Deliberately not here: losses that also look at the clean images (`trades`, `mart`), and methods
whose perturbation is carried to other examples (`free`).
"""

from collections.abc import Mapping
from typing import Any, Literal, final, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting, attack
from defenses.attacks.settings import check_settings
from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective
from defenses.training.precision import Precision

__all__ = ["AdversarialTraining", "Method"]

Method = Literal["n-fgsm", "ffgsm", "fgsm", "pgd"]

_PGD_STEPS = 10
_NOISE = {"fgsm": 0.0, "ffgsm": 1.0, "n-fgsm": 2.0}


@final
class AdversarialTraining(AdversarialObjective):
    """Cross-entropy on adversarial images, one loss per example.

    Methods: `"n-fgsm"` (one step from strong noise; de Jorge et al. 2022, arXiv 2202.01181: the
    cheapest that rarely collapses, linf only), `"pgd"` (Madry et al. 2018, arXiv 1706.06083; 10
    steps), `"ffgsm"` (FGSM-RS; Wong et al. 2020, arXiv 2001.03994, linf only) and `"fgsm"`
    (Goodfellow et al. 2015, arXiv 1412.6572; linf only, collapses at large eps: a baseline).

    Args:
        threat: The ball to train for; its bounds are those of the images.
        method: How the adversarial images are found.
        steps: Gradient steps, for `"pgd"` only.
        step_size: Length of a step; by default 2.5 eps / steps for `"pgd"`, 1.25 eps for
            `"ffgsm"` and eps for `"n-fgsm"`.
        early_stop: For `"pgd"` only: an image that is fooled is left alone, and the others go on
            as a smaller batch: cheaper, and weaker training where most are fooled early.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: In [0, 1); the attack always uses the hard labels.
        precision: Of the convolutions within the attack; the losses are always taken in the model's
            own. `"bfloat16"` is faster where the processor has matrix units for it (AMX, tensor
            cores), and slower elsewhere; a few of a hundred signs of the gradient turn.

    Attributes:
        attack: The configured attack, at full strength.

    Raises:
        AttackError: An unknown method or a value that cannot be.

    Example:
        >>> import torch
        >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> losses = objective(model, images, labels)
        >>> losses.shape, losses.requires_grad
        (torch.Size([5]), True)
    """

    def __init__(
        self,
        threat: ThreatModel,
        method: Method = "n-fgsm",
        *,
        steps: int | None = None,
        step_size: float | None = None,
        early_stop: bool = False,
        seed: int = 0,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        if not is_word(method, get_args(Method)):
            known = ", ".join(get_args(Method))
            raise AttackError(f"method: expected one of {known}; got {shown(method)}")
        if method == "pgd" and steps is None:
            steps = _PGD_STEPS
        check_settings(method, {"early_stop": early_stop}, {"early_stop": False})
        extra: dict[str, Any] = {"early_stop": True} if early_stop else {}
        super().__init__(seed=seed, label_smoothing=label_smoothing, precision=precision)
        self.attack: Attack = attack(method, threat, steps=steps, step_size=step_size, **extra)
        self._first = self.attack

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""
        return {
            "method": self.attack.name,
            "label_smoothing": self._label_smoothing,
            "precision": self._precision,
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
        """
        logits = model(self._attacked(self.attack, model, images, labels))
        return F.cross_entropy(
            logits,
            labels.to(logits.device),
            reduction="none",
            label_smoothing=self._label_smoothing,
        )

    @property
    def single_step(self) -> bool:
        """Whether it takes one step, so that it has a noise and may overfit to that step."""
        return self._first.name in _NOISE

    @property
    def noise(self) -> float:
        """The uniform noise before the one step, in multiples of eps.

        It is 2 for `"n-fgsm"`, 1 for `"ffgsm"` and 0 for `"fgsm"`. More of it keeps training from
        collapsing: with another noise than its own each of them is an N-FGSM, with the same step.

        Raises:
            AttackError: The method has no noise, or on setting it to a value that cannot be.
        """
        return float(self.attack.settings.get("noise", self._own_noise))

    @noise.setter
    def noise(self, value: float) -> None:
        check_settings("n-fgsm", {"noise": value}, {"noise": 2.0})
        if value == self._own_noise:
            self.attack = self._first
            return
        settings = {key: held for key, held in self._first.settings.items() if key != "noise"}
        self.attack = attack("n-fgsm", self.attack.threat, noise=value, **settings)  # type: ignore[arg-type]

    @property
    def _own_noise(self) -> float:
        """That of the method as it was configured."""
        if not self.single_step:
            raise AttackError(
                f"noise: {self._first.name} has none; train with n-fgsm, ffgsm or fgsm"
            )
        return float(self._first.settings.get("noise", _NOISE[self._first.name]))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to craft what this one would have."""
        raised = {"noise": self.noise} if self.single_step else {}
        return super().state_dict() | raised

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective with the same settings.

        Raises:
            AttackError: The state is not one; this objective is left as it was.
        """
        before = self.attack
        try:
            if isinstance(state, Mapping) and "noise" in state:
                self.noise = state["noise"]
            super().load_state_dict(state)
        except AttackError:
            self.attack = before
            raise
