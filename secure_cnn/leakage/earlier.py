"""What was found of a model earlier: of what is not asked for anew, nothing is lost."""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from secure_cnn.data.npz_array import array_header, exactly, opened_npz
from secure_cnn.errors import DataError, RunError
from secure_cnn.files import write_file
from secure_cnn.leakage.gradients import Picture
from secure_cnn.record import InversionRecord, LeakageRecord
from secure_cnn.record.document import OlderVersionError

__all__ = ["Earlier", "earlier", "keep_pictures", "kept_pictures"]

_PICTURES = "pictures.npz"
_MARK = "rows"
_PRIVATE = 0o600


@final
@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a folder has of an earlier measurement.

    Attributes:
        record: That of the same model; None where there is none.
        lost: Why what is in the folder cannot be kept, in words; empty where nothing is lost.
    """

    record: LeakageRecord | None = None
    lost: str = ""


def earlier(out: Path, *, run: str, weights: str) -> Earlier:
    """What `out/leakage.json` has of the model with these weights, that this run left.

    Guarantee: no file makes it raise; one that cannot be read has nothing to keep.
    """
    path = out / "leakage.json"
    if not path.exists():
        return Earlier()
    try:
        found = LeakageRecord.read(path)
    except OlderVersionError:
        return Earlier(lost="an older version wrote it")
    except RunError:
        return Earlier(lost="it is damaged")
    if (found.run, found.weights) == (run, weights):
        return Earlier(record=found)
    parts = bool(found.inversion or found.extraction)
    whose = "run" if found.run != run else "model"
    return Earlier(lost=f"it is of another {whose}" if parts else "")


def keep_pictures(
    folder: Path, rows: Sequence[InversionRecord], pictures: Sequence[Picture]
) -> None:
    """Writes the pictures of a record's rows beside the table, for the owner alone.

    Raises:
        RunError: The folder cannot be written to.
    """
    arrays = {}
    for each in pictures:
        name = _name(each.protection, each.batch)
        arrays[name] = torch.stack([each.originals, each.found]).float().numpy()
    content = io.BytesIO()
    np.savez(content, **{_MARK: _mark(rows)}, **arrays)  # type: ignore[arg-type]  # its stub takes flags there too
    path = folder / _PICTURES
    try:
        write_file(path, content.getvalue(), overwrite=True, mode=_PRIVATE)
    except OSError as error:
        raise RunError(f"{path}: expected a place to write to: {error.strerror}") from error


def kept_pictures(
    folder: Path, rows: Sequence[InversionRecord], shape: tuple[int, int, int]
) -> tuple[Picture, ...]:
    """The pictures of these rows; none where they are not there, are damaged or of other rows.

    Args:
        folder: Of the table.
        rows: What the pictures must be of.
        shape: Of an image.
    """
    path = folder / _PICTURES
    if not rows or not path.exists():
        return ()
    try:
        with opened_npz(path) as archive:
            mark = _mark(rows)
            if not np.array_equal(_array(archive, path, _MARK, mark.shape), mark):
                return ()
            return tuple(_picture(archive, path, row, shape) for row in rows)
    except (DataError, KeyError):
        return ()


def _picture(
    archive: zipfile.ZipFile, path: Path, row: InversionRecord, shape: tuple[int, int, int]
) -> Picture:
    name = _name(row.protection, row.batch)
    both = torch.from_numpy(_array(archive, path, name, (2, row.batch, *shape)))
    return Picture(protection=row.protection, batch=row.batch, originals=both[0], found=both[1])


def _array(
    archive: zipfile.ZipFile, path: Path, name: str, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """One array, whose size is known before a byte of it is read."""
    with archive.open(f"{name}.npy") as file:
        header = array_header(file, path, name)
        if header.shape != shape or header.dtype != np.float32:
            raise DataError(f"{path}: expected {list(shape)} numbers in {name}, got others")
        size = prod(shape) * header.dtype.itemsize
        values = np.frombuffer(exactly(file, size, path, name), np.float32)
    if not ((values >= 0) & (values <= 255)).all():
        raise DataError(f"{path}: expected numbers in [0, 255] in {name}, got others")
    return values.reshape(shape).copy()


def _name(protection: str, batch: int) -> str:
    return f"{protection}-{batch}"


def _mark(rows: Sequence[InversionRecord]) -> NDArray[np.float32]:
    """A digest of the rows, which stands among the pictures: they are of no others."""
    told = json.dumps([asdict(row) for row in rows], sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(told).digest(), np.uint8).astype(np.float32)
