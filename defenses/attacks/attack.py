"""An attack is a configured value that turns images into adversarial ones.

Here is what all have in common: how settings are checked and shown, and the door that every call
goes through. A new attack is a subclass with a `_search` in a file of its own, and a row in the
table of `by_name`. This module imports no attack.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Self, final, get_args, get_type_hints

import torch
from torch import Tensor, nn

from defenses.errors import AttackError
from defenses.quantities import is_real, is_whole, is_word, shown
from defenses.scope import answer_to, attack_scope, check_module, home_of
from defenses.shape import SHAPES, is_batch
from defenses.threat import Norm, ThreatModel

__all__ = [
    "OWN_WORD",
    "TARGETED",
    "Attack",
    "Setting",
    "check_batch",
    "check_classes",
    "check_one_each",
    "check_setting",
    "check_threat",
    "in_words",
    "meant",
    "own_name",
    "unknown_setting",
]

Setting = bool | int | float | str

OWN_WORD = "own: "
"""How the name of something of the user's own begins among the settings of a report."""

# What papers and other libraries call our settings.
_ALIASES = {
    "alpha": "step_size",
    "iterations": "steps",
    "n_queries": "steps",
    "n_restarts": "restarts",
}

# Far beyond what any setting means, and far within what float32 can compute with.
_LARGEST = 1e12

TARGETED: dict[Norm, tuple[str, ...]] = {}
"""The attacks of each norm that can seek a class, for a message.

`by_name`, which knows all attacks, fills it in: imports go from there to here only."""

# Settings that every attack, or many, inherit: they are listed after an attack's own.
_LAST = ("surrogate", "draws")


