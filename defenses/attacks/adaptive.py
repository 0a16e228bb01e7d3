"""What a user brings: a loss, a backward pass past a shattered gradient, or a whole attack.

A defence is believed only when an attack that knows it has failed (Athalye et al. 2018, arXiv
1802.00420; Tramer et al. 2020, arXiv 2002.08347).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, final, get_args

import torch
from torch import Tensor, nn

from defenses.attacks.attack import OWN_WORD, Attack, check_setting, check_threat
from defenses.errors import AttackError
from defenses.quantities import shown
from defenses.threat import Norm, ThreatModel

__all__ = ["Adaptive", "BackwardOf", "Loss", "by_example", "check_loss", "custom_attack"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, classes] and labels, int64, [n] to losses, [n], each of its own row only."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Adaptive(Attack):
    """An attack that can follow the gradient of another model (BPDA, Athalye et al. 2018).

    Attributes:
        surrogate: A differentiable stand-in, such as the model without the step that shatters its
            gradients; None follows the model's own.
    """

    surrogate: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.surrogate, nn.Module | None):
            raise AttackError(
                f"{self.name}: surrogate: expected a torch.nn.Module, got "
                f"{type(self.surrogate).__name__}"
            )

    def _asked(self, model: nn.Module) -> nn.Module:
        return model if self.surrogate is None else BackwardOf(self.surrogate, model)


@final
class BackwardOf(nn.Module):
    """The answers of one model with the gradient of another."""

    def __init__(self, surrogate: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self._model, self._surrogate = model, surrogate

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits, [n, classes]; the surrogate's must fit them and be finite."""
        with torch.no_grad():
            logits: Tensor = self._model(images)
        if not torch.is_grad_enabled():
            return logits
        stand_in: Tensor = self._surrogate(images)
        shape = list(stand_in.shape) if isinstance(stand_in, Tensor) else type(stand_in).__name__
        if shape != list(logits.shape):
            raise AttackError(
                f"surrogate: expected logits of shape {list(logits.shape)}, got {shape}"
            )
        if not bool(torch.isfinite(stand_in).all()):
            raise AttackError("surrogate: expected finite logits, got NaN or infinity")
        return logits + (stand_in - stand_in.detach())  # adds 0 exactly


def by_example(loss: Loss) -> Loss:
    """The loss, refused when it answers anything but one number an example, with a gradient."""

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        losses = loss(logits, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape:
            tensor = isinstance(losses, Tensor)
            got = f"a tensor of shape {list(losses.shape)}" if tensor else type(losses).__name__
            raise AttackError(f"loss: expected {len(labels)} losses, one an image, got {got}")
        if bool(torch.isnan(losses).any()):
            raise AttackError("loss: expected numbers, got NaN")
        if logits.requires_grad and not losses.requires_grad:
            raise AttackError("loss: no gradient reaches the logits (detached, or under no_grad?)")
        return losses

    return checked


def check_loss(name: str, loss: object, words: tuple[str, ...] = ()) -> None:
    """Refuses a loss that is neither a function nor, where there are some, one of the words."""
    if not isinstance(loss, str):
        if not callable(loss):
            raise AttackError(f"{name}: loss: expected a function, got {type(loss).__name__}")
    elif loss.startswith(OWN_WORD):
        raise AttackError(f"{name}: loss {loss!r} is a function of your own: give the function")
    elif words:
        check_setting(f"{name}: loss", loss, words)
    else:
        raise AttackError(
            f"{name}: loss: expected a function from logits [n, classes] and labels [n] to losses "
            f"[n], got {shown(loss)}"
        )


def custom_attack(
    function: Callable[[nn.Module, Tensor, Tensor], Tensor],
    threat: ThreatModel,
    *,
    name: str | None = None,
) -> Attack:
    """Makes an attack of your own function, behind the same door as the others.

    The function is called as `function(model, images, labels)` inside `attack_scope`: the model is
    in evaluation mode, the global generators are seeded, and everything is put back afterwards.
    What it returns is checked against the ball like any attack's.

    Args:
        function: Gets images on the model's device and in its dtype; returns as many images.
        threat: The ball that the images promise to be in.
        name: For reports; by default the function's own.

    Raises:
        AttackError: `function` cannot be called so, or the threat or the name is none.

    Example:
        >>> def darken(model, images, labels):
        ...     return (images - 0.1).clamp(0, 1)
        >>> custom_attack(darken, ThreatModel(norm="linf", eps=0.1))
        CustomAttack('darken', linf eps=0.1 in [0, 1])
    """
    if not callable(function):
        raise AttackError(f"function: expected a callable, got {type(function).__name__}")
    _check_signature(function)
    check_threat(threat)
    if not isinstance(name, str | None):
        raise AttackError(f"name: expected a word, got {shown(name)}")
    called = name or str(getattr(function, "__name__", type(function).__name__))
    return _CustomAttack(threat, called=called, function=function)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class _CustomAttack(Attack):
    norms: ClassVar[tuple[Norm, ...]] = get_args(Norm)

    called: str = field(repr=False)
    function: Callable[[nn.Module, Tensor, Tensor], Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        # Its name is no constant of the class, as it is of the attacks by name.
        object.__setattr__(self, "name", self.called)
        super().__post_init__()

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        return self.function(model, images, labels)


def _check_signature(function: Callable[..., object]) -> None:
    if any(each.__module__.partition(".")[0] == "torchattacks" for each in type(function).__mro__):
        raise AttackError(
            f"function: got torchattacks' {type(function).__name__}, which holds a model of its "
            "own; give the attack by its name (attack_names lists them), or a function (model, "
            "images, labels) -> images"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind("model", "images", "labels")
    except TypeError as error:
        raise AttackError(
            f"function: expected one that is called (model, images, labels), got {shown(function)} "
            f"with {signature}"
        ) from error
