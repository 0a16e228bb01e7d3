"""How a folder's images are read: to which size, over what, in how many channels."""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, final, get_args

from PIL import ImageColor

from secure_cnn.errors import DataError

__all__ = ["FITS", "Fit", "ImageReading"]

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[str, ...] = get_args(Fit)
"""Ways to bring an image of another shape to one size."""

_LARGEST_SIDE = 4096
_EXPECTED = (
    f"one number or HEIGHTxWIDTH, each side 1 to {_LARGEST_SIDE} pixels, such as 64 or 48x64"
)


@final
@dataclass(frozen=True, kw_only=True)
class ImageReading:
    """What every image of a folder becomes, whatever its own size, form and kind.

    A value of this class is all that decides pixels besides the files, so that who reads a folder
    by an equal one gets equal images.

    Args:
        size: One number for a square, `(height, width)`, or the text `"48x64"`; None leaves every
            image as it is, and then they must all have one size.
        fit: How an image of another shape is brought to `size`: `crop` keeps its middle, as large
            as it goes; `pad` keeps all of it and puts `background` beside it; `stretch` keeps all
            of it and changes its proportions.
        background: The colour behind transparent places and beside padded images: a name of CSS,
            such as `white`, or `#rrggbb`. Grey images get its grey.
        channels: 1 for grey and 3 for colour; None takes grey where all images are.

    Raises:
        DataError: A setting is none of these, or `fit` stands without a size.

    Example:
        >>> ImageReading(size=64).shape, ImageReading(size="48x64", fit="pad").shape
        ((64, 64), (48, 64))
        >>> ImageReading(background="#ff8000").colour
        (255, 128, 0)
    """

    size: int | str | tuple[int, int] | None = None
    fit: Fit = "crop"
    background: str = "white"
    channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fit, str) or self.fit not in FITS:
            raise DataError(f"image_fit: expected {' or '.join(FITS)}, got {self.fit!r}")
        if self.channels not in (None, 1, 3) or isinstance(self.channels, bool):
            raise DataError(f"channels: expected 1, 3 or None, got {self.channels!r}")
        if self.shape is None and self.fit != "crop":
            raise DataError(
                f"image_fit={self.fit}: expected image_size with it, got none; give both or neither"
            )
        # Computed, so that it is refused here and not at the first transparent image.
        _ = self.colour

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width, or None where images stay as they are."""
        if self.size is None:
            return None
        sides = _sides(self.size)
        if sides is None or not all(1 <= side <= _LARGEST_SIDE for side in sides):
            raise DataError(f"image_size: expected {_EXPECTED}, got {self.size!r}")
        return sides

    @property
    def colour(self) -> tuple[int, int, int]:
        """Red, green and blue of the background, each 0 to 255."""
        found: tuple[int, ...] = ()
        if isinstance(self.background, str):
            with suppress(ValueError):
                found = ImageColor.getrgb(self.background)
        if len(found) != 3 or not all(0 <= part <= 255 for part in found):
            raise DataError(
                "background: expected the name of a colour, such as white, or #rrggbb, got "
                f"{self.background!r}"
            )
        red, green, blue = found
        return red, green, blue


def _sides(size: object) -> tuple[int, int] | None:
    """Both sides of what may stand for a size; None where it stands for none."""
    if isinstance(size, str):
        found = re.fullmatch(r"([0-9]{1,5})(?:[xX]([0-9]{1,5}))?", size)
        return (int(found[1]), int(found[2] or found[1])) if found else None
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int for side in pair):
        return None
    return pair[0], pair[1]
