"""The IDX format of MNIST and Fashion-MNIST, gzipped (LeCun, Cortes and Burges, 1998).

A big-endian header (two zero bytes, a type, the number of dimensions, then their sizes) and the
bytes of the array. Read in chunks; a header is believed only as far as the bytes behind it go.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from secure_cnn.data.labels import Labels
from secure_cnn.data.source import CHUNK_BYTES, Pixels
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["read_images", "read_labels", "read_shape"]

_UNSIGNED_BYTE = 0x08
_MOST_LABELS = 1 << 26


def read_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    """The sizes that the header of `path` states, of which there must be `dimensions`."""
    with _open(path) as file:
        return _header(file, path, dimensions)


def read_labels(path: Path) -> Labels:
    """All labels of a one-dimensional IDX file, as int64 `[n]`."""
    with _open(path) as file:
        (count,) = _header(file, path, 1)
        if count > _MOST_LABELS:
            raise DataError(
                f"{path}: expected at most {_MOST_LABELS} labels, its header says {count}"
            )
        labels = np.frombuffer(_exactly(file, path, count), np.uint8).astype(np.int64)
        _expect_end(file, path)
        return labels


def read_images(path: Path) -> Iterator[Pixels]:
    """The images of a three-dimensional IDX file, in chunks uint8 `[k, 1, height, width]`."""
    with _open(path) as file:
        count, height, width = _header(file, path, 3)
        rows = max(1, CHUNK_BYTES // (height * width))
        for start in range(0, count, rows):
            taken = min(rows, count - start)
            data = _exactly(file, path, taken * height * width)
            yield np.frombuffer(data, np.uint8).reshape(taken, 1, height, width)
        _expect_end(file, path)


@contextmanager
def _open(path: Path) -> Iterator[gzip.GzipFile]:
    """The unpacked bytes of `path`; every way in which they can be unreadable is a `DataError`."""
    try:
        with reading(path) as raw, gzip.open(raw, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a whole gzip file, got {error}; "
            "it is damaged or truncated: remove it and put a fresh copy there"
        ) from error


def _header(file: gzip.GzipFile, path: Path, dimensions: int) -> tuple[int, ...]:
    """Check the magic number and read the sizes."""
    magic = _exactly(file, path, 4)
    if magic != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise DataError(
            f"{path}: expected the IDX magic number 0x0000{_UNSIGNED_BYTE:02x}{dimensions:02x} "
            f"(bytes in {dimensions} dimensions), got 0x{magic.hex()}; is it another file?"
        )
    sizes = tuple(int(size) for size in np.frombuffer(_exactly(file, path, 4 * dimensions), ">u4"))
    if prod(sizes) == 0:
        raise DataError(f"{path}: expected a filled array, its header says {sizes}")
    return sizes


def _exactly(file: gzip.GzipFile, path: Path, size: int) -> bytes:
    """The next `size` bytes."""
    data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"{path}: expected {size} more bytes, got {len(data)}; "
            "it is truncated: remove it and put a fresh copy there"
        )
    return data


def _expect_end(file: gzip.GzipFile, path: Path) -> None:
    """Nothing may follow the array."""
    if file.read(1):
        raise DataError(
            f"{path}: expected its end after the array that its header states, got more"
        )
