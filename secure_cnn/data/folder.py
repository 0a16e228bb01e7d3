"""A folder of class folders of PNG or JPEG images.

    pets/cat/1.png, pets/dog/1.png, …                          split by the seed, class by class
    pets/train/cat/1.png, …, pets/test/cat/9.png, …            split as it is

Every image has the same size. They are grey if each of them is, else all are read as colour.
Transparency is dropped. Each is turned as its camera's orientation tag says, as every viewer does.
The names of the folders must be UTF-8: they are written into the model's file.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from secure_cnn.data import source
from secure_cnn.data.source import Chunk, Labels, Pixels, Source
from secure_cnn.data.store import stored_shape
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["folder_source"]

_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
# What undoes each value of the orientation tag (Exif 2.32, 4.6.4); 1 and unknown ones turn nothing.
_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)
_MOST_PIXELS = 1 << 24  # 4096x4096: far above what is trained on, far below what exhausts memory


@dataclass(frozen=True, kw_only=True, eq=False)
class _Listing:
    classes: tuple[str, ...]
    files: list[Path]
    labels: Labels


def folder_source(root: Path, *, cache: Path | None, test_fraction: float, seed: int) -> Source:
    """The images below `root`, of which `cache` may already hold the pixels."""
    name = root.resolve().name
    source.check_name(name, f"{root}: the name of the folder")
    split = (root / "train").is_dir() and (root / "test").is_dir()
    train, test = _listed_split(root) if split else _seeded_split(root, test_fraction, seed)
    files, labels = train.files + test.files, np.concatenate([train.labels, test.labels])
    with _readable(root):
        key = source.key_of(files, train.classes, len(train.files), "upright")
    shape = stored_shape(cache, key, len(files)) or _common_shape(files)
    return Source(
        name=name,
        key=key,
        classes=train.classes,
        labels=labels,
        train_count=len(train.files),
        shape=shape,
        chunks=lambda: _decode(files, shape),
    )


def _listed_split(root: Path) -> tuple[_Listing, _Listing]:
    """`train/` and `test/` as they are; they must have the same classes."""
    train, test = _list(root / "train"), _list(root / "test")
    if train.classes != test.classes:
        raise DataError(
            f"{root}: expected the same class folders in train/ and test/, "
            f"got {sorted(set(train.classes) ^ set(test.classes))} in one of them only"
        )
    return train, test


def _seeded_split(root: Path, test_fraction: float, seed: int) -> tuple[_Listing, _Listing]:
    listing = _list(root)
    train, test = (
        _Listing(
            classes=listing.classes,
            files=[listing.files[row] for row in rows],
            labels=listing.labels[rows],
        )
        for rows in source.stratified_split(
            listing.labels, listing.classes, root, test_fraction=test_fraction, seed=seed
        )
    )
    return train, test


def _list(root: Path) -> _Listing:
    with _readable(root):
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
        for folder in folders:
            source.check_name(folder.name, f"{folder}: the name of the class folder")
        stray = [entry for entry in entries if entry.suffix.lower() in _SUFFIXES]
        if stray:
            raise DataError(f"{stray[0]}: expected images inside class folders; move it into one")
        if len(folders) < 2:
            raise DataError(
                f"{root}: expected at least two class folders of PNG or JPEG images, "
                f"got {[folder.name for folder in folders]}"
            )
        members = [_images(folder) for folder in folders]
    return _Listing(
        classes=tuple(folder.name for folder in folders),
        files=[file for files in members for file in files],
        labels=np.repeat(np.arange(len(folders)), [len(files) for files in members]),
    )


def _images(folder: Path) -> list[Path]:
    """The images of one class; anything else is refused, so that nothing is left out silently."""
    files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for file in files:
        if file.is_dir() or file.suffix.lower() not in _SUFFIXES:
            raise DataError(
                f"{file}: expected only files named {', '.join(_SUFFIXES)} in a class folder; "
                "convert it, or move it elsewhere"
            )
    if not files:
        raise DataError(f"{folder}: expected images of this class, got an empty folder; remove it")
    return files


def _common_shape(files: list[Path]) -> tuple[int, int, int]:
    """What all images have in common, from their headers alone."""
    grey, size = True, None
    for file in files:
        with _opened(file) as image:
            found = _size(image)
            size = size or found
            if found != size:
                raise DataError(
                    f"{file}: expected {size[0]}x{size[1]} pixels like {files[0]}, "
                    f"got {found[0]}x{found[1]}; bring all images to one size"
                )
            grey = grey and image.mode in _GREY
    assert size is not None  # a listing has files
    return (1 if grey else 3, size[1], size[0])


def _size(image: Image.Image) -> tuple[int, int]:
    """Width and height once it stands upright; a square has the same either way, unread."""
    width, height = image.size
    if width != height and image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE:
        return height, width
    return width, height


def _decode(files: list[Path], shape: tuple[int, int, int]) -> Iterator[Chunk]:
    rows = max(1, source.CHUNK_BYTES // prod(shape))
    for start in range(0, len(files), rows):
        yield start, np.stack([_pixels(file, shape) for file in files[start : start + rows]])


def _pixels(file: Path, shape: tuple[int, int, int]) -> Pixels:
    """One image as uint8 `[channels, height, width]`."""
    with _opened(file) as image:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
        upright = image if turn is None else image.transpose(turn)
        pixels = np.asarray(upright.convert("L" if shape[0] == 1 else "RGB"))
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    if pixels.shape != shape:
        raise DataError(f"{file}: expected an image of {shape}, got {pixels.shape}: it has changed")
    return pixels


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image with a sound header; what its decoder raises later is a `DataError` too."""
    small = f"at most {_MOST_PIXELS} pixels"
    too_large = source.unusable(
        file, Image.DecompressionBombError, expected=small, cure="make it smaller"
    )
    with _readable(file), too_large, warnings.catch_warnings():
        # Above its own limit Pillow only warns; ours is lower and final.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # A damaged tag says nothing about the pixels; what is sound of the tags is kept.
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        with reading(file) as raw, Image.open(raw, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(
                    f"{file}: expected {small}, got {image.width}x{image.height}; make it smaller"
                )
            if image.mode not in _GREY + _COLOUR:
                raise DataError(
                    f"{file}: expected 8 bits per channel, got Pillow mode {image.mode}; convert it"
                )
            yield image


def _readable(path: Path) -> AbstractContextManager[None]:
    return source.unusable(
        path,
        *(OSError, ValueError, EOFError, IndexError, struct.error, zlib.error),
        SyntaxError,  # what Pillow raises for a broken PNG
        expected="a readable PNG or JPEG image, or a folder of them",
        cure="it is damaged or truncated: replace or remove it",
    )
