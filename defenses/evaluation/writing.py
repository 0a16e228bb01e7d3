"""Writes a file whole or not at all: temporary name, sync, rename."""

import errno
import os
import tempfile
from pathlib import Path

__all__ = ["write_bytes", "write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` so that `path` holds either what it held before or all of the new.

    Raises:
        OSError: The folder cannot be written to, or a pipe or device is there; what is already
            there is left as it was.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` so that `path` holds either what it held before or all of the new.

    Raises:
        OSError: The folder cannot be written to, or a pipe or device is there; what is already
            there is left as it was.
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
