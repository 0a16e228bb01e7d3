"""What is kept in files: the state of work under way, so that killed work goes on, and reports.

A state says of which work it is by digests, part by part, and is refused by any other. Files appear
whole or not at all, and only regular files of bearable size are read or replaced.
"""

import errno
import hashlib
import json
import os
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, final

import torch
from torch import Tensor, nn

from defenses.errors import DefenseError, EvaluationError
from defenses.quantities import shown

__all__ = [
    "FiledReport",
    "Journal",
    "digest_of",
    "digest_of_model",
    "is_path",
    "write_bytes",
    "write_text",
]

_SCHEMA = 1
_LARGEST = 1 << 30

_Part = TypeVar("_Part", list[Any], dict[str, Any])


@final
class Journal:
    """What has been done so far, in a file; `path` None keeps nothing.

    In `found` is what an earlier call of the same `identity`, part by part, wrote. A file of
    another is refused before any work, and left as it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, str]) -> None:
        if not isinstance(path, str | os.PathLike | None):
            raise EvaluationError(f"state: expected a path, got {shown(path)}")
        self._path = None if path is None else Path(path)
        self._identity = dict(identity)
        self.found: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            if not self._path.is_file():
                raise EvaluationError(f"state: expected a regular file, got another at {path}")
            self.found = self._read(self._path)
        if self._path is not None and not self._path.parent.is_dir():
            raise EvaluationError(
                f"state: expected a file in a folder that exists, got {self._path}; make it first"
            )

    def part(self, name: str, kind: type[_Part]) -> _Part:
        """One part of what was found, which must be of this kind."""
        value = self.found.get(name)
        if not isinstance(value, kind):
            raise EvaluationError(
                f"{self._path}: expected a state with {name!r}, got {type(value).__name__}; give "
                "another path"
            )
        return value

    def write(self, content: Mapping[str, Any]) -> None:
        """Puts JSON-able values in the place of what was there; on an `OSError` that stays."""
        if self._path is not None:
            head = {"schema": _SCHEMA, "identity": self._identity}
            write_text(self._path, json.dumps({**head, "content": dict(content)}) + "\n")

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(_read_text(path, "the state of an evaluation"))
            schema, identity, content = (values[k] for k in ("schema", "identity", "content"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(
                f"{path}: expected the state of an evaluation, got {error!r}; give another path"
            ) from error
        if schema != _SCHEMA or not isinstance(identity, dict) or not isinstance(content, dict):
            raise EvaluationError(f"{path}: expected a state of schema {_SCHEMA}, got {schema!r}")
        keys = self._identity.keys() | identity.keys()
        other = sorted(k for k in keys if self._identity.get(k) != identity.get(k))
        if other:
            raise EvaluationError(
                f"{path}: is the state of an evaluation with other {', '.join(other)}; go on with "
                "the same, or give another path"
            )
        return content


def digest_of(*parts: Tensor | str) -> str:
    """SHA-256 of tensors (dtype, shape and values) and texts, in order, in hex."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{list(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            # Bit for bit, of every dtype: numpy knows no bfloat16.
            total.update(flat.view(torch.uint8).numpy().data if len(flat) else b"")
        else:
            total.update(f"{len(part)}:{part}".encode())
    return total.hexdigest()


def digest_of_model(model: nn.Module | None) -> str:
    """SHA-256 of a model's layers by name, class and printed settings, and tensors; "" of None.

    Code that a class holds is not in it: edit a `forward`, and the digest stays.
    """
    if model is None:
        return ""
    layers = "".join(
        f"{name}:{type(layer).__module__}.{type(layer).__qualname__}({_settings_of(layer)});"
        for name, layer in model.named_modules()
    )
    tensors: list[Tensor | str] = [layers]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors += [name, tensor]
    return digest_of(*tensors)


def _settings_of(layer: nn.Module) -> str:
    """What a layer prints of itself, such as its stride."""
    try:
        return layer.extra_repr()
    except Exception:  # a layer of somebody's own may fail at printing itself
        return ""


def is_path(value: object) -> bool:
    """Whether a value may be meant as the path of a file."""
    return isinstance(value, str | os.PathLike)


class FiledReport(ABC):
    """A report as JSON values and as a file of them, which holds them whole or not at all."""

    _CALLED: ClassVar[str]
    _SCHEMA: ClassVar[int]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""

    @classmethod
    @abstractmethod
    def _built(cls, values: Mapping[str, Any]) -> Self:
        """The report of values that may be missing or of other kinds, and then raise as they do."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report that `to_dict` described; what follows from other figures is computed anew."""
        schema = values.get("schema") if isinstance(values, Mapping) else values
        if not isinstance(values, Mapping) or schema != cls._SCHEMA:
            raise EvaluationError(
                f"expected {cls._CALLED} of schema {cls._SCHEMA}, got {shown(schema)}"
            )
        try:
            return cls._built(values)
        except DefenseError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(f"expected the values of {cls._CALLED}: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as JSON; on an `OSError` a file already there is left as it was."""
        # JSON has no NaN and no infinity: better no file than one that others cannot read.
        write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The report in a file that `save` wrote."""
        if not is_path(path):
            raise EvaluationError(f"path: expected the file of {cls._CALLED}, got {shown(path)}")
        try:
            return cls.from_dict(json.loads(_read_text(path, cls._CALLED)))
        except OSError as error:
            raise EvaluationError(f"{path}: cannot read: {error.strerror}") from error
        except DefenseError as error:
            told = str(error)
            told = told if told.startswith(f"{path}:") else f"{path}: {told}"
            raise EvaluationError(told) from error
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"{path}: expected {cls._CALLED}, as `save` writes it, got no JSON ({shown(error)})"
            ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` so that `path` holds either what it held before or all of the new.

    An `OSError` says that the folder cannot be written to, or that a pipe or device is there.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected a regular file, and what is there is none", str(path))
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_text(path: str | os.PathLike[str], what: str) -> str:
    """What a regular file of bearable size holds: no pipe that never ends, no device."""
    # Not to wait for whoever would write into a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise EvaluationError(
                f"{path}: expected {what}, a regular file of at most {_LARGEST >> 20} MiB; give "
                "another path"
            )
        return file.read(_LARGEST).decode("utf-8")
