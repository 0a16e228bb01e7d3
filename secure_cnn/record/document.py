"""A document: a frozen dataclass on our side, strict JSON in the file.

The dataclass fields and their types *are* the schema: one walk over them checks values when an
object is made and when a file is read. Deliberately not here: migration between schemas, and any
class looked up by a name that a file holds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from secure_cnn.errors import RunError
from secure_cnn.files import IrregularFileError, reading, write_file

__all__ = ["Checked", "Document", "OlderVersionError", "require", "require_share", "write_text"]

MAX_BYTES = 64 * 2**20
"""A larger document is refused unread; a thousand epochs take about a quarter of a megabyte."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_Kind = TypeVar("_Kind", bound="Checked")


class OlderVersionError(RunError):
    """A file lacks what later versions of secure-cnn write; it is whole, as far as one can see."""


class Checked:
    """A frozen dataclass whose fields have the types they are declared with; lists become tuples.

    `LATER` names the fields that came after the first release. They are written only where they
    say something, so that earlier versions read the file, and may be missing in a file.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, kind in _schema(type(self)).items():
            where = f"{type(self).__name__}.{name}"
            object.__setattr__(self, name, _decode(kind, getattr(self, name), where))
        self._check()

    def _check(self) -> None:
        """Raise where values of the right types make no sense together."""


class Document(Checked):
    """What one file holds: it is read back equal (NaN aside, which equals nothing)."""

    KIND: ClassVar[str | None] = None
    """What tells this file from others of the same schema; None where there are no others."""

    def to_dict(self) -> dict[str, Any]:
        """The document in JSON's types; what JSON lacks becomes `"nan"`, `"inf"` or `"-inf"`."""
        return self._head() | cast("dict[str, Any]", _encode(self))

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The document that `to_dict` gave; another schema or kind is refused before all else."""
        if not isinstance(content, Mapping):
            _refuse(cls.__name__, "an object", content)
        head = cls._head()
        for name, expected in head.items():
            found = content.get(name)
            if type(found) is not type(expected) or found != expected:
                raise RunError(
                    f"{cls.__name__}.{name}: expected {expected!r}, got {found!r}; "
                    "read this file with the version of secure-cnn that wrote it"
                )
        body = {name: item for name, item in content.items() if name not in head}
        return _instance(cls, body, cls.__name__)

    def write(self, path: str | Path, *, mode: int = 0o666) -> None:
        """Write the document to `path`, atomically: a reader sees the old file or the new one."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        write_text(Path(path), text + "\n", mode=mode)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` made; a RunError names the file and what is wrong in it."""
        path = Path(path)
        try:
            with reading(path) as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise RunError(
                    f"expected at most {MAX_BYTES} bytes, got more; is this the right file?"
                )
            return cls.from_dict(json.loads(content, object_pairs_hook=_no_duplicates))
        except IrregularFileError as error:  # says itself what was expected
            raise RunError(f"{path}: {error.strerror}; check the path") from error
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"{path}: expected a readable file, got {reason}; check the path"
            ) from error
        except RunError as error:
            raise type(error)(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}: expected JSON, got a damaged file ({error})") from error

    @classmethod
    def _head(cls) -> dict[str, Any]:
        return {"schema": 1} if cls.KIND is None else {"schema": 1, "kind": cls.KIND}


def require(holds: bool, where: str, expected: str, got: object) -> None:
    """Raise unless a value makes sense; what came may be large, so only a piece of it is shown."""
    if not holds:
        raise RunError(f"{where}: expected {expected}, got {repr(got)[:60]}; correct the record")


