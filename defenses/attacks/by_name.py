"""The attacks by name: a table of our classes, and the adapter of torchattacks for the others.

A name that is in both is ours.
"""

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from defenses.attacks import _torchattacks
from defenses.attacks.adaptive import Loss
from defenses.attacks.apgd import APGD, APGDT
from defenses.attacks.attack import (
    TARGETED,
    Attack,
    Setting,
    check_threat,
    meant,
    unknown_setting,
)
from defenses.attacks.boundary import FAB, DeepFool, UntargetedFAB
from defenses.attacks.pgd import FFGSM, FGSM, NFGSM, PGD
from defenses.attacks.shortest import CW, EADEN, EADL1
from defenses.attacks.square import Square
from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.threat import Norm, ThreatModel

__all__ = ["ATTACKS", "attack", "attack_names", "bears_our_name"]

# Those that can be trained on stand in the order in which `OBJECTIVES` lists them.
_CLASSES: tuple[type[Attack], ...] = (
    *(NFGSM, FFGSM, FGSM, PGD),
    *(APGD, APGDT, CW, DeepFool, EADEN, EADL1, FAB, Square, UntargetedFAB),
)
ATTACKS: Mapping[str, type[Attack]] = {each.name: each for each in _CLASSES}
"""Our own attacks."""


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
        **settings: Further settings, by the names of the attack's fields or by torchattacks' names,
            such as `random_start`; each is checked against what the attack takes.

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
    named = dict(
        steps=steps, step_size=step_size, restarts=restarts, loss=loss, surrogate=surrogate
    )
    given: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    given |= settings
    kind = ATTACKS.get(name)
    if kind is None or threat.norm not in kind.norms:
        _check_known(name, given, _torchattacks.setting_names(name, threat))
        return _torchattacks.TorchAttack(threat, draws=draws, called=name, options=given)
    _check_known(name, given, kind.setting_names())
    return kind(threat, draws=draws, **given)


def bears_our_name(found: Attack) -> bool:
    """Whether it is called as an attack that `attack` makes, and is another."""
    norm = found.threat.norm
    if found.name not in attack_names(norm):
        return False
    kind = ATTACKS.get(found.name)
    ours = kind if kind is not None and norm in kind.norms else _torchattacks.TorchAttack
    return type(found) is not ours


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
    able = dict.fromkeys(_torchattacks.names(norm), False)
    able |= dict.fromkeys(_torchattacks.names(norm, targeted=True), True)
    able |= {name: kind.targeted for name, kind in ATTACKS.items() if norm in kind.norms}
    return tuple(sorted(name for name, can in able.items() if can or not targeted))


TARGETED.update({norm: attack_names(norm, targeted=True) for norm in get_args(Norm)})


def _check_name(name: str, norm: Norm) -> None:
    """Refuses a name that is no attack in this norm, with the reason or where it is one."""
    if is_word(name, attack_names(norm)):
        return
    if is_word(name, _REFUSED):
        raise AttackError(f"{name} is refused: {_REFUSED[name]}")
    elsewhere = [other for other in get_args(Norm) if is_word(name, attack_names(other))]
    known = ", ".join(attack_names(norm))
    raise AttackError(
        f"no {norm} attack is called {shown(name)}{meant(name, attack_names(norm))}"
        + (f" (there is one for {', '.join(elsewhere)})" if elsewhere else "")
        + f"; there are: {known}"
    )


def _check_known(name: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Refuses a setting that the attack does not take, and lists all that it does."""
    adaptive = {"loss": "loss of your own", "surrogate": "surrogate"}
    for key, value in given.items():
        own = key in adaptive and not isinstance(value, str)
        if own and (key not in known or name not in ATTACKS):
            takers = [other for other, kind in ATTACKS.items() if key in kind.setting_names()]
            able = f"{', '.join(takers[:-1])} and {takers[-1]}"
            raise AttackError(f"{name} takes no {adaptive[key]}; {able} do")
        if key not in known:
            raise AttackError(unknown_setting(name, key, known))
        if value is None:
            raise AttackError(
                f"{name}: {key}: expected a value, got None; leave it out for the usual one"
            )


# Names that torchattacks has and we do not, each with the reason and what to use.
_REFUSED: Mapping[str, str] = {
    "autoattack": "it is several attacks; give its name to `evaluate`, or run them one by one from "
    "`defenses.attacks.autoattack`",
    "lgv": "it trains a surrogate of the model; train one yourself and attack that",
    "multiattack": "it prints and keeps state; give several attacks to `evaluate` instead",
    "vanila": "it is no attack, it returns the clean images",
}
