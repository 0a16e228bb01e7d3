"""Where decoded pixels live: in memory while they fit, else in a memory-mapped file in the cache.

A mapped file holds nothing but uint8 pixels `[n, channels, height, width]`; its name carries the
digest of what it was decoded from and the shape, so a changed source is decoded anew.
"""

import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secure_cnn.data.duplicates import Duplicates
from secure_cnn.data.source import Chunk, Source, unusable
from secure_cnn.data.split import DataSpec, ImageData, Split
from secure_cnn.errors import DataError
from secure_cnn.files import new_file, reading, write_at
from secure_cnn.printable import printable
from secure_cnn.progress import count_progress

__all__ = ["decode", "default_cache", "needed", "stored_shape"]

_ELSEWHERE = "set SECURE_CNN_CACHE to another folder"
# A private mapping of a file larger than memory is refused by Linux unless no swap is reserved for
# it. Python names the flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def default_cache() -> Path | None:
    """`$SECURE_CNN_CACHE`, or `~/.cache/secure-cnn`; None where nobody says where home is."""
    try:
        return Path(os.environ.get("SECURE_CNN_CACHE") or "~/.cache/secure-cnn").expanduser()
    except RuntimeError:  # no HOME, and no entry among the users: a container's nobody
        return None


def needed(cache: Path | None, what: str) -> Path:
    """The cache folder, once there is one; `what` is to be kept there."""
    if cache is None:
        raise DataError(
            f"{what}: expected a cache folder to keep it in, got none, and this user has no home "
            "directory; set SECURE_CNN_CACHE to a folder that can be written"
        )
    return cache


def stored_shape(cache: Path | None, key: str, count: int) -> tuple[int, int, int] | None:
    """The shape of the images that an earlier call decoded into `cache`, if they are there."""
    if cache is None:
        return None
    for path in sorted(cache.glob(f"decoded-{key}-*x*x*.u8")):
        channels, height, width = map(int, path.stem.split("-")[2].split("x"))
        if path.stat().st_size == count * channels * height * width:
            return channels, height, width
    return None


def decode(
    source: Source, cache: Path | None, memory_cap: int, tell: Callable[[str], None]
) -> ImageData:
    """Decode every pixel of `source`: into memory up to `memory_cap` bytes, else into the cache.

    `tell` gets what is to be said of the images, a sentence a call.
    """
    if source.size <= memory_cap:
        images = _decode_to_memory(source, tell)
    else:
        path = (
            needed(cache, source.name)
            / f"decoded-{source.key}-{'x'.join(map(str, source.shape))}.u8"
        )
        if stored_shape(cache, source.key, len(source.labels)) != source.shape:
            _decode_to_file(source, path, tell)
        images = _map(path, (len(source.labels), *source.shape))
    labels = torch.from_numpy(source.labels)
    train = source.train_count
    groups = None if source.groups is None else tuple(source.groups)
    ids = None if source.ids is None else tuple(source.ids)
    return ImageData(
        name=source.name,
        train=Split(images=images[:train], labels=labels[:train], ids=ids and ids[:train]),
        test=Split(images=images[train:], labels=labels[train:], ids=ids and ids[train:]),
        spec=DataSpec(shape=source.shape, classes=source.classes),
        groups=groups and groups[:train],
        test_groups=groups and groups[train:],
    )


def _decode_to_memory(source: Source, tell: Callable[[str], None]) -> Tensor:
    pixels = np.empty((len(source.labels), *source.shape), np.uint8)
    for start, images in _watched(source, tell):
        pixels[start : start + len(images)] = images
    return torch.from_numpy(pixels)


def _decode_to_file(source: Source, path: Path, tell: Callable[[str], None]) -> None:
    _check_room(source, path.parent)
    place = f"room and permission for {source.size} bytes of decoded images of {source.name}"
    writable = unusable(path.parent, OSError, expected=place, cure=_ELSEWHERE)
    stride = prod(source.shape)
    with writable, new_file(path, overwrite=True, mode=0o600) as fd:
        for start, images in _watched(source, tell):
            write_at(fd, memoryview(images.tobytes()), start * stride)


def _watched(source: Source, tell: Callable[[str], None]) -> Iterator[Chunk]:
    """All chunks of a source, with a bar beside them and what there is to say behind them."""
    duplicates = Duplicates(source.labels, source.train_count)
    done = 0
    with count_progress(f"decoding {printable(source.name)}", len(source.labels)) as advance:
        for start, images in source.chunks():
            duplicates.add(start, images)
            yield start, images
            done += len(images)
            advance(done)
    for remark in (*source.remarks(), *duplicates.remarks()):
        tell(remark)


def _check_room(source: Source, cache: Path) -> None:
    """Make the cache folder, and refuse what its disk cannot hold before decoding anything."""
    expected = "a cache folder that can be written"
    with unusable(cache, OSError, expected=expected, cure=_ELSEWHERE):
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    if source.size > free:
        raise DataError(
            f"{source.name}: expected at most {free} bytes of images, which is what {cache} has "
            f"free, got {source.size}; set SECURE_CNN_CACHE to a folder on a larger disk"
        )


def _map(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    """Map a file of pixels copy-on-write: nothing done to the tensor reaches the file."""
    with reading(path) as file:
        mapped = mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return torch.frombuffer(mapped, dtype=torch.uint8).view(shape)
