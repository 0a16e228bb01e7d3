"""What every reader of a format hands on: a data set of which only the pixels are still to come."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secure_cnn.data.labels import Labels

__all__ = ["CHUNK_BYTES", "Chunk", "Pixels", "Source", "key_of"]

Pixels = NDArray[np.uint8]
Chunk = tuple[int, Pixels]  # the row of the first image, and images [k, channels, height, width]

CHUNK_BYTES = 1 << 24  # what a reader holds at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set before its pixels are decoded; the training rows come first.

    `chunks` starts the decoding and yields every row exactly once, in any order of chunks.
    `key` changes whenever the pixels or their order could.
    """

    name: str
    key: str
    classes: tuple[str, ...]
    labels: Labels
    train_count: int
    shape: tuple[int, int, int]
    chunks: Callable[[], Iterator[Chunk]]

    @property
    def size(self) -> int:
        """Bytes of all pixels."""
        return len(self.labels) * prod(self.shape)


def key_of(files: Iterable[Path], *settings: object) -> str:
    """A digest over the names, sizes and modification times of `files` and over `settings`."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in files:
        status = file.stat()
        line = [str(file.absolute()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()[:32]
