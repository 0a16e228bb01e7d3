"""A `.npz` file of arrays, as `numpy.savez` writes it; arrays of objects (pickles) are refused.

| array | also called | form |
|---|---|---|
| `images` | `train_images`, `x_train`, `x` | uint8 0..255, or float in [0, 1] |
| `labels` | `train_labels`, `y_train`, `y` | see below, every class at least once |
| `test_images`, `test_labels` | `x_test`, `y_test` | the same; without, the seed splits |
| `val_images`, `val_labels` | `x_val`, `y_val` | stand for the test set where there is none |
| `classes` | | the names of the classes, of labels that are numbers |
| `groups`, `test_groups`, `val_groups` | | whose each image is: numbers or names of persons |

Upper case is no difference. Labels are integers 0..k-1, names, or rows of k numbers of which one is
1; a column of them, `[n, 1]`, is as good as `[n]`. `images` are `[n, height, width]` (grey),
`[n, height, width, channels]` or `[n, channels, height, width]`. Four dimensions are told apart by
the one side that is 1 or 3; if either could be the channels the file is refused rather than guessed
at, and so are uint8 images whose values are 0 and 1 alone. Where persons are known, the seed splits
by person.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from secure_cnn.data import source
from secure_cnn.data.groups import one_name, persons_of_rows, split_by_person
from secure_cnn.data.npz_array import array_header, exactly, header_of, opened_npz
from secure_cnn.data.npz_labels import ids, labelled
from secure_cnn.data.source import Chunk, Labels, Pixels, Source
from secure_cnn.errors import DataError

__all__ = ["npz_source"]

_Names = tuple[tuple[str, str], ...]
_TRAIN: _Names = (
    *(("images", "labels"), ("train_images", "train_labels")),
    *(("x_train", "y_train"), ("x", "y")),
)
_TEST: _Names = (("test_images", "test_labels"), ("x_test", "y_test"))
_VALIDATION: _Names = (("val_images", "val_labels"), ("x_val", "y_val"))
_GROUPS = {"train": "groups", "test": "test_groups", "validation": "val_groups"}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The names of the two arrays of a part, as the file has them."""

    images: str
    labels: str
    kind: str


def npz_source(path: Path, *, groups: str | None, test_fraction: float, seed: int) -> Source:
    """The arrays of `path`; their headers are checked here, their pixels while they are read."""
    with opened_npz(path) as archive:
        parts, remarks = _parts(archive, path)
        shapes = [_image_shape(archive, path, part.images) for part in parts]
        if shapes[0] != shapes[-1]:
            raise DataError(
                f"{path}: expected {parts[-1].images} like {parts[0].images}, {shapes[0]}, got "
                f"{shapes[-1]}"
            )
        counts = {part.labels: header_of(archive, path, part.images).shape[0] for part in parts}
        classes, labels = labelled(archive, path, counts)
        known = _persons(archive, path, parts, list(counts.values()))
    if groups is not None:
        known = persons_of_rows(path, sum(counts.values()), groups)
    source.check_labels(labels[0], classes, path)
    source.check_range(labels[-1], classes, path)
    if len(parts) == 2:
        train, test = np.arange(len(labels[0])), np.arange(len(labels[1])) + len(labels[0])
    elif known is None:
        train, test = source.stratified_split(
            labels[0], classes, path, test_fraction=test_fraction, seed=seed
        )
    else:
        train, test = split_by_person(
            labels[0], classes, known, path, test_fraction=test_fraction, seed=seed
        )
    order = np.concatenate([train, test])
    return Source(
        name=path.stem,
        key=source.key_of([path], test_fraction, seed),
        classes=classes,
        labels=np.concatenate(labels)[order],
        train_count=len(train),
        shape=shapes[0],
        chunks=lambda: _chunks(path, parts, train, test),
        remarks=lambda: remarks,
        groups=known and [known[row] for row in order],
        ids=[str(row) for row in order.tolist()],
    )


def _persons(
    archive: zipfile.ZipFile, path: Path, parts: list[_Part], counts: list[int]
) -> list[str] | None:
    """Whose each image is by the file's own arrays, of all parts; None where it has none."""
    own = {name[:-4].lower(): name[:-4] for name in archive.namelist() if name.endswith(".npy")}
    wanted = [_GROUPS[part.kind] for part in parts]
    found = [own[name] for name in wanted if name in own]
    if not found:
        return None
    if len(found) < len(wanted):
        raise DataError(
            f"{path}: expected {' and '.join(wanted)}, both or neither, got {found[0]} alone; add "
            "the other"
        )
    lists = [ids(archive, path, name, count) for name, count in zip(found, counts, strict=True)]
    return [one_name(each) for of_part in lists for each in of_part]