def require_share(where: str, value: float | None) -> None:
    """Raise unless a share lies in [0, 1], or is NaN where there was nothing to share."""
    fine = value is None or math.isnan(value) or 0 <= value <= 1
    require(fine, where, "a share in [0, 1]", value)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write `text` so that `path` holds either its old content or all of the new."""
    # A folder name that is no UTF-8 reaches us as lone surrogates; written as `\udc..` they are
    # a JSON escape that reads back equal, where an encoding error would lose the record.
    raw = text.encode("utf-8", errors="backslashreplace")
    try:
        write_file(path, raw, overwrite=True, mode=mode)
    except IrregularFileError as error:  # says itself what was expected
        raise RunError(
            f"{path}: {error.strerror}; nothing was overwritten. Move it elsewhere, or choose "
            "another folder"
        ) from error
    except OSError as error:
        raise RunError(
            f"{path}: expected a place to write to, got {error.strerror or error}; nothing was "
            "overwritten. Choose a folder that exists, is writable and has space"
        ) from error


def _encode(value: object) -> object:
    if isinstance(value, Checked):
        return {
            field.name: _encode(getattr(value, field.name))
            for field in fields(cast("Any", value))
            if field.name not in value.LATER or getattr(value, field.name) != field.default
        }
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(kind: object, value: object, where: str) -> object:
    """`value` as the type `kind`, or a RunError that names `where` in the document it is wrong."""
    origin = get_origin(kind)
    if kind is Any:
        return _plain(value, where)
    if origin in (Union, UnionType):
        inner = next(option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _decode(inner, value, where)
    if origin is Literal:
        choices = f"one of {', '.join(map(repr, get_args(kind)))}"
        return value if value in get_args(kind) else _refuse(where, choices, value)
    if origin is tuple:
        return _sequence(get_args(kind), value, where)
    if origin is Mapping:
        return _mapping(get_args(kind)[1], value, where)
    if isinstance(kind, type) and issubclass(kind, Checked):
        return value if isinstance(value, kind) else _instance(kind, value, where)
    return _scalar(kind, value, where)


def _schema(cls: object) -> dict[str, object]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cast("Any", cls))}


def _instance(cls: type[_Kind], value: object, where: str) -> _Kind:
    """An instance from a mapping that has exactly the fields of `cls`."""
    if not isinstance(value, Mapping):
        _refuse(where, "an object", value)
    schema = _schema(cls)
    if missing := schema.keys() - value.keys() - cls.LATER:
        _refuse_without(cls, missing, where)
    if unknown := sorted(set(map(str, value)) - schema.keys()):
        raise RunError(f"{where}: expected only {sorted(schema)}, got {unknown[0]!r}; remove it")
    given = [(name, kind) for name, kind in schema.items() if name in value]
    return cls(**{name: _decode(kind, value[name], f"{where}.{name}") for name, kind in given})


def _refuse_without(cls: type[Checked], missing: set[str], where: str) -> NoReturn:
    """Raise for entries that are not there: those with a default are what came later."""
    needed = {each.name for each in fields(cast("Any", cls)) if _has_no_default(each)}
    if lost := sorted(missing & needed):
        raise RunError(f"{where}: expected {lost[0]!r}, got no such entry; the file is damaged")
    raise OlderVersionError(
        f"{where}: expected {sorted(missing)[0]!r}, got no such entry: the file is of an older "
        "version of secure-cnn; make it anew"
    )


def _has_no_default(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _sequence(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    """A tuple from a list: `tuple[X, ...]` of any length, `tuple[X, Y]` of exactly two."""
    if not isinstance(value, list | tuple):
        _refuse(where, "a list", value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise RunError(f"{where}: expected {len(kinds)} values, got {len(value)}")
    return tuple(
        _decode(kind, item, f"{where}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _mapping(kind: object, value: object, where: str) -> dict[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _refuse(where, "an object with text keys", value)
    return {key: _decode(kind, item, f"{where}.{key}") for key, item in value.items()}


def _scalar(kind: object, value: object, where: str) -> object:
    """One `str`, `int`, `float` or `bool`; NumPy's become Python's, and a bool is no number."""
    wanted = f"a value of type {getattr(kind, '__name__', kind)}"
    if isinstance(value, bool):
        if kind is bool:
            return value
        _refuse(where, wanted, value)
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is int and isinstance(value, Integral):
        return int(value)
    if kind is float and isinstance(value, Real):
        return float(value)
    return _refuse(where, wanted, value)


def _plain(value: object, where: str) -> object:
    """A deep copy of free-form JSON, in the form in which a file gives it back."""
    if isinstance(value, Mapping):
        return _mapping(Any, value, where)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | str | int | float):
        return _encode(value)
    return _refuse(where, "plain JSON", value)


def _refuse(where: str, expected: str, value: object) -> NoReturn:
    """Raise for a value of the wrong type; it may be large, so only a piece of it is shown."""
    raise RunError(f"{where}: expected {expected}, got {type(value).__name__} {repr(value)[:60]}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique: two readers must not see two different documents."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RunError(f"expected each name once, got {twice!r} twice; the file is damaged")
    return dict(pairs)
