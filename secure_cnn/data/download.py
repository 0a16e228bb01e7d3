"""Fetch one pinned file into the cache: size and SHA-256 are known before the first byte arrives.

Since the digest decides what is accepted, it does not matter whom the bytes come from.
Not here: which files belong to which data set (`named`).
"""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import DownloadColumn, Progress

from secure_cnn.errors import DataError
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
    """Fetch one URL into a temporary file, check it, and move it to its name."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".download-", delete=False) as target:
        try:
            # The table in `named` holds only http and https addresses, never the user's.
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310
                digest = _copy(response, target, file)
            if digest != file.sha256:
                raise DataError(f"expected SHA-256 {file.sha256}, got {digest}")
            os.replace(target.name, folder / file.name)
        except BaseException:  # Ctrl-C too: no half file stays behind
            Path(target.name).unlink(missing_ok=True)
            raise
    return folder / file.name


def _copy(response: http.client.HTTPResponse, target: IO[bytes], file: RemoteFile) -> str:
    """Copy at most one byte more than is expected; the SHA-256 of what came."""
    digest, left = hashlib.sha256(), file.size + 1
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, console=Terminal(stderr=True, wrap=True)) as progress:
        task = progress.add_task(f"downloading {file.name}", total=file.size)
        while left and (data := response.read(min(_CHUNK, left))):
            target.write(data)
            digest.update(data)
            left -= len(data)
            progress.advance(task, len(data))
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()