@dataclass(frozen=True, kw_only=True, repr=False)
class Attack(ABC):
    """A configured attack; make one by its class in `defenses.attacks`, or by name with `attack`.

    It holds no model and no state: calling it twice with the same seed, model and batch gives the
    same images. Settings are checked when it is made, each by its declared type: a `bool` is True
    or False, an `int` is at least 1, a `float` from 0 to 1e12. Those of other types are for the
    subclass to check, in `__post_init__`.

    Subclasses are decorated with `@dataclass(frozen=True, kw_only=True, repr=False)`. Each of their
    fields is a setting, except those with `field(repr=False)`.

    Attributes:
        name: As in `attack_names`.
        norms: In which it can search.
        targeted: Whether it can seek a class that it is given.
        trainable: Whether `AdversarialTraining` takes it as a method.
        training_steps: How many `steps` it then takes by default; None if it has no such setting.
        lengths: Settings in the units of the pixels, which shrink with the ball.
        threat: The ball it searches.
        draws: How often the model is asked each question, for one that answers at random.

    Example:
        >>> from defenses.attacks import PGD
        >>> PGD(ThreatModel(norm="linf", eps=0.1), steps=10)
        PGD(linf eps=0.1 in [0, 1]; step_size=0.025, steps=10, ...)
    """

    name: ClassVar[str]
    norms: ClassVar[tuple[Norm, ...]]
    targeted: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    training_steps: ClassVar[int | None] = None
    lengths: ClassVar[tuple[str, ...]] = ()

    threat: ThreatModel = field(kw_only=False, repr=False)
    draws: int = 1

    def __new__(cls, *given: object, **settings: object) -> Self:
        """Refuses settings that it does not take; `__init__` would raise a bare TypeError.

        A copy is made without arguments.
        """
        if len(given) > 1:
            raise AttackError(
                f"{cls.__name__}: expected the threat alone without a name, got {len(given)} values"
                "; give settings by name, such as steps=10"
            )
        known = (*cls.setting_names(), *(each.name for each in fields(cls) if each.init))
        for key in settings:
            if key not in known:
                called = getattr(cls, "name", cls.__name__)
                raise AttackError(unknown_setting(str(called), key, cls.setting_names()))
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("__call__", "_check_promise"):
            if getattr(cls, name) is not getattr(Attack, name):
                raise AttackError(
                    f"{cls.__name__}: expected a `_search` of its own, got {name} too; the door "
                    "and the check of the ball are the same for every attack"
                )

    def __post_init__(self) -> None:
        check_threat(self.threat, self.name, norms=self.norms)
        for key, kind, optional in _checked_settings(type(self)):
            value = getattr(self, key)
            if not (optional and value is None):
                check_setting(f"{self.name}: {key}", value, kind)

    @abstractmethod
    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        """The adversarial images, of the same shape, in any floating-point dtype.

        Runs inside `attack_scope`, where the global generators are seeded, on a copy of the images
        on the model's device and in its dtype, n >= 1. `targets` is None in untargeted search.
        """

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Every setting that it takes, in the order of `settings`."""
        named = [each.name for each in fields(cls) if each.repr]
        own = [name for name in named if name not in _LAST]
        return (*own, *(name for name in _LAST if name in named))

    @property
    def settings(self) -> dict[str, Setting]:
        """Every setting by name, given or by default; `draws` where it is more than one.

        What is of the user's own is there by its name; what was not brought is left out.
        """
        found = {name: getattr(self, name) for name in self.setting_names()}
        return {
            name: value if isinstance(value, Setting) else own_name(value)
            for name, value in found.items()
            if value is not None and (name, value) != ("draws", 1)
        }

    @property
    def configuration(self) -> tuple[tuple[str, Setting], ...]:
        """The settings as pairs."""
        return tuple(self.settings.items())

    @property
    def radius(self) -> float:
        """How far its images may be from the clean ones, in the threat model's norm.

        This is `threat.eps`, but larger for `n-fgsm`, which deliberately leaves the ball.
        """
        return self.threat.eps

    def scaled(self, factor: float) -> Self:
        """The same attack in a ball smaller by `factor`, in (0, 1], with shorter steps."""
        if factor == 1:
            return self
        ball = replace(self.threat, eps=self.threat.eps * factor)
        return replace(self, threat=ball, **self._shortened(factor))

    def check_shape(self, images: Tensor) -> None:  # noqa: B027
        """Refuses images of a shape that it cannot search, [n, channels, ...], n >= 1.

        Raises:
            AttackError: It cannot; here nothing is refused.
        """

    @final
    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Searches an adversarial image for each image, leaving the model as it was.

        Args:
            model: Takes images in the threat model's bounds, returns logits [n, classes].
            images: Clean images, floating point, [n, channels, height, width], or recordings
                [n, channels, length], or volumes [n, channels, depth, height, width]; n may be 0.
            labels: True classes, int64, [n].
            targets: Classes to seek, int64, [n]; None seeks any class but the true one.
            seed: Repeats the attack's random choices; None draws fresh ones.

        Returns:
            Images of the same shape on the model's device and in its dtype, each within `radius` of
            the clean one and inside the bounds, to the float tolerance that `ThreatModel.contains`
            states. An empty batch stays empty.
        """
        check_module(model)
        self.threat.check_images(images)
        check_batch(images, labels, "labels")
        if targets is not None:
            self._check_targeted()
            check_batch(images, targets, "targets")
        device, dtype = home_of(model, images)
        clean, labels = images.detach().to(device=device, dtype=dtype), labels.to(device)
        targets = None if targets is None else targets.to(device)
        if len(images) == 0:
            return clean
        self.check_shape(clean)
        asked = self._asked(model)
        if any(each.is_inference() for each in (*asked.parameters(), *asked.buffers())):
            raise AttackError(
                "model: it was made under torch.inference_mode, so that no gradient can be "
                "taken through it; make or copy it outside"
            )
        with attack_scope(asked, seed=seed):
            clean, labels = _recordable(clean), _recordable(labels)
            targets = None if targets is None else _recordable(targets)
            found = self._search(asked, clean.clone(), labels.clone(), targets)
            found = self._check_promise(asked, clean, found)
        # Another precision rounds differently: what was inside to float32 is moved back inside.
        return found if found.dtype == dtype else self.threat.project(clean, found.to(dtype))

    def __repr__(self) -> str:
        # What one class makes of many functions or torchattacks' names is told by the name.
        many = not isinstance(getattr(type(self), "name", None), str)
        settings = ", ".join(f"{key}={value!r}" for key, value in self.configuration)
        return (
            f"{type(self).__name__.lstrip('_')}({f'{self.name!r}, ' if many else ''}"
            f"{in_words(self.threat)}{'; ' if settings else ''}{settings})"
        )

    def _asked(self, model: nn.Module) -> nn.Module:
        """The model as the search asks it."""
        return model

    def _shortened(self, factor: float) -> dict[str, Any]:
        """The fields that change when the ball shrinks."""
        return {name: getattr(self, name) * factor for name in self.lengths}

    def _check_targeted(self) -> None:
        if not self.targeted:
            able = ", ".join(TARGETED.get(self.threat.norm, ())) or "none"
            raise AttackError(
                f"{self.name} cannot seek a target; {self.threat.norm} attacks that can: {able}"
            )

    def _check_promise(self, model: nn.Module, clean: Tensor, found: object) -> Tensor:
        """Refuses a result outside the ball: a figure made with it would be wrong."""
        if not isinstance(found, Tensor) or found.shape != clean.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AttackError(f"{self.name}: expected images {list(clean.shape)}, got {got}")
        found = found.detach()
        radius = min(self.radius, self.threat.width) if self.threat.norm == "linf" else self.radius
        outside = int((~replace(self.threat, eps=radius).contains(clean, found)).sum())
        if outside == 0:
            return found
        # A model that changes its images is at fault, not the attack.
        answer_to(model, clean.clone(), AttackError)
        broken = int((~torch.isfinite(found).flatten(1).all(dim=1)).sum())
        if broken:
            raise AttackError(
                f"{self.name} gave pixels that are not finite for {broken} of {len(clean)} images: "
                "it divided by a gradient that is zero or not finite; pgd and apgd do not"
            )
        raise AttackError(
            f"{self.name} left the ball of radius {radius:g} or the bounds for {outside} of "
            f"{len(clean)} images; this is a fault of the attack, do not use its figures"
        )


