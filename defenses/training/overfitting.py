"""Catastrophic overfitting: a model that withstands one step of FGSM and falls to PGD.

Single-step training can collapse within an epoch (Wong et al. 2020, arXiv 2001.03994): the model
learns to bend its surface so that the one step misses. The guard looks at held-out images, and
where it finds a collapse it goes back to the last good state and trains on with more noise, which
is what prevents it in N-FGSM (de Jorge et al. 2022, arXiv 2202.01181).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack, attack
from defenses.errors import AttackError
from defenses.scope import attack_scope
from defenses.threat import ThreatModel
from defenses.training.adversarial import AdversarialTraining

__all__ = ["HeldOut", "OverfittingGuard", "OverfittingVerdict"]

_STEPS = 10


@final
@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Images that are in no training set: the only ones a guard takes.

    A decision made on training images would depend on them, and no privacy accountant would know.
    By making this value you say that its images are public, or are accounted for elsewhere.

    Attributes:
        images: In the threat model's bounds, [n, channels, height, width], n >= 1; a few hundred
            are enough.
        labels: int64, [n].

    Raises:
        AttackError: There is no image, or not a label for each.

    Example:
        >>> len(HeldOut(images=torch.rand(3, 1, 2, 2), labels=torch.tensor([0, 1, 0])).labels)
        3
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) == 0 or self.labels.shape != self.images.shape[:1]:
            raise AttackError(
                f"held-out: expected images [n, ...] with labels [n], n >= 1, got "
                f"{list(self.images.shape)} and {list(self.labels.shape)}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class OverfittingVerdict:
    """What a guard saw.

    Attributes:
        single_step: Share of the held-out images right under FGSM.
        iterative: The same under PGD.
        overfitted: Whether the first is so much larger that it cannot be believed.

    Example:
        >>> OverfittingVerdict(single_step=0.96, iterative=0.0, overfitted=True).overfitted
        True
    """

    single_step: float
    iterative: float
    overfitted: bool


class _Stateful(Protocol):
    """What can be taken back to an earlier state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@final
class OverfittingGuard:
    """Detects catastrophic overfitting, and takes a training back to before it.

    Call `check` to be told, or `settle` at the end of every epoch to be rescued. What a private
    training has spent is spent: rolling back returns weights, never epsilon.

    Args:
        threat: That of the training, `linf`.
        gap: The largest believable difference between the two shares, in (0, 1).
        steps: Of PGD.

    Raises:
        AttackError: A value is out of its range, or the norm has no single-step attack.

    Example:
        >>> guard = OverfittingGuard(ThreatModel(norm="linf", eps=0.1))
        >>> held_out = HeldOut(images=torch.rand(8, 1, 2, 2), labels=torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> guard.check(model, held_out).overfitted  # FGSM is exact on a linear model
        False
    """

    def __init__(self, threat: ThreatModel, *, gap: float = 0.2, steps: int = _STEPS) -> None:
        if not 0 < gap < 1:
            raise AttackError(f"gap: expected a number in (0, 1), got {gap}")
        self._single: Attack = attack("fgsm", threat)
        self._iterative: Attack = attack("pgd", threat, steps=steps)
        self._gap = gap
        self._good: list[dict[str, Any]] = []

    def check(self, model: nn.Module, held_out: HeldOut) -> OverfittingVerdict:
        """Attacks the held-out images once by FGSM and once by PGD; nothing is changed.

        Args:
            model: In any modes; they are kept.
            held_out: Images that are in no training set.

        Raises:
            AttackError: The images are not a `HeldOut`, or unusable.

        Example:
            >>> guard = OverfittingGuard(ThreatModel(norm="linf", eps=0.1))
            >>> held_out = HeldOut(images=torch.rand(8, 1, 2, 2), labels=torch.arange(8) % 2)
            >>> guard.check(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), held_out).iterative <= 1
            True
        """
        if not isinstance(held_out, HeldOut):
            raise AttackError(
                f"held_out: expected a HeldOut, got {type(held_out).__name__}; wrap images that "
                "are in no training set"
            )
        single = self._accuracy(self._single, model, held_out)
        iterative = self._accuracy(self._iterative, model, held_out)
        return OverfittingVerdict(
            single_step=single,
            iterative=iterative,
            overfitted=single - iterative > self._gap,
        )

    def settle(
        self,
        model: nn.Module,
        held_out: HeldOut,
        objective: AdversarialTraining,
        parts: Sequence[_Stateful] = (),
        *,
        factor: float = 1.5,
    ) -> OverfittingVerdict:
        """Checks; remembers a good state, or goes back to the last good one and raises the noise.

        Without an earlier good state the model stays as it is and only the noise is raised.

        Args:
            model: The model in training.
            held_out: Images that are in no training set.
            objective: Of the method `n-fgsm`, whose noise can be raised.
            parts: What else goes back: the optimizer, an average of the weights. The same ones in
                every call.
            factor: By how much the noise is raised, above 1.

        Raises:
            AttackError: A value cannot be, or the objective has no noise.

        Example:
            >>> threat = ThreatModel(norm="linf", eps=0.1)
            >>> guard, objective = OverfittingGuard(threat), AdversarialTraining(threat)
            >>> held_out = HeldOut(images=torch.rand(8, 1, 2, 2), labels=torch.arange(8) % 2)
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> guard.settle(model, held_out, objective, [optimizer]).overfitted
            False
        """
        if not factor > 1:
            raise AttackError(f"factor: expected a number above 1, got {factor}")
        noise = objective.noise
        verdict = self.check(model, held_out)
        held: list[_Stateful] = [model, *parts]
        if not verdict.overfitted:
            self._good = [copy.deepcopy(part.state_dict()) for part in held]
            return verdict
        if self._good:
            for part, state in zip(held, self._good, strict=True):
                part.load_state_dict(copy.deepcopy(state))
        objective.noise = noise * factor
        return verdict

    @staticmethod
    def _accuracy(attacker: Attack, model: nn.Module, held_out: HeldOut) -> float:
        """The share that is right under an attack, the same each time for the same model."""
        found = attacker(model, held_out.images, held_out.labels, seed=0)
        with attack_scope(model, seed=0), torch.no_grad():
            predicted = model(found).argmax(dim=1)
        return float((predicted == held_out.labels.to(predicted.device)).float().mean())
