"""Whole and positive numbers as a plan wants them: numpy's become Python's, the rest is refused."""

import math
import operator
from typing import Any

from privacy.errors import PlanError

__all__ = ["positive", "real", "whole"]

_EXACT = 2**53


def whole(name: str, value: Any, *, least: int = 1, most: int = _EXACT) -> int:
    """A whole number in a range.

    Raises:
        PlanError: It is none; True and 3.0 are none either.

    Example:
        >>> import numpy
        >>> whole("samples", numpy.int64(7))
        7
        >>> whole("samples", True)
        Traceback (most recent call last):
        ...
        privacy.errors.PlanError: samples: expected a whole number, at least 1, got True
    """
    try:
        number = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        limit = f"at least {least}" if most == _EXACT else f"{least} to {most}"
        raise PlanError(f"{name}: expected a whole number, {limit}, got {value!r}")
    return number


def real(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        PlanError: It is none; True, "1" and a complex number are none either.

    Example:
        >>> real("epochs", 3)
        3.0
    """
    wrong = type(value).__name__ in ("bool", "bool_") or isinstance(value, (str, bytes, complex))
    try:
        number = math.nan if wrong else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"{name}: expected a finite number, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0.

    Raises:
        PlanError: It is none.

    Example:
        >>> positive("noise_multiplier", -1)
        Traceback (most recent call last):
        ...
        privacy.errors.PlanError: noise_multiplier: expected a finite number > 0, got -1
    """
    try:
        number = real(name, value)
    except PlanError:
        number = math.nan
    if not number > 0:
        raise PlanError(f"{name}: expected a finite number > 0, got {value!r}")
    return number
