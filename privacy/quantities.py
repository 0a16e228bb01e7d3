"""Whole and positive numbers as a plan wants them: numpy's become Python's, the rest is refused."""

import math
import operator
from typing import Any

from privacy.errors import PlanError

__all__ = ["positive", "probability", "real", "shown", "whole"]

_EXACT = 2**53
_LONGEST = 200


def shown(value: object) -> str:
    """A value for a message: shortened, and safe even if its own `repr` fails."""
    try:
        text = repr(value)
    except Exception:
        # Of a whole number of more than 4300 digits Python makes no text.
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def whole(name: str, value: Any, *, least: int = 1, most: int = _EXACT) -> int:
    """A whole number in a range; True and 3.0 are refused."""
    try:
        number = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        limit = f"at least {least}" if most == _EXACT else f"{least} to {most}"
        raise PlanError(f"{name}: expected a whole number, {limit}, got {shown(value)}")
    return number


def real(name: str, value: Any) -> float:
    """A finite number; True, "1" and a complex number are refused."""
    number = _finite(value)
    if math.isnan(number):
        raise PlanError(f"{name}: expected a finite number, got {shown(value)}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = _finite(value)
    if not number > 0:
        raise PlanError(f"{name}: expected a finite number > 0, got {shown(value)}")
    return number


def probability(name: str, value: Any) -> float:
    """A number between 0 and 1, neither of them included."""
    number = _finite(value)
    if not 0 < number < 1:
        raise PlanError(f"{name}: expected a probability in (0, 1), got {shown(value)}")
    return number


def _finite(value: Any) -> float:
    """The value as a finite number, or else NaN, which fails every comparison."""
    wrong = type(value).__name__ in ("bool", "bool_") or isinstance(value, (str, bytes, complex))
    try:
        number = math.nan if wrong else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
    return number if math.isfinite(number) else math.nan
