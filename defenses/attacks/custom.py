"""An attack of the user's own: a function behind the same door as the attacks by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, final, get_args

from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.inputs import check_threat
from defenses.errors import AttackError
from defenses.quantities import shown
from defenses.threat import Norm, ThreatModel

__all__ = ["custom_attack"]


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
        Attack('darken', linf eps=0.1 in [0, 1])
    """
    if not callable(function):
        raise AttackError(f"function: expected a callable, got {type(function).__name__}")
    _check_signature(function)
    check_threat(threat)
    if not isinstance(name, str | None):
        raise AttackError(f"name: expected a word, got {shown(name)}")
    called = name or str(getattr(function, "__name__", type(function).__name__))
    return _Custom(threat, called=called, function=function)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class _Custom(Attack):
    """A function of the user's own as an attack."""

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
    """Refuses what cannot be called with a model, images and labels."""
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
