"""Adversarial training as an objective: cross-entropy on attacked images, one loss per example.

The images are attacked first, behind `attack_scope`, and then go through the model once, in the
model's own modes: a recorder of per-example gradients sees exactly n examples. Each loss depends on
its own example and the model only, so a private update may clip it per example.

Which attacks can be trained on, they say themselves (`Attack.trainable`). `adversarial_objective`
makes any objective by its name; those that also look at the clean images are in `trades`, and one
that carries its perturbation from batch to batch in `free`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from defenses.attacks.attack import (
    Attack,
    Setting,
    check_setting,
    check_threat,
    in_words,
    meant,
)
from defenses.attacks.by_name import ATTACKS, attack, bears_our_name
from defenses.attacks.pgd import SingleStep
from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.threat import ThreatModel
from defenses.training.free import FreeAdversarialTraining
from defenses.training.objective import AdversarialObjective, Precision, check_precision
from defenses.training.trades import Mart, Trades

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "AdversarialTraining",
    "adversarial_objective",
]

METHODS: tuple[str, ...] = tuple(name for name, kind in ATTACKS.items() if kind.trainable)
"""Names of the attacks that can be trained on."""


@final
class AdversarialTraining(AdversarialObjective):
    """Cross-entropy on adversarial images, one loss per example.

    Methods: `"n-fgsm"` (one step from strong noise; de Jorge et al. 2022, arXiv 2202.01181: the
    cheapest that rarely collapses, linf only), `"pgd"` (Madry et al. 2018, arXiv 1706.06083; 10
    steps), `"ffgsm"` (FGSM-RS; Wong et al. 2020, arXiv 2001.03994, linf only) and `"fgsm"`
    (Goodfellow et al. 2015, arXiv 1412.6572; linf only, collapses at large eps: a baseline).

    Args:
        threat: The ball to train for; its bounds are those of the images.
        method: How the adversarial images are found: a name, or a configured attack in the same
            ball. One of your own is a subclass of `Attack` that says `trainable = True`, with
            which it promises that each image is found from its own example alone.
        steps: Gradient steps, for `"pgd"` only. A configured attack has its own, and so its length
            of a step and its stop.
        step_size: Length of a step; by default 2.5 eps / steps for `"pgd"`, 1.25 eps for
            `"ffgsm"` and eps for `"n-fgsm"`.
        early_stop: For `"pgd"` only: an image that is fooled is left alone, and the others go on
            as a smaller batch: cheaper, and weaker training where most are fooled early.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: In [0, 1); the attack always uses the hard labels.
        precision: Of the convolutions within the attack; the losses are always taken in the model's
            own. `"bfloat16"` is faster where the processor has matrix units for it (AMX, tensor
            cores), and slower elsewhere; it changes the sign of a few percent of the gradient.

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
        method: str | Attack = "n-fgsm",
        *,
        steps: int | None = None,
        step_size: float | None = None,
        early_stop: bool = False,
        seed: int = 0,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        check_threat(threat)
        check_setting("early_stop", early_stop, bool)
        # Only where it is on: the other methods have no such setting, and would refuse it.
        extra: dict[str, Any] = {"early_stop": True} if early_stop else {}
        given = {"steps": steps, "step_size": step_size, **extra}
        super().__init__(seed=seed, label_smoothing=label_smoothing, precision=precision)
        self.attack = (
            _configured(method, threat, given)
            if isinstance(method, Attack)
            else _by_name(method, threat, given)
        )
        self._first = self.attack

    def _own_settings(self) -> dict[str, Setting]:
        attack = self.attack
        return {"method": attack.name, "precision": self._precision, **attack.settings}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Attacks the images, then takes the losses of the adversarial ones, [n]."""
        return self._cross_entropy(
            model(self._attacked(self.attack, model, images, labels)), labels
        )

    @property
    def single_step(self) -> bool:
        """Whether it takes one step, so that it has a noise and may overfit to that step."""
        return isinstance(self._first, SingleStep)

    @property
    def noise(self) -> float:
        """The uniform noise before the one step, in multiples of eps.

        It is 2 for `"n-fgsm"`, 1 for `"ffgsm"` and 0 for `"fgsm"`. More of it keeps training from
        collapsing: with another noise than its own each of them is an N-FGSM, with the same step.
        """
        return float(self._noisy(self.attack).start_noise)

    @noise.setter
    def noise(self, value: float) -> None:
        check_setting("n-fgsm: noise", value, float)
        self.attack = self._noisy(self._first).with_noise(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to craft what this one would have."""
        raised = {"noise": self.noise} if self.single_step else {}
        return super().state_dict() | raised

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective alike; what is none changes nothing."""
        before = self.attack
        try:
            if isinstance(state, Mapping) and "noise" in state:
                self.noise = state["noise"]
            super().load_state_dict(state)
        except AttackError:
            self.attack = before
            raise

    @staticmethod
    def _noisy(attack: Attack) -> SingleStep:
        if not isinstance(attack, SingleStep):
            able = [name for name in METHODS if issubclass(ATTACKS[name], SingleStep)]
            raise AttackError(f"noise: {attack.name} has none; these have: {', '.join(able)}")
        return attack


def _by_name(method: object, threat: ThreatModel, given: dict[str, Any]) -> Attack:
    """The attack of a name, with as many steps as are usual in training."""
    if not is_word(method, METHODS):
        raise AttackError(
            f"method: expected one of {', '.join(METHODS)}, or a configured attack such as "
            f"PGD(threat, steps=7); got {shown(method)}{meant(method, METHODS)}"
        )
    if given["steps"] is None:
        given["steps"] = ATTACKS[method].training_steps
    return attack(method, threat, **given)


def _configured(method: Attack, threat: ThreatModel, given: Mapping[str, Any]) -> Attack:
    """The attack itself, refused where it cannot be trained on, or is given settings beside it."""
    if beside := [key for key, value in given.items() if value is not None]:
        raise AttackError(
            f"{', '.join(beside)}: expected none beside a configured attack, got {method!r}; "
            "configure it there"
        )
    if method.threat != threat:
        raise AttackError(
            f"method: expected an attack on {in_words(threat)}, the threat model that is given "
            f"too, got {method!r}"
        )
    if bears_our_name(method):
        raise AttackError(f"{method.name}: {method!r} is yours: give it a name of its own")
    if not method.trainable:
        raise AttackError(
            f"{method.name}: it does not say that it can be trained on; those of ours that do are "
            f"{', '.join(METHODS)}, and a subclass of Attack does with trainable = True"
        )
    return method


@dataclass(frozen=True, kw_only=True)
class _Named:
    """An objective that is no method of `AdversarialTraining`, as `adversarial_objective` makes it.

    Attributes:
        counted: Its setting that `steps` gives.
        rounds: Whether it takes another precision.
    """

    make: Callable[..., AdversarialObjective]
    counted: str = "steps"
    rounds: bool = False


_OTHERS: Mapping[str, _Named] = {
    "trades": _Named(make=Trades),
    "mart": _Named(make=Mart, rounds=True),
    "free": _Named(make=FreeAdversarialTraining, counted="replays"),
}

OBJECTIVES: tuple[str, ...] = (*METHODS, *_OTHERS)
"""Names of the objectives."""


def adversarial_objective(
    name: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    precision: Precision = "float32",
) -> AdversarialObjective:
    """Makes an objective with its usual settings; nothing runs yet.

    Args:
        name: One of `OBJECTIVES`.
        threat: The ball to train for.
        steps: Gradient steps of the attack, or replays of a batch for `free`; None takes 10, or 8
            replays. Single-step methods take none.
        precision: Of the attack's convolutions. Not of `free`, whose passes are those of training,
            nor of `trades`, whose first step starts where the divergence is all rounding.

    Raises:
        AttackError: An unknown name, or a value that cannot be.

    Example:
        >>> adversarial_objective("trades", ThreatModel(norm="linf", eps=0.1)).settings["steps"]
        10
    """
    if not is_word(name, OBJECTIVES):
        raise AttackError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {shown(name)}")
    if name in METHODS:
        return AdversarialTraining(
            threat,
            name,
            steps=steps,
            seed=seed,
            label_smoothing=label_smoothing,
            precision=precision,
        )
    row = _OTHERS[name]
    check_precision(precision)
    if precision != "float32" and not row.rounds:
        raise AttackError(f"precision: {name} takes float32 only, got {precision!r}")
    settings: dict[str, Any] = {} if steps is None else {row.counted: steps}
    settings |= {"precision": precision} if row.rounds else {}
    return row.make(threat, seed=seed, label_smoothing=label_smoothing, **settings)
