"""What an evaluation will run: attacks by name, configured or of your own, each under one name."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.autoattack import Preset, ensemble
from defenses.attacks.by_name import attack
from defenses.attacks.custom import custom_attack
from defenses.errors import EvaluationError
from defenses.quantities import shown
from defenses.threat import ThreatModel

__all__ = ["Crafter", "named_attacks"]

_ENSEMBLES: Mapping[str, Preset] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}

_NO_SEQUENCE = (str, bytes, Tensor, np.ndarray)

Crafter = Callable[[nn.Module, Tensor, Tensor], Tensor]


def named_attacks(
    attacks: Sequence[str | Attack | Crafter] | None, threat: ThreatModel, *, draws: int = 1
) -> dict[str, Attack]:
    """The attacks in order by the name that they have in a report.

    The name `"autoattack"` becomes the members of the ensemble, None those of the quick one; the
    second attack of one name is numbered.

    Args:
        attacks: Names, attacks or functions.

    Raises:
        AttackError: There is no attack of that name.
        EvaluationError: There is none at all, or one searches another ball.
    """
    if attacks is None:
        attacks = [
            attack(each.name, threat, draws=draws, **each.settings)  # type: ignore[arg-type]
            for each in ensemble(threat, "quick")
        ]
    alone = isinstance(attacks, _NO_SEQUENCE) or not isinstance(attacks, Iterable)
    given = [] if alone else list(attacks)
    if not given:
        raise EvaluationError(f"attacks: expected a sequence of at least one, got {shown(attacks)}")
    named: dict[str, Attack] = {}
    for found in [member for each in given for member in _members(each, threat)]:
        if found.threat != threat or found.radius > threat.eps:
            raise EvaluationError(
                f"{found!r} reaches {found.radius:g}; expected an attack on {threat}"
                + ("; n-fgsm is for training" if found.name == "n-fgsm" else "")
            )
        if found.name == "clean":
            raise EvaluationError("attacks: clean is what the images are called; name it otherwise")
        taken = sum(name.partition(" #")[0] == found.name for name in named)
        named[f"{found.name} #{taken + 1}" if taken else found.name] = found
    return named


def _members(given: str | Attack | Crafter, threat: ThreatModel) -> tuple[Attack, ...]:
    """The attacks that a name stands for: those of the ensemble, or one."""
    if isinstance(given, str):
        preset = _ENSEMBLES.get(given)
        return ensemble(threat, preset) if preset else (attack(given, threat),)
    if not callable(given):
        raise EvaluationError(f"attacks: expected a name or a callable, got {shown(given)}")
    return (given if isinstance(given, Attack) else custom_attack(given, threat),)
