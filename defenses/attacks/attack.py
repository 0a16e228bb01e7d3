"""An attack is a configured value that turns images into adversarial ones.

`attack(name, threat, ...)` makes one by name, `custom.custom_attack` one of a function
of your own. Every call goes through `attack_scope`, and what comes back is checked against the ball
that was promised.

Own attacks are rows of `OWN`; torchattacks has the others, through its adapter. A name that is in
both is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final, get_args

import torch
from torch import Tensor, nn

from defenses.attacks import _torchattacks
from defenses.attacks.adaptive import BackwardOf, Loss, check_brought, own_name
from defenses.attacks.inputs import check_batch, check_threat
from defenses.attacks.own import OWN, own_attack
from defenses.attacks.settings import Setting, check_settings
from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.scope import answer_to, attack_scope, check_module, home_of
from defenses.threat import Norm, ThreatModel

__all__ = ["Attack", "Search", "Setting", "attack", "attack_names"]

# (attack, model, images, labels, targets or None) -> images: runs inside `attack_scope`, where the
# global generators are seeded, on detached images of the model's device and dtype.
Search = Callable[["Attack", nn.Module, Tensor, Tensor, Tensor | None], Tensor]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Attack:
    """A configured attack; make one with `attack`.

    It holds no model and no state: calling it twice with the same seed, model and batch gives the
    same images.

    Attributes:
        name: As in `attack_names`.
        threat: The ball it searches.
        radius: How far its images may be from the clean ones, in the threat model's norm. This is
            `threat.eps`, but larger for `n-fgsm`, which deliberately leaves the ball in training.
        configuration: Every setting with its value, as pairs.
        targeted: Whether it can seek a class that it is given.
        search: What runs on the model, inside the scope.
        draws: How often the model is asked each question, for one that answers at random.
        loss: What it climbs, where that is a function of your own.
        surrogate: Whose gradient it follows, where that is not the model's.

    Example:
        >>> attack("pgd", ThreatModel(norm="linf", eps=0.1), steps=10)
        Attack('pgd', linf eps=0.1 in [0, 1]; step_size=0.025, steps=10, ...)
    """

    name: str
    threat: ThreatModel
    radius: float
    configuration: tuple[tuple[str, Setting], ...]
    targeted: bool
    search: Search = field(repr=False)
    draws: int = 1
    loss: Loss | None = field(default=None, repr=False)
    surrogate: nn.Module | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, Setting]:
        """Every setting of the attack by name: those given and those by default."""
        return dict(self.configuration)

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
            images: Clean images, floating point, [n, channels, height, width]; n may be 0.
            labels: True classes, int64, [n].
            targets: Classes to seek, int64, [n]; None seeks any class but the true one.
            seed: Repeats the attack's random choices; None draws fresh ones.

        Returns:
            Images on the model's device and in its dtype, [n, channels, height, width], each
            within `radius` of the clean one and inside the bounds, to the float tolerance that
            `ThreatModel.contains` states. An empty batch stays empty.

        Raises:
            ThreatModelError: The images are not in the bounds, or every image is in the ball.
            AttackError: The labels do not fit, the model's logits are unusable, the attack cannot
                seek a target, or it broke its promise.
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
        asked = model if self.surrogate is None else BackwardOf(self.surrogate, model)
        if any(each.is_inference() for each in (*asked.parameters(), *asked.buffers())):
            raise AttackError(
                "model: it was made under torch.inference_mode, so that no gradient can be "
                "taken through it; make or copy it outside"
            )
        with attack_scope(asked, seed=seed):
            clean, labels = _recordable(clean), _recordable(labels)
            targets = None if targets is None else _recordable(targets)
            found = self.search(self, asked, clean.clone(), labels, targets)
            found = self._check_promise(asked, clean, found)
        # Another precision rounds differently: what was inside to float32 is moved back inside.
        return found if found.dtype == dtype else self.threat.project(clean, found.to(dtype))

    def __repr__(self) -> str:
        low, high = self.threat.bounds
        threat = f"{self.threat.norm} eps={self.threat.eps:g} in [{low:g}, {high:g}]"
        settings = ", ".join(f"{key}={value!r}" for key, value in self.configuration)
        return f"Attack({self.name!r}, {threat}{'; ' if settings else ''}{settings})"

    def _check_targeted(self) -> None:
        """Refuses targets for an attack that cannot seek one."""
        if not self.targeted:
            able = ", ".join(attack_names(self.threat.norm, targeted=True)) or "none"
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
        answer_to(model, clean.clone(), AttackError)  # whose fault is it?
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


def attack(
    name: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
    draws: int = 1,
    loss: str | Loss | None = None,
    surrogate: nn.Module | None = None,
    **settings: Setting,
) -> Attack:
    """Configures an attack; nothing runs yet.

    What is not given takes the standard's value (PGD, APGD, APGD-T and FAB 100 steps, Square
    5000 queries; in l1 APGD 5 restarts) or torchattacks' default; step sizes scale with eps
    (2.5 eps / steps). `cw` and `deepfool` look for the shortest change: theirs is shortened to eps
    where it is longer.

    Args:
        name: One of `attack_names(threat.norm)`: `pgd` (Madry et al. 2018, arXiv 1706.06083),
            `apgd`, `apgdt` (Croce & Hein 2020, arXiv 2003.01690), `ffgsm` (FGSM-RS, Wong et al.
            2020, arXiv 2001.03994), `n-fgsm` (de Jorge et al. 2022, arXiv 2202.01181; settings
            `noise`, in multiples of eps, and `step_size`), ...
        threat: The ball to search.
        steps: Gradient steps, at least 1.
        step_size: Length of a step, in the units of the pixels.
        restarts: Random restarts, for the attacks that have them.
        draws: Of a random model's answer, at least 1: gradients are the mean over so many draws of
            the gradient of each draw's loss (Athalye et al. 2018, arXiv 1802.00420), and the attack
            costs as many times more. CW, EAD, Square and torchattacks' see the mean of the logits.
        loss: What `pgd` and `apgd` climb, a function of your own from logits [n, classes] and
            labels [n] to losses [n]; with targets they go down it. For `apgd` also `"ce"`,
            `"scaled-ce"` or `"dlr"`.
        surrogate: For `pgd`, `apgd` and `apgdt`: a differentiable stand-in of the model, such as
            the model without the step that shatters its gradients. Answers are the model's,
            gradients go backwards through the stand-in (BPDA, Athalye et al. 2018).
        **settings: Further settings by torchattacks' names, such as `random_start`; each is
            checked against what the attack takes.

    Raises:
        AttackError: No such attack in this norm, no such setting, or a value that cannot be.

    Example:
        >>> attack("pgd", ThreatModel(norm="linf", eps=0.1), momentum=0.9)
        Traceback (most recent call last):
        ...
        defenses.errors.AttackError: pgd takes no setting 'momentum'; its settings: ...
    """
    check_threat(threat)
    _check_name(name, threat.norm)
    own = own_attack(name, threat.norm)
    check_brought(name, loss, surrogate, able=() if own is None else own.adapts)
    word = loss if isinstance(loss, str) else None
    named = {"steps": steps, "step_size": step_size, "restarts": restarts, "loss": word}
    given = {key: value for key, value in named.items() if value is not None} | settings
    check_settings(name, {"draws": draws}, {"draws": 1})
    brought: dict[str, Setting] = {}
    if not isinstance(loss, str | None):
        brought["loss"] = own_name(loss)
    if surrogate is not None:
        brought["surrogate"] = own_name(type(surrogate))
    if draws > 1:
        brought["draws"] = draws
    _check_known(name, threat, given)
    if own is None:
        settled, radius = _torchattacks.settle(name, threat, given), threat.eps
    else:
        settled, radius = own.settle(threat, given)
    return Attack(
        name=name,
        threat=threat,
        radius=radius,
        configuration=tuple((settled | brought).items()),
        targeted=name in attack_names(threat.norm, targeted=True),
        search=_torchattacks.search if own is None else own.search,
        draws=draws,
        loss=None if isinstance(loss, str) else loss,
        surrogate=surrogate,
    )


def attack_names(norm: Norm, *, targeted: bool = False) -> tuple[str, ...]:
    """The attacks there are for a norm, sorted; with `targeted`, those that can seek a class.

    Raises:
        AttackError: There is no such norm.

    Example:
        >>> "n-fgsm" in attack_names("linf"), "n-fgsm" in attack_names("l2")
        (True, False)
        >>> "deepfool" in attack_names("l2", targeted=True)
        False
    """
    if not is_word(norm, get_args(Norm)):
        known = ", ".join(get_args(Norm))
        raise AttackError(f"norm: expected one of {known}; got {shown(norm)}")
    own = {name: row.targeted for name, row in OWN.items() if norm in row.norms}
    able = dict.fromkeys(_torchattacks.names(norm), False)
    able |= dict.fromkeys(_torchattacks.names(norm, targeted=True), True) | own
    return tuple(sorted(name for name, can in able.items() if can or not targeted))


def _check_name(name: str, norm: Norm) -> None:
    """Refuses a name that is no attack in this norm, with the reason or where it is one."""
    if is_word(name, attack_names(norm)):
        return
    if is_word(name, _REFUSED):
        raise AttackError(f"{name} is refused: {_REFUSED[name]}")
    elsewhere = [other for other in get_args(Norm) if is_word(name, attack_names(other))]
    known = ", ".join(attack_names(norm))
    raise AttackError(
        f"no {norm} attack is called {shown(name)}"
        + (f" (there is one for {', '.join(elsewhere)})" if elsewhere else "")
        + f"; there are: {known}"
    )


def _check_known(name: str, threat: ThreatModel, given: Mapping[str, object]) -> None:
    """Refuses a setting that the attack does not take, and lists all that it does."""
    own = own_attack(name, threat.norm)
    adapts = () if own is None else own.adapts
    settled = _torchattacks.settle(name, threat, {}) if own is None else own.settle(threat, {})[0]
    if "loss" in adapts and "loss" in given and "loss" not in settled:
        raise AttackError(
            f"{name}: loss: expected a function from logits [n, classes] and labels [n] to losses "
            f"[n], got {shown(given['loss'])}"
        )
    known = list(dict.fromkeys([*settled, *adapts, "draws"]))
    for key in given:
        if key not in known:
            raise AttackError(f"{name} takes no setting {key!r}; its settings: {', '.join(known)}")


def _recordable(values: Tensor) -> Tensor:
    """The values as autograd may save them: not made under `torch.inference_mode`."""
    return values.clone() if values.is_inference() else values


# Names that torchattacks has and we do not, each with the reason and what to use.
_REFUSED: Mapping[str, str] = {
    "autoattack": "it is several attacks; give its name to `evaluate`, or run them one by one from "
    "`defenses.attacks.autoattack`",
    "lgv": "it trains a surrogate of the model; train one yourself and attack that",
    "multiattack": "it prints and keeps state; give several attacks to `evaluate` instead",
    "vanila": "it is no attack, it returns the clean images",
}
