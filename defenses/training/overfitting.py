"""Catastrophic overfitting: a model that withstands one step of FGSM and falls to PGD.

Single-step training can collapse within an epoch (Wong et al. 2020, arXiv 2001.03994): the model
learns to bend its surface so that the one step misses. Where the guard finds that on a few fixed
images it goes back to the last good state and trains on with more noise, which is what prevents it
in N-FGSM (de Jorge et al. 2022, arXiv 2202.01181).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack, in_words
from defenses.attacks.by_name import attack
from defenses.errors import AttackError
from defenses.quantities import as_real, shown
from defenses.scope import attack_scope
from defenses.threat import ThreatModel
from defenses.training.adversarial import AdversarialTraining

__all__ = ["HeldOut", "OverfittingGuard", "OverfittingVerdict", "TrainingImages"]

_STEPS = 10
_FAIR = 0.5  # as of the check that a single step is a fair guide
_USUAL_NOISE = 2.0
_LARGEST_NOISE = 8.0  # in eps, a choice: four times that of N-FGSM leaves little to learn from


@dataclass(frozen=True, kw_only=True)
class _Images:
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            if not isinstance(getattr(self, name), Tensor) or getattr(self, name).ndim == 0:
                raise AttackError(
                    f"guard: expected {name} as a tensor [n, ...], got {shown(getattr(self, name))}"
                )
        if len(self.images) == 0 or self.labels.shape != self.images.shape[:1]:
            raise AttackError(
                f"guard: expected images [n, ...] with labels [n], n >= 1, got "
                f"{list(self.images.shape)} and {list(self.labels.shape)}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class HeldOut(_Images):
    """Images that are in no training set: the ones for a guard of a private training.

    A decision made on private images would depend on them, and no privacy accountant would know.
    By making this value you say that its images are public, or are accounted for elsewhere.

    Attributes:
        images: In the threat model's bounds, [n, channels, ...], n >= 1; a few hundred
            are enough.
        labels: int64, [n].

    Raises:
        AttackError: There is no image, or not a label for each.

    Example:
        >>> len(HeldOut(images=torch.rand(3, 1, 2, 2), labels=torch.tensor([0, 1, 0])).labels)
        3
    """


@final
@dataclass(frozen=True, kw_only=True)
class TrainingImages(_Images):
    """Some of the images that are trained on: a guard's, where the training is not private.

    They tell a collapse as well as others, since it is FGSM that the model has overfitted to, and
    leave the test images unseen. By making this value you say that no epsilon is to cover them.

    Attributes:
        images: As in `HeldOut`.
        labels: int64, [n].

    Raises:
        AttackError: As in `HeldOut`.

    Example:
        >>> some = TrainingImages(images=torch.rand(2, 1, 2, 2), labels=torch.tensor([0, 1]))
        >>> len(some.images)
        2
    """


@final
@dataclass(frozen=True, kw_only=True)
class OverfittingVerdict:
    """What a guard saw, and whether it went back.

    Attributes:
        single_step: Share of the images right under FGSM.
        iterative: The same under PGD.
        overfitted: Whether the first is so much larger that it cannot be believed.
        returned: Whether the training was taken back to the last good state.

    Example:
        >>> OverfittingVerdict(single_step=0.96, iterative=0.0, overfitted=True).overfitted
        True
    """

    single_step: float
    iterative: float
    overfitted: bool
    returned: bool = False


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@final
class OverfittingGuard:
    """Detects catastrophic overfitting, and takes a training back to before it.

    Call `check` to be told, or `rescue` at the end of every epoch to be rescued. What a private
    training has spent is spent: rolling back returns weights, never epsilon.

    Args:
        threat: That of the training, `linf`.
        gap: The largest believable difference between the two shares, in (0, 1).
        steps: Of PGD.

    Raises:
        AttackError: A value is out of its range, or the norm has no single-step attack.

    Example:
        >>> guard = OverfittingGuard(ThreatModel(norm="linf", eps=0.1))
        >>> images = TrainingImages(images=torch.rand(8, 1, 2, 2), labels=torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> guard.check(model, images).overfitted  # FGSM is exact on a linear model
        False
    """

    def __init__(self, threat: ThreatModel, *, gap: float = 0.2, steps: int = _STEPS) -> None:
        if not 0 < as_real(gap) < 1:
            raise AttackError(f"gap: expected a number in (0, 1), got {shown(gap)}")
        self._single: Attack = attack("fgsm", threat)
        self._iterative: Attack = attack("pgd", threat, steps=steps)
        self._gap = float(gap)
        self._good: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        steps = self._iterative.settings["steps"]
        ball = in_words(self._single.threat)
        return f"OverfittingGuard({ball}; gap={self._gap:g}, steps={steps})"

    def check(
        self, model: nn.Module, images: HeldOut | TrainingImages, *, strength: float = 1.0
    ) -> OverfittingVerdict:
        """Attacks the images once by FGSM and once by PGD; nothing is changed.

        Args:
            model: In any modes; they are kept.
            images: A few hundred, in each call the same.
            strength: By what factor the ball is smaller, in (0, 1]: that of an objective which is
                warming up.
        """
        if not isinstance(images, HeldOut | TrainingImages):
            raise AttackError(
                f"images: expected a HeldOut or, of a training that is not private, "
                f"TrainingImages, got {type(images).__name__}; wrap them in what they are"
            )
        single = self._accuracy(self._single.scaled(strength), model, images)
        iterative = self._accuracy(self._iterative.scaled(strength), model, images)
        return OverfittingVerdict(
            single_step=single,
            iterative=iterative,
            overfitted=single - iterative > self._gap,
        )

    def rescue(
        self,
        model: nn.Module,
        images: HeldOut | TrainingImages,
        objective: AdversarialTraining,
        parts: Sequence[_Stateful] = (),
        *,
        factor: float = 1.5,
    ) -> OverfittingVerdict:
        """Checks; remembers a good state, or goes back to the last good one and raises the noise.

        It goes back where that regains something: where the remembered state withstands PGD by more
        than `gap` better than an overfitted one, in the ball of the objective's present strength.
        Noise rises from none to eps, then by `factor`, up to 8 eps.

        An overfitted state with nothing to regain stays. Where PGD leaves less than half of what
        FGSM leaves, the noise rises all the same, up to N-FGSM's 2 eps: a model that is only early
        in its training looks like that too, and more noise would cost it its accuracy.

        Args:
            model: The model in training.
            images: A few hundred, in each call the same.
            objective: Of a single step, whose noise can be raised.
            parts: What else goes back: the optimizer, an average of the weights. The same ones in
                every call, and never what counts the privacy that was spent.
            factor: By how much the noise is raised, above 1.
        """
        if not factor > 1:
            raise AttackError(f"factor: expected a number above 1, got {factor}")
        noise, strength = objective.noise, objective.strength
        verdict = self.check(model, images, strength=strength)
        held: list[_Stateful] = [model, *parts]
        present = [copy.deepcopy(part.state_dict()) for part in held]
        if not verdict.overfitted:
            self._good = present
            return verdict
        returned = bool(self._good)
        if self._good:
            _take_back(held, self._good)
            before = self.check(model, images, strength=strength).iterative
            returned = before - verdict.iterative > self._gap
            if not returned:
                _take_back(held, present)
                self._good = present if before <= verdict.iterative else self._good
        if returned or verdict.iterative < _FAIR * verdict.single_step:
            most = _LARGEST_NOISE if returned else _USUAL_NOISE
            objective.noise = max(noise, min(most, max(1.0, noise * factor)))
        return replace(verdict, returned=returned)

    def state_dict(self) -> dict[str, Any]:
        """The last good state, so that a resumed training can still go back to it."""
        return {"good": list(self._good)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`, of a guard of the same parts; what is none changes nothing."""
        good = state.get("good")
        if not isinstance(good, list) or not all(isinstance(part, dict) for part in good):
            raise AttackError("guard: expected its state_dict, with a list of states under 'good'")
        self._good = copy.deepcopy(good)

    @staticmethod
    def _accuracy(attacker: Attack, model: nn.Module, images: HeldOut | TrainingImages) -> float:
        """The share that is right under an attack, the same each time for the same model."""
        found = attacker(model, images.images, images.labels, seed=0)
        with attack_scope(model, seed=0), torch.no_grad():
            predicted = model(found).argmax(dim=1)
        return float((predicted == images.labels.to(predicted.device)).float().mean())


def _take_back(held: Sequence[_Stateful], states: Sequence[Mapping[str, Any]]) -> None:
    """Gives each part its state; a copy, since some parts go on with the tensors they are given."""
    for part, state in zip(held, states, strict=True):
        part.load_state_dict(copy.deepcopy(state))
