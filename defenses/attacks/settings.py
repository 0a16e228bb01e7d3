"""The settings of an attack: plain values, each checked against the kind of its default."""

from collections.abc import Mapping

from defenses.errors import AttackError
from defenses.quantities import is_real, is_whole, is_word, shown

__all__ = ["Setting", "check_settings", "settled"]

# Far beyond what any setting means, and far within what float32 can compute with.
_LARGEST = 1e12

Setting = bool | int | float | str


def check_settings(
    name: str,
    given: Mapping[str, Setting],
    defaults: Mapping[str, Setting],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Refuses settings that are unknown, or of another kind than their default.

    A flag must be True or False, a whole number at least 1, a real number from 0 to 1e12, a word
    one of its choices.

    Args:
        defaults: Every setting there is, with its default.
        choices: The words that a setting of words may be.

    Raises:
        AttackError: Naming the setting.
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
    """
    check_settings(name, given, defaults, choices)
    return {**defaults, **given}


def _check_setting(where: str, value: object, like: Setting, choices: tuple[str, ...]) -> None:
    """Refuses a value of another kind than the default, or out of its range."""
    if isinstance(like, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(like, int):
        fits, expected = is_whole(value, least=1), "a whole number, at least 1"
    elif isinstance(like, str):
        fits, expected = is_word(value, choices), " or ".join(map(repr, choices))
    else:
        fits = is_real(value) and 0 <= value <= _LARGEST
        expected = f"a finite number, at least 0 and at most {_LARGEST:g}"
    if not fits:
        raise AttackError(f"{where}: expected {expected}, got {shown(value)}")
