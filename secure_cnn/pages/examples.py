"""Examples: test images before and after an attack, with what the model took them for.

Deliberately not here: attacking. The images are given, and training images have no place here.
"""

import math
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from torch import Tensor

from secure_cnn.pages.canvas import MUTED, SERIES, Canvas, render, short
from secure_cnn.record.document import require

__all__ = ["Examples", "example_figure", "example_figures"]

_SIDE = 112
_RIGHT, _WRONG = SERIES[3], SERIES[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A few test images, clean and attacked: float [k, channels, height, width] in [0, 1].

    `labels`, and the classes predicted `before` and `after` the attack, are integers [k].
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    classes: tuple[str, ...]
    variant: str
    attack: str

    def __post_init__(self) -> None:
        shape, count = tuple(self.clean.shape), len(self.clean)
        require(len(shape) == 4 and shape[1] > 0, "examples.clean", "[k, c, h, w]", shape)
        same = tuple(self.adversarial.shape)
        require(same == shape, "examples.adversarial", f"shape {shape}", same)
        for name in ("clean", "adversarial"):
            images: Tensor = getattr(self, name)
            fine = images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
            require(fine, f"examples.{name}", "floats in [0, 1]", images.dtype)
        for name in ("labels", "before", "after"):
            values: list[int] = getattr(self, name).tolist()
            fine = len(values) == count and all(0 <= v < len(self.classes) for v in values)
            require(fine, f"examples.{name}", f"{count} class numbers", values)

    def __len__(self) -> int:
        return len(self.clean)


def example_figures(examples: Examples | None) -> list[str]:
    """A figure for each image, if there are any."""
    return [] if examples is None else [example_figure(examples, k) for k in range(len(examples))]


def example_figure(examples: Examples, index: int) -> str:
    """One image from top to bottom: clean, attacked, and their difference, magnified.

    In the difference, mid-grey is no change; the factor brings its largest value to full scale.
    """
    label = examples.classes[int(examples.labels[index])]
    title = f"Image {index + 1}, class {label}: clean, attacked, and the change"
    size = (_SIDE, 3 * (_SIDE + 26))
    return render(f"example-{index}", title, size, partial(_draw, examples, index))


def _magnification(change: Tensor) -> float:
    """The factor that brings the largest change to half of the range, cut to two digits."""
    largest = float(change.abs().max()) if change.numel() else 0.0
    if largest == 0:
        return 1.0
    factor = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return math.floor(factor / unit) * unit


def _draw(examples: Examples, index: int, canvas: Canvas) -> None:
    clean, adversarial = examples.clean[index].cpu(), examples.adversarial[index].cpu()
    change = adversarial - clean
    factor = _magnification(change)
    said = [_taken_for(examples, index, each) for each in (examples.before, examples.after)]
    said.append((f"change × {factor:.2g}" if change.any() else "no change", MUTED))
    pictures = (clean, adversarial, 0.5 + factor * change)
    for row, (image, (words, color)) in enumerate(zip(pictures, said, strict=True)):
        top = row * (_SIDE + 26)
        _image(canvas.axes(0, top, _SIDE, _SIDE), image)
        canvas.text(0, top + _SIDE + 12, words, color=color, bold=color != MUTED, size=12)


def _taken_for(examples: Examples, index: int, predictions: Tensor) -> tuple[str, str]:
    found = int(predictions[index])
    right = found == int(examples.labels[index])
    name = short(examples.classes[found], 14)
    return (f"✓ {name}", _RIGHT) if right else (f"✗ {name}", _WRONG)


def _image(axes: Axes, image: Tensor) -> None:
    """One picture: three channels as colours, any other number as their mean in grey."""
    picture = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).double().numpy(), aspect="equal")
    axes.set(xticks=[], yticks=[], frame_on=True)