def _parts(archive: zipfile.ZipFile, path: Path) -> tuple[list[_Part], list[str]]:
    """The part to train on, that to test on where there is one, and what is to be said of both."""
    names = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
    train, test, validation = (
        _part(path, names, known, kind)
        for kind, known in (("train", _TRAIN), ("test", _TEST), ("validation", _VALIDATION))
    )
    if train is None:
        raise DataError(
            f"{path}: expected arrays images and labels, and test_images and test_labels both or "
            f"neither, got {source.some(sorted(names))}; add images and labels"
        )
    remarks = []
    if validation and test:
        remarks.append(f"{validation.images} is not read: the model is tested on {test.images}")
    elif validation:
        remarks.append(f"{validation.images} is what the model is tested on; there is no test set")
    tested = test or validation
    return [train, tested] if tested else [train], remarks


def _part(path: Path, names: Sequence[str], known: _Names, kind: str) -> _Part | None:
    """The arrays of a part under one of the known pairs of names; half of a pair is an error."""
    own = {name.lower(): name for name in names}
    found = [pair for pair in known if own.keys() & set(pair)]
    if not found:
        return None
    halves = [name for pair in found for name in pair if name not in own]
    if halves:
        raise DataError(
            f"{path}: expected arrays {' and '.join(found[0])}, both or neither, got "
            f"{source.some(sorted(names))}; add {', '.join(halves)}"
        )
    if len(found) > 1:
        raise DataError(
            f"{path}: expected one array of these images, got "
            f"{' and '.join(own[pair[0]] for pair in found)}; leave one out"
        )
    images, labels = found[0]
    return _Part(images=own[images], labels=own[labels], kind=kind)


def _chunks(path: Path, parts: list[_Part], train: Labels, test: Labels) -> Iterator[Chunk]:
    """All images: those in `train` from row 0 on, those in `test` behind them."""
    row, largest = 0, 0
    with opened_npz(path) as archive:
        for part in parts:
            for images in _images(archive, path, part.images):
                largest = max(largest, int(images.max()))
                stop = row + len(images)
                for rows, base in ((train, 0), (test, len(train))):
                    first, last = np.searchsorted(rows, [row, stop])
                    if first < last:
                        yield base + int(first), images[rows[first:last] - row]
                row = stop
        name = parts[0].images
        if largest == 1 and header_of(archive, path, name).dtype == np.uint8:
            raise DataError(
                f"{path}: expected {name} as uint8 in 0..255, got 0 and 1 alone, which would all "
                f"be black; save {name} * 255 where 1 is white"
            )


def _images(archive: zipfile.ZipFile, path: Path, name: str) -> Iterator[Pixels]:
    """One array of images in chunks uint8 `[k, channels, height, width]`."""
    with archive.open(f"{name}.npy") as file:
        header = array_header(file, path, name)
        stride = prod(header.shape[1:]) * header.dtype.itemsize
        rows = max(1, source.CHUNK_BYTES // stride)
        for start in range(0, header.shape[0], rows):
            taken = min(rows, header.shape[0] - start)
            values = np.frombuffer(exactly(file, taken * stride, path, name), header.dtype)
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
    low, high = values.min(), values.max()
    if not (np.isfinite(values).all() and low >= 0 and high <= 1):
        raise DataError(
            f"{path}: expected floats of {name} in [0, 1], got {low}..{high}; "
            f"{_cure(low, high, name)}"
        )
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def _cure(low: float, high: float, name: str) -> str:
    """What to save instead, by what the values look like."""
    if low >= 0 and 1 < high <= 255:
        return f"if they are in 0..255, save {name}.round().astype(numpy.uint8)"
    if -1 <= low < 0 and high <= 1:
        return f"if they are in -1..1, save ({name} + 1) / 2"
    return "rescale them as they are meant to be seen, or save 0..255 as uint8"


def _image_shape(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, int, int]:
    """`(channels, height, width)` of one array of images, from its header."""
    header = header_of(archive, path, name)
    if header.dtype != np.uint8 and header.dtype.kind != "f":
        raise DataError(
            f"{path}: expected {name} as uint8 or float, got {header.dtype}; if its values are in "
            f"0..255, save {name}.astype(numpy.uint8)"
        )
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
