"""Figures of a run: curves by epoch, what protections cost, and images before and after an attack.

Deliberately not here: smoothing. A point is what was measured at the end of an epoch, and an epoch
whose value is not finite has none. The images are test images: training images have no place here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from secure_cnn.pages.canvas import (
    CARD,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Canvas,
    percents,
    render,
    short,
    variant_colors,
)
from secure_cnn.record import EpochRecord, Row, RunRecord, wording
from secure_cnn.record.document import require

__all__ = [
    "Examples",
    "accuracy_curve",
    "cost_bars",
    "costs",
    "curves",
    "epsilon_curve",
    "example_figure",
    "example_figures",
    "loss_curve",
]

_Ratio = Literal["time_ratio", "memory_ratio"]
_HUGE = 1e7
"""From here on a figure has no room for all of its digits."""
_COSTS: dict[_Ratio, str] = {
    "time_ratio": "Time per step, against plain",
    "memory_ratio": "Memory, against plain",
}


class _Curve(NamedTuple):
    name: str
    title: str
    of: Callable[[EpochRecord], float | None]
    words: Callable[[float], str]
    share: bool = False


class _Line(NamedTuple):
    variant: str
    color: str
    points: tuple[tuple[float, float], ...]


def accuracy_curve(record: RunRecord) -> str:
    """Test accuracy against epochs, all variants in one frame."""
    words = "{:.1%}".format
    return _drawn(
        record, _Curve("accuracy", "Test accuracy", lambda e: e.test_accuracy, words, share=True)
    )


def loss_curve(record: RunRecord) -> str:
    """Mean test cross-entropy against epochs, all variants in one frame."""
    return _drawn(record, _Curve("loss", "Test loss", lambda e: e.test_loss, "{:.3f}".format))


def epsilon_curve(record: RunRecord) -> str:
    """ε spent against epochs, for the variants that are private."""
    return _drawn(record, _Curve("epsilon", "ε spent", lambda e: e.epsilon, wording.epsilon))


def cost_bars(record: RunRecord, metric: _Ratio) -> str:
    """A cost against plain, one bar for each case and variant, with its spread as a whisker."""
    rows = [row for row in record.cost if row.metric == metric]
    draw = partial(_cost, rows, variant_colors(record), metric)
    return render(metric, f"Cost: {metric}", (WIDTH, 44 + 40 * max(1, len(rows))), draw)


def curves(record: RunRecord) -> list[str]:
    """The curves for which there is something to draw."""
    if not record.epochs:
        return []
    drawn = [accuracy_curve(record), loss_curve(record)]
    private = any(epoch.epsilon is not None for epoch in record.epochs)
    return [*drawn, epsilon_curve(record)] if private else drawn


def costs(record: RunRecord) -> list[str]:
    """The costs against plain that are on record."""
    measured = {row.metric for row in record.cost}
    return [cost_bars(record, metric) for metric in _COSTS if metric in measured]


def _drawn(record: RunRecord, curve: _Curve) -> str:
    """One series for each variant that has a finite value at some epoch."""
    series = []
    for variant, color in variant_colors(record).items():
        epochs = [epoch for epoch in record.epochs if epoch.variant == variant]
        pairs = [(float(epoch.epoch), curve.of(epoch)) for epoch in epochs]
        points = tuple((x, y) for x, y in pairs if y is not None and math.isfinite(y))
        if points:
            series.append(_Line(variant, color, points))
    title = f"{curve.title} by epoch".replace("ε", "Epsilon")
    return render(curve.name, title, (WIDTH, 230), partial(_lines, curve, series))


def _lines(curve: _Curve, series: Sequence[_Line], canvas: Canvas) -> None:
    """Lines with their names and last values at the right end, instead of a legend."""
    canvas.title(curve.title)
    if not series:
        canvas.text(0, 40, "No epoch has been recorded yet.", color=MUTED)
        return
    axes = canvas.axes(40, 34, WIDTH - 40 - 112, 158, grid="y")
    _frame(axes, series, share=curve.share)
    canvas.settle(axes)
    for line in series:
        x, values = zip(*line.points, strict=True)
        axes.plot(x, values, color=line.color, lw=2, clip_on=False)
        if len(x) <= 15:
            axes.scatter(x, values, 36, c=line.color, ec=CARD, lw=1, zorder=3, clip_on=False)
    ends = [canvas.height - float(axes.transData.transform(line.points[-1])[1]) for line in series]
    for line, y in zip(series, _spread(ends, 30, 44, 196), strict=True):
        name, value = short(line.variant), line.points[-1][1]
        canvas.text(WIDTH - 102, y - 7, name, color=line.color, bold=True, room=102)
        canvas.text(WIDTH - 102, y + 7, curve.words(value) if value < _HUGE else f"{value:.3g}")
    canvas.text(40 + (WIDTH - 152) / 2, 221, "epoch", color=MUTED, align="center")


def _frame(axes: Axes, series: Sequence[_Line], *, share: bool) -> None:
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    margin = 0.1 * (max(ys) - min(ys)) or 0.05
    low = max(0.0, min(ys) - margin) if share else 0.0
    high = min(1.0, max(ys) + margin) if share else 1.08 * max(ys) or 1.0
    alone = 0.5 if min(xs) == max(xs) else 0.0
    axes.set(xlim=(min(xs) - alone, max(xs) + alone), ylim=(low, high))
    whole = range(int(min(xs)), int(max(xs)) + 1)
    axes.set_xticks(whole[:: math.ceil(len(whole) / 6)])
    axes.tick_params(axis="x", pad=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    if share:
        percents(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter("{x:g}")


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and, if they fit, between the limits."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = [0.0] * len(wanted)
    edge = low
    for index in order:
        places[index] = max(wanted[index], edge)
        edge = places[index] + gap
    edge = high
    for index in reversed(order):
        places[index] = min(places[index], edge)
        edge = places[index] - gap
    return places


def _cost(rows: Sequence[Row], colors: Mapping[str, str], metric: _Ratio, canvas: Canvas) -> None:
    """A bar from nothing to the median, a whisker from low to high, and a line where plain is."""
    canvas.title(_COSTS[metric])
    if not rows:
        canvas.text(0, 40, "Nothing has been measured.", color=MUTED)
        return
    axes = canvas.axes(0, 30, WIDTH - 64, 40 * len(rows))
    furthest = max(1.0, *(row.high for row in rows))
    axes.set(xlim=(0, 1.02 * furthest), ylim=(len(rows), 0), xticks=[], yticks=[])
    for index, row in enumerate(rows):
        color, at = colors[row.variant], index + 0.7
        axes.barh(at, row.median, 0.34, color=color)
        axes.hlines(at, row.low, row.high, color=INK, lw=1.5)
        axes.vlines([row.low, row.high], at - 0.1, at + 0.1, color=INK, lw=1.5)
        axes.vlines(1, at - 0.24, at + 0.24, color=INK, lw=1.5, ls=(0, (2, 1)))
        y = 30 + 40 * index
        canvas.text(0, y + 11, short(f"{row.variant} · {row.case}", 40), room=WIDTH)
        words = f"{row.median:.2f}×"
        canvas.text(WIDTH, y + 28, words, color=color, bold=True, align="right", size=12.5)


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
    return render(f"example-{index}", title, size, partial(_example, examples, index))


def _magnification(change: Tensor) -> float:
    """The factor that brings the largest change to half of the range, cut to two digits."""
    largest = float(change.abs().max()) if change.numel() else 0.0
    if largest == 0:
        return 1.0
    factor = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return math.floor(factor / unit) * unit


def _example(examples: Examples, index: int, canvas: Canvas) -> None:
    clean, adversarial = examples.clean[index].cpu(), examples.adversarial[index].cpu()
    change = adversarial - clean
    factor = _magnification(change)
    said = [_taken_for(examples, index, each) for each in (examples.before, examples.after)]
    said.append((f"change × {factor:.2g}" if change.any() else "no change", MUTED))
    pictures = (clean, adversarial, 0.5 + factor * change)
    for row, (image, (words, color)) in enumerate(zip(pictures, said, strict=True)):
        top = row * (_SIDE + 26)
        _image(canvas.axes(0, top, _SIDE, _SIDE), image)
        at = top + _SIDE + 12
        canvas.text(0, at, words, color=color, bold=color != MUTED, size=12, room=_SIDE)


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
