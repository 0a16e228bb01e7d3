"""Plain files of other tools, to be sealed: safetensors, and what `torch.save` wrote.

The only place that lets torch read one of its own files, and only with its restricted reader, which
builds tensors and plain containers and runs no code of the file. Read such files once, seal what
came out, and keep the sealed file.
"""

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch

from secure_cnn.archive.errors import StateError, StorageError
from secure_cnn.archive.format.state import State, encode_state
from secure_cnn.archive.plain import is_torch, load_plain
from secure_cnn.files import reading

__all__ = ["import_"]

_Path: TypeAlias = "str | Path"


def import_(path: _Path) -> State:
    """The state in a plain file of another tool, ready to be sealed.

    Args:
        path: A safetensors file, or a file of `torch.save` that holds tensors, numbers, texts and
            plain containers only.

    Raises:
        StorageError: The file cannot be read.
        StateError: It is neither, is sealed, or holds objects of classes, which would run code.

    Example:
        >>> import tempfile, safetensors.torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w": torch.ones(2)}, f"{folder}/m.safetensors")
        ...     import_(f"{folder}/m.safetensors")
        {'w': tensor([1., 1.])}
    """
    try:
        with reading(path) as file:
            first = file.read(16)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}") from error
    state = _load_torch(path) if is_torch(first) else load_plain(path)
    encode_state(state)  # refuses here, with the path of what cannot be sealed
    return state


def _load_torch(path: _Path) -> Any:
    """What torch's restricted reader makes of a file; it knows no classes but tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own old formats
            return torch.load(  # noqa: TID251 - the one adapter; weights_only runs no code
                path, map_location="cpu", weights_only=True
            )
    except Exception as error:
        raise StateError(
            f"{path}: expected a state of tensors and plain data, got something else "
            f"({type(error).__name__}); save its state_dict() with torch.save"
        ) from None
