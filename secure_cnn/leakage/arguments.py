"""What callers pass in: looked at as `privacy.leakage` does, told as an error of this package."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from privacy.errors import LeakageError
from privacy.leakage import arguments
from secure_cnn.errors import RunError

__all__ = ["called", "instance", "number", "tuple_of", "whole"]

Kind = TypeVar("Kind")


def whole(name: str, value: Any, *, least: int) -> int:
    """A whole number; True and 3.0 are refused."""
    with _as_ours():
        return arguments.whole(name, value, least=least)


def number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """A number that fits; True and "1" are refused."""
    with _as_ours():
        return arguments.number(name, value, expected, fits)


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """A value of a class."""
    with _as_ours():
        return arguments.instance(name, value, kind)


def called(name: str, value: Any, what: str) -> Any:
    """What can be called."""
    with _as_ours():
        return arguments.called(name, value, what)


def tuple_of(name: str, value: Any, kind: type[Kind]) -> tuple[Kind, ...]:
    """A tuple of one or more of a class."""
    each = instance(name, value, tuple)
    if not each:
        raise RunError(f"{name}: expected one or more, got none")
    return tuple(instance(name, one, kind) for one in each)


@contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except LeakageError as error:
        raise RunError(str(error)) from None
