"""Reads what is written here: regular files of bearable size, in errors of ours."""

import json
import os
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from defenses.errors import EvaluationError
from defenses.quantities import shown

__all__ = ["is_path", "read_text", "read_values"]

_LARGEST = 1 << 30

_Found = TypeVar("_Found")


def is_path(value: object) -> bool:
    """Whether a value may be meant as the path of a file."""
    return isinstance(value, str | os.PathLike)


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """What a regular file of bearable size holds: no pipe that never ends, no device.

    Raises:
        EvaluationError: It is another kind of file, or a larger one.
        OSError: It cannot be read.
        ValueError: It is no text.
    """
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


def read_values(path: str | os.PathLike[str], what: str, build: Callable[[Any], _Found]) -> _Found:
    """What is built of the JSON values in a file.

    Raises:
        EvaluationError: It cannot be read, is no JSON, or `build` refuses it.
    """
    if not is_path(path):
        raise EvaluationError(f"path: expected the file of {what}, got {shown(path)}")
    try:
        return build(json.loads(read_text(path, what)))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot read: {error.strerror}") from error
    except EvaluationError as error:
        told = str(error)
        raise EvaluationError(told if told.startswith(f"{path}:") else f"{path}: {told}") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{path}: expected {what}, as `save` writes it, got no JSON ({shown(error)})"
        ) from error
