"""What objectives share: `(model, images, labels) -> losses[n]`.

A generator of its own, a strength that may grow during training, a state to resume from, and the
precision of the attack's convolutions: they are most of an attack, and matrix units (AMX, tensor
cores) do them several times as fast in bfloat16; normalisation and pooling gain nothing from it.
The attack's images are used at full precision, and so are the losses on them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from defenses.attacks.attack import Attack, Setting, check_batch, check_classes, in_words
from defenses.errors import AttackError
from defenses.quantities import LARGEST_SIGMA, as_real, as_whole, is_word, shown
from defenses.scope import check_module, home_of
from defenses.threat import ThreatModel

__all__ = [
    "AdversarialObjective",
    "GaussianAugmentation",
    "Precision",
    "SeededObjective",
    "check_precision",
    "convolutions_in",
]

Precision = Literal["float32", "bfloat16"]


class SeededObjective(ABC):
    """Cross-entropies of images that are changed at random, one an example.

    The randomness comes from a generator of its own, seeded once: the global random states and a
    private update's noise never move.
    """

    per_example: ClassVar[bool] = True
    reason: ClassVar[str] = ""
    _called: ClassVar[str]

    def __init__(self, *, seed: int, label_smoothing: float) -> None:
        self._label_smoothing = as_real(label_smoothing)
        if not 0 <= self._label_smoothing < 1:
            got = shown(label_smoothing)
            raise AttackError(f"label_smoothing: expected a number in [0, 1), got {got}")
        number = as_whole(seed)
        if not 0 <= number < 2**63:
            raise AttackError(f"seed: expected an integer in [0, 2**63), got {shown(seed)}")
        self._generator = torch.Generator().manual_seed(number)

    @abstractmethod
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Losses [n], with a graph to the parameters unless gradients are disabled.

        The model's modes are kept; the images are [n, channels, ...] in the threat
        model's bounds, n may be 0.
        """

    @property
    def settings(self) -> dict[str, Setting]:
        """What it was configured with, for the record of a run."""
        return {**self._own_settings(), "label_smoothing": self._label_smoothing}

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"{type(self).__name__}({self._ball()}{settings})"

    def _ball(self) -> str:
        """The ball that it trains for, as it is shown before the settings."""
        return ""

    @abstractmethod
    def _own_settings(self) -> dict[str, Setting]:
        """Its method, and what that method was configured with."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw what this one would have."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective alike; what is none changes nothing."""
        self._generator.set_state(self._generator_in(state))

    def _generator_in(self, state: object) -> Tensor:
        """The state of the generator in that of an objective, refused if there is none."""
        try:
            if not isinstance(state, Mapping):
                raise TypeError(f"got {type(state).__name__}")
            held: Tensor = state["generator"].cpu()
            torch.Generator().set_state(held)
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise AttackError(
                f"expected the state_dict of {self._called}, with the state of a generator under "
                f"'generator': {error}"
            ) from error
        return held

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One an example, with the label smoothing, [n]."""
        labels, smoothing = labels.to(logits.device), self._label_smoothing
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


@final
class GaussianAugmentation(SeededObjective):
    """Cross-entropy on images with Gaussian noise, one loss per example.

    The noise is not clipped to the images' range, as it is not when a smoothed classifier is
    certified (Cohen et al. 2019, arXiv 1902.02918). It comes from a generator of its own, seeded
    once; the global random states and a private update's noise never move.

    Args:
        sigma: Standard deviation, in the units of the pixels, in (0, 10]; best the one of the
            certificate.
        seed: Seed of the generator, 0 <= seed < 2**63.
        label_smoothing: In [0, 1).

    Attributes:
        per_example: True: each loss depends on its own example only.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> objective = GaussianAugmentation(sigma=0.25)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> losses = objective(model, images, labels)
        >>> losses.shape, losses.requires_grad
        (torch.Size([5]), True)
    """

    _called = "a GaussianAugmentation objective"

    def __init__(self, *, sigma: float, seed: int = 0, label_smoothing: float = 0.0) -> None:
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self._sigma = as_real(sigma)
        if not 0 < self._sigma <= LARGEST_SIGMA:
            raise AttackError(
                f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {shown(sigma)}"
            )

    def _own_settings(self) -> dict[str, Setting]:
        return {"method": "gaussian", "sigma": self._sigma}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adds noise to the images, then takes the losses of the noisy ones, [n].

        Images are floating point, [n, channels, ...], in any range; n may be 0.
        """
        check_module(model)
        check_batch(images, labels)
        noise = torch.randn(images.shape, generator=self._generator)
        noisy = images + self._sigma * noise.to(device=images.device, dtype=images.dtype)
        return self._cross_entropy(check_classes(model(noisy), labels), labels)


class AdversarialObjective(SeededObjective):
    """Losses on attacked images, one an example; a base class, make one of those below it.

    The attacks draw from the objective's own generator, which advances by one draw a call.

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

    _called = "an adversarial objective"

    def __init__(
        self, *, seed: int, label_smoothing: float, precision: Precision = "float32"
    ) -> None:
        check_precision(precision)
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self._precision, self._strength = precision, 1.0

    def _ball(self) -> str:
        held: Any = self
        threat = held.attack.threat if hasattr(held, "attack") else held.threat
        return f"{in_words(threat)}; "

    @property
    def strength(self) -> float:
        """By what factor eps and the lengths of the steps are scaled, in [0, 1]; 1 at first.

        Let it grow over the first steps to warm up. Set it from the number of optimizer steps, not
        from the data or the number of batches: then each loss still depends on its own example
        only. At 0 the images are left alone.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= as_real(value) <= 1:
            raise AttackError(f"strength: expected a number in [0, 1], got {shown(value)}")
        self._strength = float(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to craft what this one would have."""
        return super().state_dict() | {"strength": self._strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective alike; what is none changes nothing."""
        held = self._generator_in(state)
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
            return attack.scaled(self._strength)(model, images, labels, seed=seed)


def check_precision(precision: object) -> None:
    """Refuses a precision that is neither `"float32"` nor `"bfloat16"`."""
    if not is_word(precision, get_args(Precision)):
        known = " or ".join(get_args(Precision))
        raise AttackError(f"precision: expected {known}, got {shown(precision)}")


@contextmanager
def convolutions_in(precision: Precision) -> Iterator[None]:
    """Within it, convolutions of float32 images are computed in a precision.

    Their results are float32 again, and so are the gradients that come back. It holds in the
    calling thread; a model in another dtype is left alone.
    """
    with nullcontext() if precision == "float32" else _Bfloat16Convolutions():
        yield


_CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})


class _Bfloat16Convolutions(TorchFunctionMode):
    """Turns what the convolutions on one to three axes are given."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _CONVOLUTIONS:
            return func(*args, **given)
        everything = [*args, *given.values()]
        if any(isinstance(each, Tensor) and each.dtype != torch.float32 for each in everything):
            return func(*args, **given)
        short = {key: _short(each) for key, each in given.items()}
        return func(*map(_short, args), **short).float()


def _short(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value
