"""A folder of class folders of images, read in parallel.

Where the images are is in `layout`, what one of them becomes in `photograph`. They are grey if each
of them is, else all are read as colour.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL

from secure_cnn.data import source
from secure_cnn.data.groups import persons_of_files, split_by_person
from secure_cnn.data.layout import Layout, Listing, folder_layout
from secure_cnn.data.photograph import Header, Photograph, header, photograph, quiet_decoders
from secure_cnn.data.reading import ImageReading
from secure_cnn.data.source import Chunk, Source
from secure_cnn.data.store import stored_shape
from secure_cnn.errors import DataError
from secure_cnn.progress import count_progress

__all__ = ["folder_source"]

_MOST_WORKERS = 4  # each may hold a whole photograph, decoded
_MOST_ROWS = 256  # images between two looks at the progress
_MOST_VALUES = 1 << 24  # of one image, as a network takes it at most
_LARGE = 256  # a side that makes training slow

_Found = TypeVar("_Found")


def folder_source(
    root: Path,
    *,
    reading: ImageReading,
    groups: str | None,
    cache: Path | None,
    test_fraction: float,
    seed: int,
) -> Source:
    """The images below `root`, of which `cache` may already hold the pixels."""
    name = root.resolve().name
    source.check_name(name, f"{root}: the name of the folder")
    layout = folder_layout(root)
    train, test, persons = _split(root, layout, groups, test_fraction, seed)
    files = train.files + test.files
    with source.unusable(root, OSError, expected="files that can be read", cure="look at them"):
        settings = (reading.shape, reading.fit, reading.colour, reading.channels)
        key = source.key_of(files, train.classes, len(train.files), settings, PIL.__version__)
    shape = stored_shape(cache, key, len(files)) or _common_shape(root, files, reading)
    seen = _Seen()
    return Source(
        name=name,
        key=key,
        classes=train.classes,
        labels=np.concatenate([train.labels, test.labels]),
        train_count=len(train.files),
        shape=shape,
        chunks=lambda: _decoded(files, shape, reading, seen),
        remarks=lambda: (
            *layout.remarks,
            *_inner_folders(root, layout, groups),
            *seen.remarks(shape, reading),
        ),
        groups=persons,
        ids=[file.relative_to(root).as_posix() for file in files],
    )


def _inner_folders(root: Path, layout: Layout, groups: str | None) -> Iterator[str]:
    """How folders inside class folders were understood, where nobody said what they are."""
    for part in (layout.train, layout.test):
        if groups is not None or part is None or not any(part.folders):
            continue
        file = next(file for file, inner in zip(part.files, part.folders, strict=True) if inner)
        yield (
            f"folders inside class folders, such as "
            f"{root.name / file.parent.relative_to(root)}, belong to the "
            "class; where each is a person, say so (--groups folder)"
        )
        return


def _split(
    root: Path, layout: Layout, groups: str | None, test_fraction: float, seed: int
) -> tuple[Listing, Listing, list[str] | None]:
    """Both parts as the folder has them, or as the seed cuts them; and whose each image is.

    Persons decide where the cut is if they were asked for: a folder inside a class folder may as
    well mean something else.
    """
    whole, given = layout.train, layout.test
    if given is not None:
        folders = whole.folders + given.folders
        return whole, given, persons_of_files(root, whole.files + given.files, folders, groups)
    persons = persons_of_files(root, whole.files, whole.folders, groups)
    if persons is None or groups is None:
        cut = source.stratified_split(
            whole.labels, whole.classes, root, test_fraction=test_fraction, seed=seed
        )
    else:
        cut = split_by_person(
            whole.labels, whole.classes, persons, root, test_fraction=test_fraction, seed=seed
        )
    train, test = (
        Listing(
            classes=whole.classes,
            files=[whole.files[row] for row in rows],
            labels=whole.labels[rows],
            folders=[whole.folders[row] for row in rows],
        )
        for rows in cut
    )
    return train, test, persons and [persons[row] for rows in cut for row in rows]


def _common_shape(root: Path, files: list[Path], reading: ImageReading) -> tuple[int, int, int]:
    """The shape of all images, from their headers alone."""
    sized = reading.shape is None
    heads: list[Header] = []
    with count_progress(f"looking at {root.name}", len(files)) as tell:
        for found in _read(partial(header, sized=sized), files):
            heads += found
            tell(len(heads))
    channels = reading.channels or (1 if all(head.grey for head in heads) else 3)
    height, width = reading.shape or _common_size(root, heads)
    if channels * height * width > _MOST_VALUES:
        raise DataError(
            f"{root}: expected images of at most {_MOST_VALUES} values, got "
            f"{channels}x{height}x{width}; make them smaller as they are read, say --image-size 64 "
            "(image_size=64 in Python)"
        )
    return channels, height, width


def _common_size(root: Path, heads: list[Header]) -> tuple[int, int]:
    sizes = Counter(head.size for head in heads if head.size is not None)
    (usual, count), *others = sizes.most_common()
    if others:
        small, large = min(sizes, key=prod), max(sizes, key=prod)
        most = f", {count} of {len(heads)} images of {usual[0]}x{usual[1]}" if count > 1 else ""
        raise DataError(
            f"{root}: expected images of one size, got {len(sizes)} sizes (height x width), from "
            f"{small[0]}x{small[1]} to {large[0]}x{large[1]}{most}; bring them to one size as they "
            f"are read, say --image-size "
            f"{_suggested(small)} (image_size={_suggested(small)} in Python)"
        )
    return usual


def _suggested(smallest: tuple[int, int]) -> int:
    """A side that the networks are quick on, and that few images have to be enlarged for."""
    return 32 if min(smallest) < 48 else 64


class _Seen:
    """Counts what was done to the images; a class because it counts."""

    def __init__(self) -> None:
        self._images, self._transparent, self._enlarged, self._greyed = 0, 0, 0, 0

    def add(self, images: Sequence[Photograph]) -> None:
        self._images += len(images)
        self._transparent += sum(image.transparent for image in images)
        self._enlarged += sum(image.enlarged for image in images)
        self._greyed += sum(image.greyed for image in images)

    def remarks(self, shape: tuple[int, int, int], reading: ImageReading) -> Iterator[str]:
        """What the person who brought them may not expect."""
        if self._transparent:
            yield (
                f"images with transparent places: {self._transparent} of {self._images}; "
                f"{reading.background} is behind them (--background)"
            )
        if self._greyed:
            yield f"images with colours, read as grey: {self._greyed} of {self._images}"
        if self._enlarged:
            yield (
                f"images smaller than {shape[1]}x{shape[2]}, enlarged: {self._enlarged} of "
                f"{self._images}"
            )
        if self._images and reading.shape is None and min(shape[1:]) > _LARGE:
            yield (
                f"the images have {shape[1]}x{shape[2]} pixels, and the work grows with them: "
                "--image-size 64 takes a small part of the time"
            )


def _decoded(
    files: list[Path], shape: tuple[int, int, int], reading: ImageReading, seen: _Seen
) -> Iterator[Chunk]:
    rows = max(1, min(_MOST_ROWS, source.CHUNK_BYTES // prod(shape)))
    start = 0
    for images in _read(partial(photograph, shape=shape, reading=reading), files, rows):
        seen.add(images)
        yield start, np.stack([image.pixels for image in images])
        start += len(images)


def _read(
    function: Callable[[Path], _Found], files: list[Path], rows: int = _MOST_ROWS
) -> Iterator[list[_Found]]:
    """What a function finds in each file, in order, `rows` at a time.

    After the first file that is at fault the others are still looked at, and all that are at fault
    are named in one error.
    """
    faults: list[tuple[Path, DataError]] = []

    def attempt(file: Path) -> _Found | DataError:
        try:
            return function(file)
        except DataError as error:
            return error

    with _threads() as pool:
        for start in range(0, len(files), rows):
            part = files[start : start + rows]
            with quiet_decoders():
                found = list(pool.map(attempt, part))
            faults += [
                (file, error)
                for file, error in zip(part, found, strict=True)
                if isinstance(error, DataError)
            ]
            if not faults:
                yield [each for each in found if not isinstance(each, DataError)]
    if faults:
        raise _all_of(faults, len(files))


def _all_of(faults: list[tuple[Path, DataError]], total: int) -> DataError:
    """The first fault in full, and the places of the others."""
    (_, first), *others = faults
    if not others:
        return first
    names = source.some([str(file) for file, _ in others])
    return DataError(f"{first}. And {len(others)} more of {total} images are at fault: {names}")


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads to decode in: Pillow's decoders let others run. Interrupted, none goes on."""
    with ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
