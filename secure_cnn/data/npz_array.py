"""The arrays inside of a `.npz` file: their headers, and their bytes where they are asked for."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from secure_cnn.data import source
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["Header", "array_header", "exactly", "header_of", "opened_npz"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an array says about itself before its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def header_of(archive: zipfile.ZipFile, path: Path, name: str) -> Header:
    """The header of the array called `name`."""
    with archive.open(f"{name}.npy") as file:
        return array_header(file, path, name)


def array_header(file: IO[bytes], path: Path, name: str) -> Header:
    """Reads the header of an array and leaves `file` at its first byte."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"{path}: expected numbers or texts in {name}, got Python objects, which are never "
            f"loaded: save numpy.array({name}.tolist()), or with dtype=str where they are texts"
        )
    if fortran_order and len(shape) > 1:
        raise DataError(
            f"{path}: expected {name} in row-major order; save numpy.ascontiguousarray of it"
        )
    return Header(shape=shape, dtype=dtype)


def exactly(file: IO[bytes], size: int, path: Path, name: str) -> bytes:
    """So many bytes, or an error that names the array."""
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{path}: {name} is truncated: expected {size} bytes, got {len(data)}")
    return data


@contextmanager
def opened_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever damage makes of it in the block is a `DataError`."""
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
