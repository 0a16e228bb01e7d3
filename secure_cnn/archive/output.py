"""An output file that appears whole or not at all, in the archive's words; how is in `files`."""

import contextlib
import os
from collections.abc import Iterator

from secure_cnn import files
from secure_cnn.archive.errors import StorageError

__all__ = ["new_file"]


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], *, length: int, overwrite: bool, mode: int
) -> Iterator[int]:
    """A file descriptor to write to; on leaving the block the file is at `path`.

    Args:
        path: Where the file goes. Its folder must exist.
        overwrite: Whether a regular file at `path` may be replaced; nothing else ever is.

    Raises:
        StorageError: There is a file already, or something else, or the operating system refuses.
    """
    try:
        with files.new_file(path, overwrite=overwrite, mode=mode, length=length) as fd:
            yield fd
    except FileExistsError:
        raise StorageError(
            f"{path}: a file is already there; choose another path, or remove it first"
        ) from None
    except files.IrregularFileError as error:
        raise StorageError(
            f"{path}: {error.strerror}; give the path of a file, or what the link leads to"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror}; nothing was changed"
        ) from error
