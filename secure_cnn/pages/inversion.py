"""Images found from gradients: how many are identified, and what they look like beside the truth.

A picture stands in a page alone, never in a record. Deliberately not here: a choice of images. A
page is handed on: whoever gives pictures gives such as may be seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from secure_cnn.pages.canvas import INK, MUTED, SERIES, WIDTH, Canvas, render
from secure_cnn.pages.template import Fact, Table
from secure_cnn.record import InversionRecord, wording
from secure_cnn.record.document import require

__all__ = [
    "MOST_IMAGES",
    "MOST_SIDE",
    "InversionPicture",
    "inversion_control",
    "inversion_fact",
    "inversion_figure",
    "inversion_table",
    "picture_figure",
]

MOST_IMAGES = 8
"""In one picture."""
MOST_SIDE = 512
"""Pixels along a side of an image."""

_WORKS = 0.9
"""The share of single images that an attack that works identifies where nothing protects them."""
_COLORS = {"plain": SERIES[2], "clipped": SERIES[4], "noised": SERIES[3]}
_NAMES, _ROW, _WIDEST, _ABREAST = 118, 24, 84, 4

_Images = npt.NDArray[np.floating] | npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class InversionPicture:
    """A few images, and what was found of them from a gradient, in the same order.

    Attributes:
        title: What was shared, in a few words.
        originals: `[n, channels, height, width]`: uint8, or floats in [0, 1]; at most `MOST_IMAGES`
            of at most `MOST_SIDE` pixels a side.
        reconstructions: As many of the same shape.

    Raises:
        RunError: An array is of another kind, shape or range.
    """

    title: str
    originals: _Images
    reconstructions: _Images

    def __post_init__(self) -> None:
        for name in ("originals", "reconstructions"):
            where, images = f"picture.{name}", np.asarray(getattr(self, name))
            shape = images.shape
            fits = len(shape) == 4 and 1 <= shape[0] <= MOST_IMAGES and shape[1] >= 1
            fits = fits and 1 <= min(shape[2:]) <= max(shape[2:]) <= MOST_SIDE
            sizes = f"[n, c, h, w] of at most {MOST_IMAGES} images of {MOST_SIDE} pixels a side"
            require(fits, where, sizes, shape)
            bytes_, floats = images.dtype == np.uint8, images.dtype.kind == "f"
            fine = bytes_ or (floats and bool(((images >= 0) & (images <= 1)).all()))
            require(fine, where, "uint8, or floats in [0, 1]", images.dtype)
            object.__setattr__(self, name, images)
        same = self.originals.shape == self.reconstructions.shape
        expected = f"shape {self.originals.shape}"
        require(same, "picture.reconstructions", expected, self.reconstructions.shape)


def inversion_figure(records: Sequence[InversionRecord]) -> str:
    """The share of images that are identified, with its interval, beside what chance would do."""
    title = "Images identified from a gradient"
    size = (WIDTH, 30 + _ROW * len(records) + 46)
    return render("inversion", title, size, partial(_shares, records))


def inversion_control(records: Sequence[InversionRecord]) -> tuple[bool, str]:
    """Whether images are found where nothing protects them, of the smallest batch, and in words.

    Where they are not, what is not found under a protection tells nothing of it.
    """
    plain = [each for each in records if each.protection == "plain"]
    if not plain:
        return False, (
            "No plain gradient was attacked, so that nothing shows that this attack finds images "
            "at all: what it does not find is no sign of safety."
        )
    first = min(plain, key=lambda each: each.batch)
    told = (
        f"{first.identified} of {first.asked} images from plain gradients of "
        f"{'one image' if first.batch == 1 else f'{first.batch} images'} "
        f"(95% interval {first.low:.3f}–{first.high:.3f})"
    )
    if first.identified > 0 and first.high >= _WORKS:
        return True, f"Its control: the attack identifies {told}, where nothing protects them."
    return False, (
        f"On this network and data the attack identifies {told}, where one that works finds "
        f"{_WORKS:g} and more: it fails without protection too, so that nothing follows for a "
        "protection under which it finds nothing."
    )


def inversion_fact(records: Sequence[InversionRecord], *, private: bool) -> Fact:
    """What the gradients of this training give away: of a private one, those that are noised."""
    own = "noised" if private else "plain"
    mine = [each for each in records if each.protection == own]
    if not mine:
        detail = f"no {own} gradient was attacked, and this training makes no other"
        return Fact(name="Images identified", value="not told", detail=detail)
    most = max(mine, key=lambda each: (each.share, each.asked))
    detail = (
        f"at most: {own} gradients, as of this training, batch {most.batch}; among "
        f"{most.candidates:,} candidates"
    )
    works, _ = inversion_control(records)
    if not works:
        detail += "; says nothing of a protection, see below"
    return Fact(name="Images identified", value=f"{most.identified} of {most.asked}", detail=detail)


def inversion_table(records: Sequence[InversionRecord]) -> Table:
    """A row for each protection and batch."""
    head = ("what is shared", "batch", "identified", "share", "95% interval", "candidates")
    rows = [
        (
            each.protection,
            str(each.batch),
            f"{each.identified} of {each.asked}",
            wording.fraction(each.share),
            f"{each.low:.3f}–{each.high:.3f}",
            f"{each.candidates:,}",
            "∞" if each.psnr == math.inf else f"{each.psnr:.1f}",
            f"{each.ssim:.2f}",
        )
        for each in records
    ]
    return (*head, "PSNR, dB", "SSIM"), rows


def picture_figure(picture: InversionPicture, index: int) -> str:
    """Originals above reconstructions; `index` makes its identifiers its own."""
    title = f"{picture.title}: originals above reconstructions"
    rows = math.ceil(len(picture.originals) / _ABREAST)
    size = (WIDTH, 26 + rows * 2 * (_WIDEST + 22))
    return render(f"inversion-{index}", title, size, partial(_picture, picture))


def _shares(records: Sequence[InversionRecord], canvas: Canvas) -> None:
    canvas.title("Images identified from a gradient")
    axes = canvas.axes(_NAMES, 28, WIDTH - _NAMES - 46, _ROW * len(records), grid="x")
    axes.set(xlim=(0, 1), ylim=(len(records), 0), yticks=[])
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    canvas.settle(axes)
    for row, each in enumerate(records):
        y, color = 28 + _ROW * (row + 0.5), _COLORS[each.protection]
        axes.barh(row + 0.5, each.share, 0.5, color=color, alpha=0.8)
        axes.hlines(row + 0.5, each.low, each.high, color=INK, lw=1.5)
        chance = 1 / each.candidates
        axes.vlines(chance, row + 0.15, row + 0.85, color=MUTED, lw=1.5, ls=(0, (2, 1)))
        words = f"{each.protection}, batch {each.batch}"
        canvas.text(_NAMES - 8, y, words, align="right", room=_NAMES - 8)
        canvas.text(WIDTH, y, wording.fraction(each.share), align="right", bold=True)
    foot = 28 + _ROW * len(records) + 34
    canvas.text(0, foot, "share of the images; line: 95% interval; dashes: chance", color=MUTED)


def _picture(picture: InversionPicture, canvas: Canvas) -> None:
    """As large in every picture: where there are more than a few, below the first ones."""
    canvas.text(0, 12, picture.title, bold=True, size=12.5, room=WIDTH)
    top = 26.0
    for start in range(0, len(picture.originals), _ABREAST):
        part = slice(start, start + _ABREAST)
        for words, images in (
            ("originals", picture.originals[part]),
            ("reconstructions", picture.reconstructions[part]),
        ):
            canvas.text(0, top + 6, words, color=MUTED)
            for column, image in enumerate(images):
                axes = canvas.axes(column * (_WIDEST + 6), top + 16, _WIDEST, _WIDEST)
                axes.imshow(_shown(image), aspect="equal")
                axes.set(xticks=[], yticks=[])
            top += _WIDEST + 22


def _shown(image: _Images) -> npt.NDArray[np.floating]:
    """Three channels as colours, any other number as their mean in grey; `[h, w, 3]` in [0, 1]."""
    scaled = image / 255 if image.dtype == np.uint8 else image.astype(np.float64)
    picture = scaled if len(scaled) == 3 else np.repeat(scaled.mean(0, keepdims=True), 3, 0)
    return np.moveaxis(picture, 0, 2)
