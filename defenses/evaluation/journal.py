"""The state file of an evaluation under way, so that a killed one goes on where it was.

It says of which evaluation it is by digests, part by part, and is refused by any other.
Deliberately not here: what is remembered; this room only keeps it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from defenses.errors import EvaluationError
from defenses.evaluation.reading import read_text
from defenses.evaluation.writing import write_text
from defenses.quantities import shown

__all__ = ["Journal", "digest_of", "digest_of_model"]

_SCHEMA = 1

_Part = TypeVar("_Part", list[Any], dict[str, Any])


@final
class Journal:
    """What an evaluation has done so far, in a file that appears whole or not at all.

    Args:
        path: The file; None keeps nothing.

    Attributes:
        found: What an earlier evaluation of the same identity wrote; empty where there is none.

    Raises:
        EvaluationError: The file is of another evaluation, or none at all.
        OSError: It cannot be read.
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
        """One part of what was found.

        Raises:
            EvaluationError: It is not there, or of another kind.
        """
        value = self.found.get(name)
        if not isinstance(value, kind):
            raise EvaluationError(
                f"{self._path}: expected a state with {name!r}, got {type(value).__name__}; give "
                "another path"
            )
        return value

    def write(self, content: Mapping[str, Any]) -> None:
        """Puts `content`, JSON-able values, in the place of what was written before.

        Raises:
            OSError: The file cannot be written; what it held is still there.
        """
        if self._path is not None:
            head = {"schema": _SCHEMA, "identity": self._identity}
            write_text(self._path, json.dumps({**head, "content": dict(content)}) + "\n")

    def _read(self, path: Path) -> dict[str, Any]:
        """The content of a file of this evaluation."""
        try:
            values = json.loads(read_text(path, "the state of an evaluation"))
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


def _settings_of(layer: nn.Module) -> str:
    """What a layer prints of itself, such as its stride."""
    try:
        return layer.extra_repr()
    except Exception:  # a layer of somebody's own may fail at printing itself
        return ""


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of a model's layers by name, class and printed settings, parameters and buffers.

    Code that a class holds is not in it: edit a `forward`, and the digest stays.
    """
    layers = "".join(
        f"{name}:{type(layer).__module__}.{type(layer).__qualname__}({_settings_of(layer)});"
        for name, layer in model.named_modules()
    )
    tensors: list[Tensor | str] = [layers]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors += [name, tensor]
    return digest_of(*tensors)
