"""A `.npz` file of arrays, as `numpy.savez` writes it; arrays of objects (pickles) are refused.

| array | form |
|---|---|
| `images` | uint8 0..255, or float in [0, 1] |
| `labels` | integers 0..k-1, every class at least once |
| `test_images`, `test_labels` | the same, both or neither; without, the seed splits |

`images` are `[n, height, width]` (grey), `[n, height, width, channels]` or
`[n, channels, height, width]`. Four dimensions are told apart by the one side that is 1 or 3; if
either could be the channels the file is refused rather than guessed at.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from secure_cnn.data import source
from secure_cnn.data.source import Chunk, Labels, Pixels, Source
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["npz_source"]

_MOST_LABEL_BYTES = 1 << 30
_MOST_CLASSES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What an array says about itself before its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def npz_source(path: Path, *, test_fraction: float, seed: int) -> Source:
    """The arrays of `path`; their headers are checked here, their pixels while they are read."""
    with _opened(path) as archive:
        parts = [""] + (["test_"] if _has_test(archive, path) else [])
        shapes = [_image_shape(archive, path, f"{part}images") for part in parts]
        if shapes[0] != shapes[-1]:
            raise DataError(
                f"{path}: expected test_images like images, {shapes[0]}, got {shapes[-1]}"
            )
        labels = [_labels(archive, path, part) for part in parts]
    if not 0 <= labels[0].min() <= labels[0].max() < _MOST_CLASSES:
        raise DataError(
            f"{path}: expected labels in 0..{_MOST_CLASSES - 1}, "
            f"got {labels[0].min()}..{labels[0].max()}; number the classes from 0"
        )
    classes = tuple(str(label) for label in range(int(labels[0].max()) + 1))
    source.check_labels(labels[0], classes, path)
    source.check_range(labels[-1], classes, path)
    if len(parts) == 2:
        train, test = np.arange(len(labels[0])), np.arange(len(labels[1])) + len(labels[0])
    else:
        train, test = source.stratified_split(
            labels[0], classes, path, test_fraction=test_fraction, seed=seed
        )
    return Source(
        name=path.stem,
        key=source.key_of([path], test_fraction, seed),
        classes=classes,
        labels=np.concatenate(labels)[np.concatenate([train, test])],
        train_count=len(train),
        shape=shapes[0],
        chunks=lambda: _chunks(path, parts, train, test),
    )


def _has_test(archive: zipfile.ZipFile, path: Path) -> bool:
    """Whether there is a test set; half of one, or none of the required arrays, is an error."""
    names = {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
    missing = {"images", "labels"} - names
    if "test_images" in names or "test_labels" in names:
        missing |= {"test_images", "test_labels"} - names
    if missing:
        raise DataError(
            f"{path}: expected arrays images and labels, and test_images and test_labels both or "
            f"neither, got {sorted(names)}; add {', '.join(sorted(missing))}"
        )
    return "test_images" in names


def _chunks(path: Path, parts: list[str], train: Labels, test: Labels) -> Iterator[Chunk]:
    """All images: those in `train` from row 0 on, those in `test` behind them."""
    row = 0
    with _opened(path) as archive:
        for part in parts:
            for images in _images(archive, path, f"{part}images"):
                stop = row + len(images)
                for rows, base in ((train, 0), (test, len(train))):
                    first, last = np.searchsorted(rows, [row, stop])
                    if first < last:
                        yield base + int(first), images[rows[first:last] - row]
                row = stop


def _images(archive: zipfile.ZipFile, path: Path, name: str) -> Iterator[Pixels]:
    """One array of images in chunks uint8 `[k, channels, height, width]`."""
    with archive.open(f"{name}.npy") as file:
        header = _header(file, path, name)
        stride = prod(header.shape[1:]) * header.dtype.itemsize
        rows = max(1, source.CHUNK_BYTES // stride)
        for start in range(0, header.shape[0], rows):
            taken = min(rows, header.shape[0] - start)
            values = np.frombuffer(_exactly(file, taken * stride, path, name), header.dtype)
            values = values.reshape(taken, *header.shape[1:])
            if values.ndim == 3:
                values = values[:, None]
            elif header.shape[3] in (1, 3):  # the channels are last
                values = values.transpose(0, 3, 1, 2)
            yield _as_bytes(values, path, name)


def _as_bytes(values: np.ndarray, path: Path, name: str) -> Pixels:
    """uint8 as it is; float in [0, 1] to the nearest of 256 levels."""
    if values.dtype == np.uint8:
        return values
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise DataError(
            f"{path}: expected floats of {name} in [0, 1], got {values.min()}..{values.max()}; "
            "rescale them, or save 0..255 as uint8"
        )
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def _image_shape(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, int, int]:
    """`(channels, height, width)` of one array of images, from its header."""
    with archive.open(f"{name}.npy") as file:
        header = _header(file, path, name)
    if header.dtype != np.uint8 and header.dtype.kind != "f":
        raise DataError(f"{path}: expected {name} as uint8 or float, got {header.dtype}")
    if len(header.shape) not in (3, 4) or min(header.shape) < 1:
        raise DataError(
            f"{path}: expected {name} as [n, height, width], [n, height, width, channels] or "
            f"[n, channels, height, width], none of them 0, got {list(header.shape)}"
        )
    if len(header.shape) == 3:
        return (1, header.shape[1], header.shape[2])
    first, last = header.shape[1] in (1, 3), header.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"{path}: expected {name} with 1 or 3 channels either second or last, "
            f"got {list(header.shape)}, which is {'both' if first else 'neither'}"
        )
    _, *rest = header.shape
    return (rest[2], rest[0], rest[1]) if last else (rest[0], rest[1], rest[2])


def _labels(archive: zipfile.ZipFile, path: Path, part: str) -> Labels:
    name = f"{part}labels"
    with archive.open(f"{part}images.npy") as file:
        count = _header(file, path, f"{part}images").shape[0]
    with archive.open(f"{name}.npy") as file:
        header = _header(file, path, name)
        if header.dtype.kind not in "iu" or header.shape != (count,):
            raise DataError(
                f"{path}: expected {name} as {count} integers, one for each image, "
                f"got {header.dtype} {list(header.shape)}"
            )
        size = count * header.dtype.itemsize
        if size > _MOST_LABEL_BYTES:
            raise DataError(
                f"{path}: expected at most {_MOST_LABEL_BYTES} bytes of {name}, got {size}"
            )
        values = np.frombuffer(_exactly(file, size, path, name), header.dtype)
    return values.astype(np.int64)


def _header(file: IO[bytes], path: Path, name: str) -> _Header:
    """Read the header of an array and leave `file` at its first byte."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"{path}: expected numbers in {name}, got Python objects, which are never loaded: "
            "save an array of a numeric dtype"
        )
    if fortran_order and len(shape) > 1:
        raise DataError(
            f"{path}: expected {name} in row-major order; save numpy.ascontiguousarray of it"
        )
    return _Header(shape=shape, dtype=dtype)


def _exactly(file: IO[bytes], size: int, path: Path, name: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{path}: {name} is truncated: expected {size} bytes, got {len(data)}")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    readable = source.unusable(
        path,
        *(OSError, EOFError, zipfile.BadZipFile, zlib.error),
        ValueError,  # numpy's, for a bad array header
        NotImplementedError,  # a compression method that Python does not know
        RuntimeError,  # an encrypted member
        expected="a .npz file that numpy.savez wrote",
        cure="it is damaged or another kind of file: write it again",
    )
    with readable, reading(path) as raw, zipfile.ZipFile(raw) as archive:
        yield archive
