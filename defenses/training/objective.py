"""What every adversarial objective shares: `(model, images, labels) -> losses[n]`.

A generator of its own, a strength that may grow during training, and a state to resume from.
Which images are attacked how, and which losses are taken, is in the rooms beside this one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting
from defenses.attacks.inputs import check_batch
from defenses.errors import AttackError
from defenses.quantities import as_real, as_whole, shown
from defenses.scope import check_module, home_of
from defenses.threat import ThreatModel
from defenses.training.precision import Precision, check_precision, convolutions_in

__all__ = ["AdversarialObjective", "checked_smoothing", "generator_from", "generator_in", "scaled"]


class AdversarialObjective(ABC):
    """Losses on attacked images, one an example; a base class, make one of those below it.

    The randomness of the attacks comes from a generator of its own, seeded once and advanced by
    one draw a call; the global random states and a private update's noise never move.

    Args:
        seed: Of the generator, 0 <= seed < 2**63.
        label_smoothing: Of the cross-entropy, in [0, 1); attacks always use the hard labels.
        precision: Of the attacks' convolutions.

    Attributes:
        per_example: Whether each loss depends on its own example only, now and in later calls.
        reason: Why not, where `per_example` is False.

    Raises:
        AttackError: A value is out of its range.

    Example:
        >>> from defenses import AdversarialTraining, ThreatModel
        >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
        >>> isinstance(objective, AdversarialObjective), objective.per_example
        (True, True)
    """

    per_example: ClassVar[bool] = True
    reason: ClassVar[str] = ""

    def __init__(
        self, *, seed: int, label_smoothing: float, precision: Precision = "float32"
    ) -> None:
        check_precision(precision)
        self._label_smoothing, self._precision = checked_smoothing(label_smoothing), precision
        self._strength = 1.0
        self._generator = generator_from(seed)

    @abstractmethod
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Losses [n], with a graph to the parameters unless gradients are disabled.

        Args:
            model: In whatever modes training wants; they are kept.
            images: [n, channels, height, width] in the threat model's bounds; n may be 0.
            labels: int64, [n].
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""

    @property
    def strength(self) -> float:
        """By what factor eps and the lengths of the steps are scaled, in [0, 1]; 1 at first.

        Let it grow over the first steps to warm up. Set it from the number of optimizer steps, not
        from the data or the number of batches: then each loss still depends on its own example
        only. At 0 the images are left alone.

        Raises:
            AttackError: On setting it out of range.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= as_real(value) <= 1:
            raise AttackError(f"strength: expected a number in [0, 1], got {shown(value)}")
        self._strength = float(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to craft what this one would have."""
        return {"generator": self._generator.get_state(), "strength": self._strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective with the same settings.

        Raises:
            AttackError: The state is not one; this objective is left as it was.
        """
        held = generator_in(state, "an adversarial objective")
        self.strength = state.get("strength", 1.0)
        self._generator.set_state(held)

    @staticmethod
    def _at_home(threat: ThreatModel, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images where the model computes, and in its dtype, after the batch was checked."""
        check_module(model)
        threat.check_images(images)
        check_batch(images, labels)
        device, dtype = home_of(model, images)
        return images.to(device=device, dtype=dtype)

    def _attacked(self, attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The attack's images at the present strength, with the next seed."""
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        if self._strength == 0:
            return self._at_home(attack.threat, model, images, labels)
        with convolutions_in(self._precision):
            return scaled(attack, self._strength)(model, images, labels, seed=seed)


def checked_smoothing(value: object) -> float:
    """A label smoothing, which is in [0, 1).

    Raises:
        AttackError: It is not.
    """
    smoothing = as_real(value)
    if not 0 <= smoothing < 1:
        raise AttackError(f"label_smoothing: expected a number in [0, 1), got {shown(value)}")
    return smoothing


def generator_from(seed: object) -> torch.Generator:
    """A generator of its own.

    Args:
        seed: 0 <= seed < 2**63.

    Raises:
        AttackError: It is not.
    """
    number = as_whole(seed)
    if not 0 <= number < 2**63:
        raise AttackError(f"seed: expected an integer in [0, 2**63), got {shown(seed)}")
    return torch.Generator().manual_seed(number)


def generator_in(state: object, owner: str) -> Tensor:
    """The state of the generator in that of an objective.

    Raises:
        AttackError: There is none, or it is of no generator.
    """
    try:
        if not isinstance(state, Mapping):
            raise TypeError(f"got {type(state).__name__}")
        held: Tensor = state["generator"].cpu()
        torch.Generator().set_state(held)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise AttackError(
            f"expected the state_dict of {owner}, with the state of a generator under "
            f"'generator': {error}"
        ) from error
    return held


def scaled(attack: Attack, factor: float) -> Attack:
    """The same attack in a ball smaller by `factor`, in (0, 1], with shorter steps."""
    if factor == 1:
        return attack
    return replace(
        attack,
        threat=replace(attack.threat, eps=attack.threat.eps * factor),
        radius=attack.radius * factor,
        configuration=tuple(
            (key, float(value) * factor if key == "step_size" else value)
            for key, value in attack.configuration
        ),
    )
