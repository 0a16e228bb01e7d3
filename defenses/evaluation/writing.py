"""Writes a text file whole or not at all: temporary name, sync, rename."""

import errno
import os
import tempfile
from pathlib import Path

__all__ = ["write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` so that `path` holds either what it held before or all of the new.

    Raises:
        OSError: The folder cannot be written to, or a pipe or device is there; what is already
            there is left as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "a"), "text")
        ...     Path(folder, "a").read_text()
        'text'
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected a regular file, and what is there is none", str(path))
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
