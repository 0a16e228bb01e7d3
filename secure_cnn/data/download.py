"""Fetch one pinned file into the cache: size and SHA-256 are known before the first byte arrives.

Since the digest decides what is accepted, it does not matter whom the bytes come from.
Not here: which files belong to which data set (`named`).
"""

import hashlib
import http.client
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import DownloadColumn, Progress

from secure_cnn.errors import DataError
from secure_cnn.files import new_file, write_at
from secure_cnn.printable import Terminal

__all__ = ["RemoteFile", "download"]

_TIMEOUT = 15.0  # seconds without a byte before a mirror is given up
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that mirrors offer, and what it must be."""

    name: str
    size: int
    sha256: str


def download(file: RemoteFile, mirrors: Sequence[str], folder: Path) -> Path:
    """Fetch `file` into `folder` from the first mirror (a URL that ends in a slash) that has it.

    The file appears under its name only when it is complete and its digest is right; otherwise
    there is one `DataError` with what every mirror said.
    """
    failures = []
    for mirror in mirrors:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _fetch(file, mirror + file.name, folder)
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"{mirror + file.name}: {error}")
    raise DataError(", then ".join(failures))


def _fetch(file: RemoteFile, url: str, folder: Path) -> Path:
    """Fetch one URL; the file appears once its digest is right."""
    path = folder / file.name
    with new_file(path, overwrite=True, mode=0o600) as fd:
        # The table in `named` holds only http and https addresses, never the user's.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310
            digest = _copy(response, fd, file)
        if digest != file.sha256:
            raise DataError(f"expected SHA-256 {file.sha256}, got {digest}")
    return path


def _copy(response: http.client.HTTPResponse, fd: int, file: RemoteFile) -> str:
    """Copy at most one byte more than is expected; the SHA-256 of what came."""
    digest, taken = hashlib.sha256(), 0
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, console=Terminal(stderr=True, wrap=True)) as progress:
        task = progress.add_task(f"downloading {file.name}", total=file.size)
        while data := response.read(min(_CHUNK, file.size + 1 - taken)):
            write_at(fd, memoryview(data), taken)
            digest.update(data)
            taken += len(data)
            progress.advance(task, len(data))
    return digest.hexdigest()
