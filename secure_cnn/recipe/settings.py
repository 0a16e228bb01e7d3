"""The recipe: what to train and with which protections, in one frozen value of plain settings.

No key and no data is in it, so that it can be written into every record.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from defenses import FreeAdversarialTraining
from defenses.training.precision import Precision
from secure_cnn.errors import RunError

__all__ = ["Recipe", "Variant"]

Optimizer = Literal["sgd", "adamw"]
Norm = Literal["linf", "l2"]

_FREE = FreeAdversarialTraining.reason
_SINGLE_STEPS = ("n-fgsm", "ffgsm", "fgsm")
_LARGEST_PRIVATE_BATCH = 2048
_PLAIN_BATCH = 128
_LARGEST_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One training of a run: which of the recipe's protections are on.

    Example:
        >>> Variant(private=True, method="pgd").name
        'private+pgd'
        >>> Variant(private=False, method=None).name
        'plain'
    """

    private: bool
    method: str | None

    @property
    def name(self) -> str:
        """The protections joined by `+`, or `plain`."""
        parts = ["private"] * self.private + ([self.method] if self.method else [])
        return "+".join(parts) or "plain"

    @property
    def single_step(self) -> bool:
        """Whether it trains on single steps, and so may overfit to them."""
        return self.method in _SINGLE_STEPS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train; DP-SGD is off without `epsilon`, adversarial training without `eps`.

    Attributes:
        out: The run's folder.
        data: Name of a data set, a folder of class folders, or a `.npz` file.
        model: Name of an architecture.
        epochs: Passes over the training images, at least 1.
        batch_size: Images a step; None chooses 128, or a sixth of the data up to 2048 in a private
            training.
        optimizer: `sgd` (with momentum 0.9) or `adamw`.
        learning_rate: At its peak; None chooses by optimizer.
        weight_decay: At least 0.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        label_smoothing: In [0, 1).
        average_decay: Of the moving average of the weights, in [0, 1); 0 switches it off.
        shift: Largest random shift of the images, in pixels.
        flip: Whether images are mirrored at random.
        epsilon: Privacy budget; None trains without DP-SGD.
        delta: Its delta; None chooses the smaller of 1e-5 and a tenth of 1 / samples.
        max_grad_norm: Clipping norm.
        eps: Size of the perturbation; None trains without adversarial examples.
        eps_warmup: Share of the steps in which the perturbation grows to `eps`, in [0, 1).
        attack: How they are trained on: `n-fgsm`, `ffgsm`, `fgsm`, `pgd`, `trades`, `mart`, or
            `free`, which takes each batch several times in a row and so sees fewer of them; None
            chooses `n-fgsm` when `eps` is given.
        norm: `linf` or `l2`.
        attack_steps: Steps of an iterative attack, or replays of `free`; None takes its own.
        attack_precision: Of the convolutions within the attack, `float32` or `bfloat16`, which is
            faster where the processor has matrix units for it. Not of `free` and `trades`.
        gaussian_sigma: Trains on images with fresh Gaussian noise of this standard deviation, for a
            certificate of the same sigma; in the units of the pixels. Not with `eps`.
        guard: Whether training on single steps (`n-fgsm`, `ffgsm`, `fgsm`) is watched for
            catastrophic overfitting, after each epoch and on a few training images: then it is
            taken back to the last good epoch, and goes on with more noise. It was tuned on digits
            and can cost accuracy elsewhere. Not in a private training, whose epsilon would not
            cover the decision.
        trials: How many settings were tried on these private data, this one among them. It is
            written down beside epsilon, which does not charge it; None says that it is not known.
        robust_samples: Test images that are attacked at the end; None takes all.
        baseline: Whether a protected run also trains the same network without protections, to show
            what they cost.
        seed: Of everything that is not secret.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        RunError: A setting is out of range or contradicts another.

    Example:
        >>> recipe = Recipe(data="fashion-mnist", epsilon=3.0, eps=0.1, out="runs/1")
        >>> recipe.variant.name, [variant.name for variant in recipe.variants]
        ('private+n-fgsm', ['plain', 'private+n-fgsm'])
    """

    out: str | Path
    data: str = "digits"
    model: str = "compact"
    epochs: int = 20
    batch_size: int | None = None
    optimizer: Optimizer = "sgd"
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    label_smoothing: float = 0.0
    average_decay: float = 0.99
    shift: int = 0
    flip: bool = False
    epsilon: float | None = None
    delta: float | None = None
    max_grad_norm: float = 1.0
    eps: float | None = None
    eps_warmup: float = 0.0
    attack: str | None = None
    norm: Norm = "linf"
    attack_steps: int | None = None
    attack_precision: Precision = "float32"
    gaussian_sigma: float | None = None
    guard: bool = False
    trials: int | None = None
    robust_samples: int | None = 1000
    baseline: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", str(self.out))
        object.__setattr__(self, "data", str(self.data))
        self._check_companions()
        self._check_private_companions()
        _check(self.optimizer in get_args(Optimizer), "optimizer", "sgd or adamw", self.optimizer)
        _check(self.norm in get_args(Norm), "norm", "linf or l2", self.norm)
        _check(
            self.attack_precision in get_args(Precision),
            "attack_precision",
            "float32 or bfloat16",
            self.attack_precision,
        )
        _check(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _check(
            self.batch_size is None or self.batch_size >= 1,
            "batch_size",
            "at least 1",
            self.batch_size,
        )
        _check(0 <= self.warmup < 1, "warmup", "a share in [0, 1)", self.warmup)
        _check(0 <= self.eps_warmup < 1, "eps_warmup", "a share in [0, 1)", self.eps_warmup)
        decay = self.weight_decay
        _check(math.isfinite(decay) and decay >= 0, "weight_decay", "a number >= 0", decay)
        smoothing = self.label_smoothing
        _check(0 <= smoothing < 1, "label_smoothing", "a number in [0, 1)", smoothing)
        average = self.average_decay
        _check(0 <= average < 1, "average_decay", "a number in [0, 1)", average)
        _check(self.shift >= 0, "shift", "at least 0 pixels", self.shift)
        _check(0 <= self.seed < 2**63, "seed", "0 up to 2**63", self.seed)
        samples = self.robust_samples
        _check(samples is None or samples >= 1, "robust_samples", "at least 1", samples)
        rate = self.learning_rate
        _check(
            rate is None or (math.isfinite(rate) and rate > 0),
            "learning_rate",
            "a number > 0",
            rate,
        )

    def _check_private_companions(self) -> None:
        """Refuses what means nothing without epsilon, and a number of trials that is none."""
        for name in ("delta", "trials"):
            if getattr(self, name) is not None and self.epsilon is None:
                raise RunError(f"{name}: expected epsilon with it, got none; give both or neither")
        trials = self.trials
        _check(trials is None or _is_count(trials), "trials", "a whole number >= 1", trials)

    def _check_companions(self) -> None:
        """Refuses settings that mean nothing without another, or contradict it."""
        if self.attack is not None and self.eps is None:
            raise RunError(
                f"attack={self.attack}: expected eps, the size of the perturbation, got none"
            )
        if self.attack_steps is not None and self.eps is None:
            raise RunError("attack_steps: expected eps with it, got none; give both or neither")
        if self.attack_precision != "float32" and self.eps is None:
            raise RunError(
                f"attack_precision={self.attack_precision}: expected eps with it, got none; leave "
                "it out"
            )
        if self.attack == "free" and self.epsilon is not None:
            raise RunError(f"attack=free: not in a private training: {_FREE}")
        if self.eps_warmup and self.eps is None:
            raise RunError("eps_warmup: expected eps with it, got none; give both or neither")
        if self.gaussian_sigma is not None and self.eps is not None:
            raise RunError(
                "gaussian_sigma: expected it without eps, got both; noise on top of an attack is "
                "neither N-FGSM nor what is certified, choose one"
            )
        if self.guard and self.epsilon is not None:
            raise RunError(
                "guard: not in a private training: it would decide by private images, which "
                "epsilon would not cover"
            )
        if self.guard and not self.variant.single_step:
            raise RunError(
                f"guard: expected training on single steps ({', '.join(_SINGLE_STEPS)}), got "
                f"{self.variant.name}; leave it off"
            )

    @property
    def variant(self) -> Variant:
        """The training that the recipe asks for."""
        method = (self.attack or "n-fgsm") if self.eps is not None else None
        if self.gaussian_sigma is not None:
            method = "gaussian"
        return Variant(private=self.epsilon is not None, method=method)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All trainings of the run, the recipe's own last."""
        plain = Variant(private=False, method=None)
        return (plain, self.variant) if self.baseline and self.variant != plain else (self.variant,)

    def batch_size_for(self, variant: Variant, samples: int) -> int:
        """Images a step, the recipe's own or the variant's usual."""
        if self.batch_size is not None:
            return self.batch_size
        if variant.private:
            return max(1, min(_LARGEST_PRIVATE_BATCH, samples // 6))
        return max(1, min(_PLAIN_BATCH, samples))

    def learning_rate_for(self, variant: Variant) -> float:
        """The peak learning rate, the recipe's own or the usual one of its optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "adamw":
            return 2e-3
        return 0.25 if variant.private else 0.1

    def delta_for(self, samples: int) -> float:
        """The delta of a private training on so many samples."""
        return min(_LARGEST_DELTA, 0.1 / samples) if self.delta is None else self.delta

    def changed_from(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of the settings, but `out`, that differ from those of an earlier run."""
        own = self.to_dict()
        names = sorted({*own, *settings} - {"out"})
        return [n for n in names if n not in own or n not in settings or own[n] != settings[n]]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """Reads back what `to_dict` gave.

        Raises:
            RunError: There are settings that this version does not know.
        """
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown:
            raise RunError(
                f"settings: unknown {', '.join(unknown)}; the run was made by another version"
            )
        return cls(**settings)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(fine: bool, name: str, expected: str, got: object) -> None:
    if not fine:
        raise RunError(f"{name}: expected {expected}, got {got}")
