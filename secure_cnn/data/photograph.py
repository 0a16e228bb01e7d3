"""One image in a file, as people have them: which are read, and how each becomes pixels.

PNG, JPEG, WebP, BMP and TIFF of 8 bits a channel, told by their bytes whatever the ending of their
name; grey, colour, of a palette or of printing inks. Each is turned as its camera's orientation
tag says, as every viewer does, and laid over the background where it is transparent. Colour
profiles are not applied. Of a JPEG that carries more pictures (depth, the moment before) the first
is read, which is the photograph; other files of several pictures are refused.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from secure_cnn.data import source
from secure_cnn.data.reading import ImageReading
from secure_cnn.data.source import Pixels
from secure_cnn.errors import DataError
from secure_cnn.files import reading as opened_file

__all__ = ["Header", "Photograph", "header", "photograph", "quiet_decoders"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_CAMERA = ("JPEG", "MPO")  # MPO: a JPEG that carries more pictures
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
_MOST_PIXELS = 1 << 27  # the largest cameras have 102 million; decoded, 0.5 GB at a time
_SMOOTH = Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its image before any pixel: whether it is grey, and its upright size.

    The size is `(height, width)`, or None where it was not asked for.
    """

    grey: bool
    size: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Photograph:
    """Pixels uint8 `[channels, height, width]`, and what was done to have them."""

    pixels: Pixels
    transparent: bool
    enlarged: bool
    greyed: bool


def header(file: Path, *, sized: bool) -> Header:
    """Looks at the head of a file; its size takes longer, for the tags may stand at the end."""
    with _opened(file) as image:
        return Header(grey=image.mode in _GREY, size=_size(image) if sized else None)


def photograph(file: Path, shape: tuple[int, int, int], reading: ImageReading) -> Photograph:
    """The image in a file as pixels of this shape.

    Raises:
        DataError: It is damaged, or has another size and `reading` has none to bring it to.
    """
    with _opened(file) as image:
        if reading.shape is not None and image.format in _CAMERA:
            # Decoded at a half, quarter or eighth where that is still twice what is wanted: for a
            # camera's picture most of the work.
            turned = image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
            sides = (2 * shape[2], 2 * shape[1])
            image.draft(None, sides[::-1] if turned else sides)
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
        upright = image if turn is None else image.transpose(turn)
        greyed = shape[0] == 1 and upright.mode not in _GREY
        flat, transparent = _laid_flat(upright, "L" if shape[0] == 1 else "RGB", reading)
        enlarged = flat.height < shape[1] or flat.width < shape[2]
        fitted = flat if reading.shape is None else _fitted(flat, shape, reading)
        pixels = np.asarray(fitted)
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    if pixels.shape != shape:
        raise DataError(f"{file}: expected an image of {shape}, got {pixels.shape}: it has changed")
    return Photograph(pixels=pixels, transparent=transparent, enlarged=enlarged, greyed=greyed)


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silences warnings of Pillow in the block, whatever thread they come from."""
    with warnings.catch_warnings():
        # Above its own limit of pixels Pillow only warns; ours is final. A damaged tag says nothing
        # about the pixels; what is sound of the tags is kept.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _size(image: Image.Image) -> tuple[int, int]:
    """Height and width once it stands upright; a square has the same either way, unread."""
    if image.format == "TIFF":
        image.load()  # whereupon Pillow turns it, and takes the tag away
    width, height = image.size
    if width == height:
        return height, width
    on_its_side = image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
    return (width, height) if on_its_side else (height, width)


def _laid_flat(image: Image.Image, mode: str, reading: ImageReading) -> tuple[Image.Image, bool]:
    """Grey or colour without transparency, and whether there was any."""
    if not image.has_transparency_data:
        return image.convert(mode), False
    full = image.convert("RGBA")
    if full.getchannel("A").getextrema()[0] == 255:
        return full.convert("RGB").convert(mode), False
    behind = Image.new("RGBA", full.size, (*reading.colour, 255))
    behind.alpha_composite(full)
    return behind.convert("RGB").convert(mode), True


def _fitted(image: Image.Image, shape: tuple[int, int, int], reading: ImageReading) -> Image.Image:
    sides = (shape[2], shape[1])
    if reading.fit == "stretch":
        return image.resize(sides, _SMOOTH)
    if reading.fit == "pad":
        around = Image.new("RGB", sides, reading.colour).convert(image.mode)
        whole = ImageOps.contain(image, sides, _SMOOTH)
        around.paste(whole, ((sides[0] - whole.width) // 2, (sides[1] - whole.height) // 2))
        return around
    return ImageOps.fit(image, sides, _SMOOTH)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image that is of a kind we read; what its decoder raises later is a `DataError` too."""
    readable = source.unusable(
        file,
        Exception,  # decoders meet damage with whatever their code ran into
        expected=f"a readable image ({', '.join(_FORMATS)})",
        cure="it is damaged, truncated or of another kind: replace or remove it",
    )
    with readable, opened_file(file) as raw, _identified(raw, file) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise _too_large(file, f"{image.width}x{image.height}")
        _check_kind(image, file)
        yield image


def _too_large(file: Path, got: str) -> DataError:
    return DataError(f"{file}: expected at most {_MOST_PIXELS} pixels, got {got}; make it smaller")


def _identified(raw: BinaryIO, file: Path) -> Image.Image:
    try:
        return Image.open(raw, formats=_FORMATS)
    except Image.DecompressionBombError as error:  # by a limit of its own, which is above ours
        raise _too_large(file, "more") from error
    except UnidentifiedImageError:
        raise ValueError("a file that is none of them") from None


def _check_kind(image: Image.Image, file: Path) -> None:
    """Refuses by name what would have to be guessed at: deeper pixels, and several pictures."""
    # Of deep colour images Pillow drops the lower half of each value and does not say so.
    halved = ";16" in str(getattr(image, "tile", ""))
    if halved or image.mode not in _GREY + _COLOUR:
        deep = halved or image.mode.startswith(("I", "F"))
        got = f"more (Pillow mode {image.mode})" if deep else f"Pillow mode {image.mode}"
        raise DataError(
            f"{file}: expected 8 bits per channel, got {got}; save it with 8 bits per channel, the "
            "values scaled to 0..255 as they are meant to be seen"
        )
    frames = 1 if image.format in _CAMERA else getattr(image, "n_frames", 1)
    if frames > 1:
        raise DataError(
            f"{file}: expected one picture, got {frames} in one {image.format} file; save those "
            "that you mean as files of their own"
        )
