"""What a plain argument is (a whole number, a real one, a word), and how a message shows it.

Comparing a tensor, an array or an int of hundreds of digits with a number raises errors of other
libraries; each argument is looked at here before it is compared. No value of any type raises here.
"""

import math
import operator
from collections.abc import Collection
from typing import Any, TypeGuard

import numpy as np

__all__ = [
    "LARGEST_SIGMA",
    "as_real",
    "as_whole",
    "described",
    "is_real",
    "is_whole",
    "is_word",
    "shown",
]

# Of Gaussian noise on pixels in [0, 1], in training and in certification alike: levels of 1 / 255
# and noise together then fit 16 bits.
LARGEST_SIGMA = 10

_LARGEST = 2**63 - 1
_LONGEST = 80
_LONGEST_ERROR = 300
_NO_NUMBERS = (bool, np.bool, str, bytes, complex)


def is_whole(value: object, least: int = 0, most: int = _LARGEST) -> TypeGuard[int]:
    """Whether it is an int in a range; True is none, nor is numpy's, which JSON does not take."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float, finite, that a float can hold; True is none."""
    return isinstance(value, int | float) and math.isfinite(as_real(value))


def as_whole(value: Any) -> int:
    """An integer of any library as Python's; -1 for what is none, which no range here takes."""
    try:
        return -1 if isinstance(value, bool | np.bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return -1


def as_real(value: Any) -> float:
    """A number of any library as a float; NaN for what is none, which no range takes."""
    try:
        return math.nan if isinstance(value, _NO_NUMBERS) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def is_word(value: object, words: Collection[str]) -> TypeGuard[str]:
    """Whether it is one of these words."""
    return isinstance(value, str) and value in words


def shown(value: Any) -> str:
    """A value as a message has it: on one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a strange object raises, the message is about its kind
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def described(error: BaseException) -> str:
    """Any error in one line: its type and what it says, cut off where it is long."""
    name = type(error).__name__
    try:
        words = " ".join(str(error).split())
    except Exception:
        words = ""
    words = words if len(words) <= _LONGEST_ERROR else f"{words[:_LONGEST_ERROR]}..."
    return f"{name}: {words}" if words else name
