"""The settings of an attack: plain values, each checked against the kind of its default."""

import math
from collections.abc import Mapping
from typing import cast

from defenses.errors import AttackError

__all__ = ["Setting", "check_settings", "settled"]

Setting = bool | int | float | str


def check_settings(
    name: str,
    given: Mapping[str, Setting],
    defaults: Mapping[str, Setting],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Refuses settings that are unknown, or of another kind than their default.

    A flag must be True or False, a whole number at least 1, a real number finite and at least 0, a
    word one of its choices.

    Args:
        name: Of the attack, for the message.
        given: What the caller asked for.
        defaults: Every setting there is, with its default.
        choices: The words that a setting of words may be.

    Raises:
        AttackError: Naming the setting.

    Example:
        >>> check_settings("n-fgsm", {"noise": 1.0}, {"noise": 2.0})
    """
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise AttackError(f"{name} takes no setting {key!r}; its settings: {known}")
        _check_setting(f"{name}: {key}", value, defaults[key], (choices or {}).get(key, ()))


def settled(
    name: str,
    given: Mapping[str, Setting],
    defaults: Mapping[str, Setting],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Setting]:
    """Every setting of an attack: what was given, checked, over the defaults.

    Raises:
        AttackError: As `check_settings`.

    Example:
        >>> settled("n-fgsm", {"noise": 1.0}, {"noise": 2.0, "step_size": 0.1})
        {'noise': 1.0, 'step_size': 0.1}
    """
    check_settings(name, given, defaults, choices)
    return {**defaults, **given}


def _check_setting(where: str, value: object, like: Setting, choices: tuple[str, ...]) -> None:
    """Refuses a value of another kind than the default, or out of its range."""
    if isinstance(like, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(like, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        expected = "a whole number, at least 1"
    elif isinstance(like, str):
        fits, expected = value in choices, " or ".join(map(repr, choices))
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and 0 <= cast(float, value) < math.inf
        expected = "a finite number, at least 0"
    if not fits:
        raise AttackError(f"{where}: expected {expected}, got {value!r}")
