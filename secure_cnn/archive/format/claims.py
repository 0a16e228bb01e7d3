"""Claims: what a file says about the model in it, as plain JSON that everyone may read.

Claims stand in the core, so MAC, payload and signature bind them. This file turns JSON values to
canonical bytes and back, and compares claims with what a caller expects.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from secure_cnn.archive.errors import ClaimMismatch, StateError, Tampered

__all__ = [
    "JSON",
    "MAX_INTEGER_BITS",
    "canonical_json",
    "check_claims",
    "copy_claims",
    "parse_json",
]

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
MAX_INTEGER_BITS = 1024  # parsing takes quadratic time

_MAX_DEPTH = 64


def canonical_json(value: object, path: str) -> bytes:
    """ASCII JSON with sorted keys and no white space: one text for one value.

    The value is plain JSON with finite numbers, up to 64 deep; `path` is its name in messages.
    """
    _check(value, path, _MAX_DEPTH)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def copy_claims(claims: object, path: str) -> dict[str, JSON]:
    """A copy of claims that later changes do not reach; None is no claims."""
    if claims is None:
        return {}
    if not isinstance(claims, Mapping):
        raise StateError(f"{path}: expected a dict, got {type(claims).__name__}")
    copied: dict[str, JSON] = json.loads(canonical_json(dict(claims), path))
    return copied


def parse_json(raw: bytes, what: str) -> JSON:
    """The value in JSON bytes from a file; refuses what two readers might take differently."""
    try:
        value: JSON = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        _check_depth(value, 2 * _MAX_DEPTH)
    except (ValueError, RecursionError, StateError) as error:
        reason = str(error) if isinstance(error, _JSONRefusedError) else type(error).__name__
        raise Tampered(f"{what} is no JSON of version 1 ({reason}); get the file again") from None
    return value


def check_claims(claims: Mapping[str, JSON], expect: Mapping[str, object]) -> None:
    """Passes if each expected claim is there and equal as JSON: true is no number, and 3 is 3.0."""
    for name, wanted in expect.items():
        if name not in claims:
            raise ClaimMismatch(
                f"claim {name}: expected {wanted!r}, the file does not say; nothing was loaded"
            )
        normal = json.loads(canonical_json(wanted, f"expect.{name}"))
        if not _same(claims[name], normal):
            raise ClaimMismatch(
                f"claim {name}: expected {wanted!r}, the file says {claims[name]!r}; "
                "nothing was loaded"
            )


def _same(one: JSON, other: JSON) -> bool:
    """Whether two JSON values are equal, where Python's own comparison takes true for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


class _JSONRefusedError(ValueError):
    """JSON that Python would take and this format does not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _JSONRefusedError(f"key {key!r} twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> float:
    raise _JSONRefusedError(f"{text} is not finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _JSONRefusedError("a number is not finite")
    return value


def _bounded(text: str) -> int:
    value = int(text)
    if value.bit_length() > MAX_INTEGER_BITS:
        raise _JSONRefusedError(f"a number has more than {MAX_INTEGER_BITS} bits")
    return value


def _check_depth(value: object, depth: int) -> None:
    """Refuses what nests deeper; only containers are visited, since an index has many values."""
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    if items and depth <= 1:
        raise _JSONRefusedError("it nests too deeply")
    for item in items:
        if type(item) in (dict, list):
            _check_depth(item, depth - 1)


def _check(value: object, path: str, depth: int) -> None:
    if depth == 0:
        raise StateError(f"{path}: nests deeper than {_MAX_DEPTH} levels")
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str or not _encodes(key):
                raise StateError(
                    f"{path}: expected keys that are text that UTF-8 can hold, got {key!r}"
                )
            _check(item, f"{path}.{key}", depth - 1)
    elif isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}.{index}", depth - 1)
    elif type(value) is str and not _encodes(value):
        raise StateError(f"{path}: expected text that UTF-8 can hold, got {value[:40]!r}")
    elif not _is_scalar(value):
        raise StateError(
            f"{path}: expected plain JSON (finite numbers of up to {MAX_INTEGER_BITS} bits), "
            f"got {type(value).__name__} {_shown(value)}; convert it"
        )


def _shown(value: object) -> str:
    """A value on one short line, whatever it raises when it is shown."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        return "that cannot be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encodes(text: str) -> bool:
    """Whether UTF-8 has a text: not one of a file name that was no UTF-8 itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_scalar(value: object) -> bool:
    """Whether a value is one that JSON holds exactly."""
    if type(value) is int:
        return value.bit_length() <= MAX_INTEGER_BITS
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (str, bool)
