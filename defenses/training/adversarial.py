"""Adversarial training as an objective: cross-entropy on attacked images, one loss per example.

The images are attacked first, behind `attack_scope`, and then go through the model once, in the
model's own modes: a recorder of per-example gradients sees exactly n examples. Each loss depends on
its own example and the model only, so a private update may clip it per example. Not so in free
adversarial training, whose perturbation is carried from one example to another.

Which attacks can be trained on, they say themselves (`Attack.trainable`). `adversarial_objective`
makes any objective by its name; those that also look at the clean images are in `trades`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting, check_classes, check_setting, check_threat
from defenses.attacks.by_name import ATTACKS, attack
from defenses.attacks.pgd import SingleStep
from defenses.errors import AttackError
from defenses.quantities import is_whole, is_word, shown
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective, Precision, check_precision
from defenses.training.trades import Mart, Trades

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "AdversarialTraining",
    "FreeAdversarialTraining",
    "adversarial_objective",
    "replayed",
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
        method: str = "n-fgsm",
        *,
        steps: int | None = None,
        step_size: float | None = None,
        early_stop: bool = False,
        seed: int = 0,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        if not is_word(method, METHODS):
            known = ", ".join(METHODS)
            raise AttackError(f"method: expected one of {known}; got {shown(method)}")
        if steps is None:
            steps = ATTACKS[method].training_steps
        check_setting(f"{method}: early_stop", early_stop, bool)
        # Only where it is on: the other methods have no such setting, and would refuse it.
        extra: dict[str, Any] = {"early_stop": True} if early_stop else {}
        super().__init__(seed=seed, label_smoothing=label_smoothing, precision=precision)
        self.attack: Attack = attack(method, threat, steps=steps, step_size=step_size, **extra)
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


@final
class FreeAdversarialTraining(AdversarialObjective):
    """Cross-entropy on images with a perturbation that every backward pass moves on.

    After Shafahi et al. (2019, arXiv 1904.12843): a batch is trained on several times in a row, and
    each time the gradient that the update takes anyway also moves the perturbation.

    The perturbation lives in a place of the batch, not with an image: it is carried to whatever
    example comes there next, as in the paper. So a loss depends on earlier examples of others, and
    no private update may take it. Give it batches through `replayed`; it learns nothing of the
    images of a batch that comes once.

    Args:
        threat: The ball to train for, `linf` only; its bounds are those of the images.
        replays: How often each batch is to come in a row (m), at least 1; for `settings` and
            `replayed`, the losses do not depend on it.
        seed: Unused, nothing is drawn.

    Attributes:
        threat: The ball at full strength.
        replays: How often each batch is to come in a row.

    Raises:
        AttackError: A value cannot be.

    Example:
        >>> objective = FreeAdversarialTraining(ThreatModel(norm="linf", eps=0.1), replays=2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))]
        >>> for images, labels in replayed(batches, objective.replays):
        ...     objective(model, images, labels).mean().backward()
    """

    per_example: ClassVar[bool] = False
    reason: ClassVar[str] = (
        "free adversarial training carries a perturbation found on one example to the next one in "
        "its place; use n-fgsm, which is as cheap"
    )

    def __init__(
        self,
        threat: ThreatModel,
        *,
        replays: int = 8,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        check_threat(threat, "free", norms=("linf",))
        check_setting("free: replays", replays, int)
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self.threat, self.replays = threat, replays
        self._change: Tensor | None = None

    def _own_settings(self) -> dict[str, Setting]:
        return {"method": "free", "replays": self.replays}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Takes the losses on the perturbed images; their backward pass moves the perturbation."""
        images = self._at_home(self.threat, model, images, labels)
        change = self._change_for(images)
        low, high = self.threat.bounds
        perturbed = (images.detach() + change).clamp_(low, high)
        if torch.is_grad_enabled() and len(images):
            perturbed.requires_grad_().register_hook(  # type: ignore[no-untyped-call]
                _Mover(change, self._strength * self.threat.eps)
            )
        return self._cross_entropy(check_classes(model(perturbed), labels), labels)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have: the perturbation too."""
        change = {} if self._change is None else {"change": self._change.clone()}
        return super().state_dict() | change

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective alike; what is none changes nothing."""
        held = state.get("change") if isinstance(state, Mapping) else None
        if held is not None and not (isinstance(held, Tensor) and held.ndim == 4):
            raise AttackError(
                "expected the state_dict of a free objective, with the perturbation of a batch "
                f"under 'change', got {shown(held)}"
            )
        super().load_state_dict(state)
        self._change = None if held is None else held.clone()

    def _change_for(self, images: Tensor) -> Tensor:
        """The perturbation of as many places as there are images; new places start at zero."""
        held = self._change
        if held is None or held.shape[1:] != images.shape[1:] or held.dtype != images.dtype:
            held = images.new_zeros(0, *images.shape[1:])
        held = held.to(images.device)
        if len(held) < len(images):
            held = torch.cat([held, torch.zeros_like(images[len(held) :])])
        self._change = held
        return held[: len(images)]


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


def replayed(
    batches: Iterable[tuple[Tensor, Tensor]], times: int, *, done: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives each batch several times in a row.

    Args:
        batches: Images and labels.
        times: How often each comes, at least 1.
        done: How often the first batch has come already.

    Raises:
        AttackError: A number is out of its range.

    Example:
        >>> batches = [(torch.zeros(1), torch.tensor([0])), (torch.ones(1), torch.tensor([1]))]
        >>> [int(labels) for _, labels in replayed(batches, 3, done=1)]
        [0, 0, 1, 1, 1]
    """
    check_setting("replayed: times", times, int)
    if not is_whole(done):
        raise AttackError(f"replayed: expected done as a whole number, got {shown(done)}")
    for batch in batches:
        for _ in range(done, times):
            yield batch
        done = 0


@dataclass(frozen=True)
class _Mover:
    """A hook: moves the change of each place by eps along the sign of its gradient."""

    change: Tensor
    eps: float

    def __call__(self, gradient: Tensor) -> None:
        with torch.no_grad():
            self.change.add_(gradient.sign(), alpha=self.eps).clamp_(-self.eps, self.eps)