@functools.cache
def _checked_settings(kind: type[Attack]) -> tuple[tuple[str, type, bool], ...]:
    """Name and type of each setting that is a flag or a number, and whether it may be None.

    Read once a class: reading type hints takes longer than all checks together.
    """
    hints, found = get_type_hints(kind), []
    for name in kind.setting_names():
        allowed = set(get_args(hints[name]) or (hints[name],))
        plain = allowed - {type(None)}
        plain = {float} if plain == {int, float} else plain
        if len(plain) == 1 and plain <= {bool, int, float}:
            found.append((name, plain.pop(), type(None) in allowed))
    return tuple(found)


def _recordable(values: Tensor) -> Tensor:
    """The values as autograd may save them: not made under `torch.inference_mode`."""
    return values.clone() if values.is_inference() else values


def own_name(brought: object) -> str:
    """What a report calls a loss or a surrogate of the user's own."""
    return f"{OWN_WORD}{getattr(brought, '__name__', type(brought).__name__)}"


def in_words(threat: ThreatModel) -> str:
    """A threat model as it is shown: `linf eps=0.1 in [0, 1]`."""
    low, high = threat.bounds
    return f"{threat.norm} eps={threat.eps:g} in [{low:g}, {high:g}]"


def unknown_setting(name: str, key: str, known: Sequence[str]) -> str:
    """That an attack has no such setting, and what may be meant; for a message."""
    return f"{name} takes no setting {key!r}{meant(key, known)}; its settings: {', '.join(known)}"


def meant(word: object, known: Sequence[str]) -> str:
    """A question for the known word that is like a given one, or nothing."""
    if not isinstance(word, str):
        return ""
    likely = _ALIASES.get(word.lower(), word.lower())
    near = [likely] if likely in known else get_close_matches(likely, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_setting(where: str, value: object, kind: object) -> None:
    """Refuses a setting that is no `bool`, `int` >= 1, `float` from 0 to 1e12, or word of these."""
    if kind is bool:
        fits, expected = isinstance(value, bool), "True or False"
    elif kind is int:
        fits, expected = is_whole(value, least=1), "a whole number, at least 1"
    elif isinstance(kind, tuple):
        fits, expected = is_word(value, kind), " or ".join(map(repr, kind))
    else:
        fits = is_real(value) and 0 <= value <= _LARGEST
        expected = f"a finite number, at least 0 and at most {_LARGEST:g}"
    if not fits:
        raise AttackError(f"{where}: expected {expected}, got {shown(value)}")


def check_threat(threat: object, owner: str = "", *, norms: Sequence[Norm] = ()) -> None:
    """Refuses what is no threat model, or one in a norm that its owner does not search."""
    where = f"{owner}: expected a threat" if owner else "threat: expected a ThreatModel"
    if not isinstance(threat, ThreatModel):
        raise AttackError(f"{where}, got {shown(threat)}")
    if norms and threat.norm not in norms:
        raise AttackError(f"{where} in {' or '.join(norms)}, got {threat.norm}")


def check_batch(images: object, classes: object, what: str = "labels") -> None:
    """Refuses images that are not [n, channels, ...], and classes not int64 >= 0, [n]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise AttackError(f"images: expected a floating-point tensor, got {got}")
    if not is_batch(images):
        raise AttackError(f"images: expected {SHAPES}; got {list(images.shape)}")
    classes = check_one_each(classes, images, what)
    if len(classes) and int(classes.min()) < 0:
        raise AttackError(f"{what}: expected 0 or more, got {int(classes.min())}")


def check_one_each(classes: object, images: Tensor, what: str = "labels") -> Tensor:
    """The classes, refused unless they are int64 and one for each image."""
    if not isinstance(classes, Tensor):
        raise AttackError(f"{what}: expected an int64 tensor, got {type(classes).__name__}")
    if classes.dtype != torch.int64 or classes.shape != images.shape[:1]:
        told = "" if images.ndim > 3 else f"; images are {list(images.shape)}, expected {SHAPES}"
        raise AttackError(
            f"{what}: expected int64 of shape [{len(images)}], one for each image, "
            f"got {classes.dtype} of shape {list(classes.shape)}{told}"
        )
    return classes


def check_classes(logits: object, labels: Tensor) -> Tensor:
    """The logits, refused unless they are [n, classes] with a class for every label."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AttackError(f"model: expected logits of shape [{len(labels)}, classes], got {got}")
    classes = logits.shape[1]
    if len(labels) and int(labels.max()) >= classes:
        raise AttackError(
            f"labels: expected 0 to {classes - 1} for a model of {classes} classes, "
            f"got {int(labels.max())}"
        )
    return logits
