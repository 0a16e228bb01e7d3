"""Plain checkpoints: the same one safetensors file, neither encrypted nor signed.

For runs that did not ask for sealing. A function of its own, so that nothing that expects a sealed
file ever takes a plain one.
"""

import os
from typing import TypeAlias

import torch

from secure_cnn.archive.errors import StateError, StorageError
from secure_cnn.archive.format.header import MAGIC
from secure_cnn.archive.format.state import State, decode_state, encode_state
from secure_cnn.archive.output import new_file
from secure_cnn.files import reading, write_at

__all__ = ["is_torch", "load_plain", "save_plain"]

# What `torch.save` writes today, a zip file, and what it wrote until 2020, a bare pickle.
_TORCH = (b"PK\x03\x04", b"\x80\x02")

_Path: TypeAlias = str | os.PathLike[str]


def is_torch(first: bytes) -> bool:
    """Whether a file that begins so was written by `torch.save`.

    A safetensors file may begin with the same two bytes, if its header is 640 bytes long; but then
    a number that small stands before the brace of its JSON, and in neither of the others.

    Args:
        first: Its first bytes, 9 or more of them.
    """
    is_safetensors = first[8:9] == b"{" and not any(first[4:8])
    return first.startswith(_TORCH) and not is_safetensors


def save_plain(path: _Path, state: State, *, overwrite: bool = False) -> None:
    """Writes a state as a plain safetensors file with mode 0600, whole or not at all.

    Guarantee: none against reading or changing it; see `save` for that.

    Args:
        path: Where the file goes.
        state: As for `save`.
        overwrite: Whether a file at `path` may be replaced.

    Raises:
        StateError: The state holds something that the format cannot.
        StorageError: There is a file already, or the operating system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_plain(f"{folder}/m.safetensors", {"step": 1, "w": torch.ones(1)})
        ...     load_plain(f"{folder}/m.safetensors")
        {'step': 1, 'w': tensor([1.])}
    """
    buffers = encode_state(state)
    with new_file(path, length=sum(map(len, buffers)), overwrite=overwrite, mode=0o600) as fd:
        offset = 0
        for buffer in buffers:
            write_at(fd, buffer, offset)
            offset += len(buffer)


def load_plain(path: _Path) -> State:
    """Reads a plain safetensors file: the tree that `save_plain` wrote, or another tool's tensors.

    Args:
        path: A safetensors file; a sealed one is refused.

    Raises:
        StorageError: The file cannot be read.
        StateError: It is no valid safetensors file.

    Example:
        >>> load_plain("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.StorageError: nowhere.safetensors: cannot read: ...
    """
    try:
        with reading(path) as file:
            data = bytearray(file.read())
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}") from error
    if not data:
        raise StateError(f"{path}: expected a safetensors file, got an empty one")
    if data.startswith(MAGIC):
        raise StateError(
            f"{path}: is sealed; open it first, or give the identity or passphrase that opens it"
        )
    if is_torch(bytes(data[:16])):
        raise StateError(f"{path}: expected a safetensors file, got one of torch.save; import it")
    try:
        return decode_state(torch.frombuffer(data, dtype=torch.uint8))
    except StateError as error:
        raise StateError(f"{path}: {error}") from error
