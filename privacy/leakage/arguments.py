"""What callers pass in, given that it is what was asked for; all else is told by name.

Types say as much, and nobody has to run a type checker: without these, a wrong argument ended in
somebody else's error, often after models had been trained.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy import validate
from privacy.errors import LeakageError, PlanError

__all__ = [
    "called",
    "flags",
    "floats",
    "indices",
    "instance",
    "labels",
    "named",
    "number",
    "scores",
    "secret",
    "sequence",
    "whole",
]

_LEAST_KEY = 16

Kind = TypeVar("Kind")


def whole(name: str, value: Any, *, least: int) -> int:
    """A whole number; True and 3.0 are refused."""
    try:
        return validate.whole(name, value, least=least)
    except PlanError as error:
        raise LeakageError(str(error)) from None


def number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """A number that fits; True, "1" and what is no number are refused, and NaN fits nowhere."""
    found = math.nan
    if not isinstance(value, (bool, np.bool_, str, bytes)):
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            found = math.nan
    if math.isnan(found) or not fits(found):
        raise LeakageError(f"{name}: expected {expected}, got {validate.shown(value)}")
    return found


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """A value of a class."""
    if not isinstance(value, kind):
        raise LeakageError(f"{name}: expected {_with_article(kind.__name__)}, got {_kind(value)}")
    return value


def called(name: str, value: Any, what: str, *, takes: int = 0, seed: bool = False) -> Any:
    """What can be called, with so many values and, where one is given, a `seed`."""
    if not callable(value):
        raise LeakageError(f"{name}: expected {what}, got {validate.shown(value)}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of some functions that are not written in Python
        return value
    try:
        signature.bind(*[None] * takes, **({"seed": 0} if seed else {}))
    except TypeError as error:
        if takes:
            got = str(error).removeprefix("got ")
            cure = "; the seed is given by its name: name a parameter seed" if seed else ""
            raise LeakageError(f"{name}: expected {what}, got one with {got}{cure}") from None
    return value


def named(name: str, value: Any, what: str) -> Mapping[str, Any]:
    """A mapping with a name or more; what they stand for is looked at by who asks."""
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise LeakageError(f"{name}: expected {what} by name, got {validate.shown(value)}")
    if not value:
        raise LeakageError(f"{name}: expected at least one, got none")
    return value


def secret(name: str, value: Any) -> bytes:
    """A key that is long enough to keep rows secret."""
    if not isinstance(value, (bytes, bytearray)):
        raise LeakageError(
            f"{name}: expected at least {_LEAST_KEY} secret bytes, got {type(value).__name__}"
        )
    if len(value) < _LEAST_KEY:
        raise LeakageError(f"{name}: expected at least {_LEAST_KEY} secret bytes, got {len(value)}")
    return bytes(value)


def sequence(name: str, value: Any, what: str) -> Any:
    """A sequence of something or a one-dimensional array, and no text."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed and not (isinstance(value, np.ndarray) and value.ndim == 1):
        raise LeakageError(f"{name}: expected {what}, got {validate.shown(value)}")
    return value


def floats(name: str, value: Any, axes: int) -> Tensor:
    """A tensor of floats with so many axes."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != axes:
        raise LeakageError(
            f"{name}: expected a tensor of floats with {axes} axes, got {_kind(value)}"
        )
    return value


def scores(name: str, value: Any, *, axes: int) -> None:
    """An array of numbers with so many axes, none of them NaN."""
    fits = isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.ndim == axes
    if not fits or np.isnan(value).any():
        raise LeakageError(
            f"{name}: expected an array of numbers, none of them NaN, with {axes} axes, got "
            f"{_kind(value)}"
        )


def flags(name: str, value: Any, like: Any) -> None:
    """An array of bool of the shape of another."""
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_ or value.shape != like.shape:
        raise LeakageError(
            f"{name}: expected an array of bool {list(like.shape)}, got {_kind(value)}"
        )


def indices(name: str, value: Any) -> npt.NDArray[np.int64]:
    """Indices of examples, as int64 `[n]`; flags are refused, as is what has other axes."""
    try:
        found = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        found = np.empty((), dtype=object)
    empty = found.shape == (0,) and found.dtype == np.float64  # as of an empty list
    if found.ndim != 1 or not (empty or found.dtype.kind in "iu"):
        hint = "; give np.flatnonzero of flags" if found.dtype == np.bool_ else ""
        raise LeakageError(
            f"{name}: expected indices of examples, int64 [n], got {_kind(value)}{hint}"
        )
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < 2**63:
        raise LeakageError(
            f"{name}: expected indices of at least 0, got {found.min()} to {found.max()}: counted "
            "from the end an example could be in two lists"
        )
    return found.astype(np.int64)


def labels(value: Any) -> Tensor:
    """Labels of examples, `[n]`: whole numbers of any kind, or floats that are."""
    fits = isinstance(value, Tensor) and value.ndim == 1 and not value.is_complex()
    if not fits or (value.is_floating_point() and bool((value != value.round()).any())):
        raise LeakageError(f"labels: expected whole numbers [n], got {_kind(value)}")
    found: Tensor = value.to(torch.int64)
    return found


def _kind(value: object) -> str:
    """Of a tensor its kind and shape, without its values."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    return validate.shown(value)


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'AEIOU' else 'a'} {word}"
