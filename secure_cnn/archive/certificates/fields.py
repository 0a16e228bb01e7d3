"""The fields of what a certificate says, checked against the types that they are declared with.

One function serves both doors: what a caller gives, and what a file holds. What passes is plain,
bounded and frozen, and has one text in JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from secure_cnn.archive.errors import CertificateError
from secure_cnn.archive.format.claims import JSON

__all__ = ["MOST_ITEMS", "MOST_LETTERS", "as_json", "check_fields", "from_json"]

MOST_LETTERS = 4000
"""Of one text."""
MOST_ITEMS = 8192
"""Of one list."""
_MOST_BITS = 63

_Record = TypeVar("_Record")


def check_fields(record: object) -> None:
    """Sets each field of a frozen dataclass to its plain form.

    Whole numbers become floats where those are declared, lists tuples, and mappings read-only.

    Raises:
        CertificateError: A field is of another type, not finite, or longer than is read.
    """
    for name, hint in _hints(type(record)).items():
        plain = _plain(getattr(record, name), hint, name)
        object.__setattr__(record, name, plain)


def as_json(value: object) -> JSON:
    """A record as plain JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [as_json(each) for each in value]
    if isinstance(value, Mapping):
        return {name: as_json(each) for name, each in value.items()}
    plain: Any = value
    return plain  # type: ignore[no-any-return]  # `check_fields` let nothing else in


def from_json(kind: type[_Record], value: object, path: str) -> _Record:
    """A record of what a file holds.

    Raises:
        CertificateError: It has other fields, or the record refuses one.
    """
    expected = _hints(kind).keys()
    if not isinstance(value, dict) or value.keys() != expected:
        missing = sorted(expected - value.keys()) if isinstance(value, dict) else ["all"]
        raise CertificateError(
            f"{path}: expected the fields of version 1, missing: {', '.join(missing) or 'none'}; "
            "use a newer secure-cnn"
        )
    return kind(**value)


def _hints(kind: type) -> Mapping[str, Any]:
    names: Any = kind  # which can be hashed, as the type checker does not know
    return _hints_of(names)


@cache
def _hints_of(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _plain(value: object, hint: Any, path: str) -> Any:
    """The value in the one form that its declared type has."""
    outer, inner = get_origin(hint), get_args(hint)
    if outer is UnionType:
        return _of_union(value, inner, path)
    if outer is tuple:
        if not isinstance(value, (tuple, list)) or len(value) > MOST_ITEMS:
            raise _refused(path, f"a tuple of at most {MOST_ITEMS}", value)
        return tuple(_plain(each, inner[0], f"{path}[{at}]") for at, each in enumerate(value))
    if outer is not None:
        if not isinstance(value, Mapping) or len(value) > MOST_ITEMS:
            raise _refused(path, f"a mapping of at most {MOST_ITEMS}", value)
        pairs = ((_text(name, path), each) for name, each in value.items())
        return MappingProxyType(
            {name: _plain(each, inner[1], f"{path}.{name}") for name, each in sorted(pairs)}
        )
    if is_dataclass(hint):
        return _record(value, hint, path)
    return _scalar(value, hint, path)


def _of_union(value: object, kinds: tuple[Any, ...], path: str) -> Any:
    """The value as the one of several types that it is; a float stays one."""
    if value is None and NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not NoneType]
    if len(rest) == 1:
        return _plain(value, rest[0], path)
    for kind in rest:
        if type(value) is kind or (kind is float and isinstance(value, float)):
            return _scalar(value, kind, path)
    raise _refused(path, "text, a number or a truth value", value)


def _record(value: object, kind: Any, path: str) -> object:
    if isinstance(value, kind):
        return value
    if isinstance(value, dict):
        return from_json(kind, value, path)
    raise _refused(path, f"a {kind.__name__}", value)


def _scalar(value: object, kind: Any, path: str) -> object:
    if kind is str:
        return _text(value, path)
    if kind is bool and type(value) is bool:
        return value
    if kind is int and type(value) is int and value.bit_length() <= _MOST_BITS:
        return value
    if kind is float and isinstance(value, (float, int)) and type(value) is not bool:
        number = float(value) if abs(value) < 1 << _MOST_BITS or isinstance(value, float) else None
        if number is not None and math.isfinite(number):
            return number + 0.0  # -0.0 is 0.0
    words = {bool: "True or False", int: "a whole number of 63 bits", float: "a finite number"}
    raise _refused(path, words[kind], value)


def _text(value: object, path: str) -> str:
    if type(value) is not str or len(value) > MOST_LETTERS:
        raise _refused(path, f"text of at most {MOST_LETTERS} letters", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refused(path, "text that UTF-8 can hold", value) from None
    return value


def _refused(path: str, expected: str, value: object) -> CertificateError:
    if isinstance(value, (str, int, float)):
        shown = ascii(value)
        got = shown if len(shown) <= 60 else f"{shown[:57]}..."
    else:
        got = type(value).__name__
        if isinstance(value, (tuple, list, Mapping)):
            got = f"{got} of {len(value)}"
    return CertificateError(f"{path}: expected {expected}, got {got}; correct it")
