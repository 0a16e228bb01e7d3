"""A canvas: a figure in CSS pixels that becomes one SVG string, the same string every time.

Colours come out as CSS custom properties with a fallback (`var(--ink, #20242c)`), so one drawing
serves a light page, a dark page and a file of its own. Text stays text. Deliberately not here:
pyplot, whose figures are global, and mathematical markup, in which a class name would be a formula.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, cast, final

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from secure_cnn.printable import printable
from secure_cnn.record import RunRecord

__all__ = [
    "CARD",
    "HAIR",
    "INK",
    "MUTED",
    "SERIES",
    "WIDTH",
    "Canvas",
    "colors_of",
    "css",
    "percents",
    "render",
    "short",
    "tick_percent",
    "variant_colors",
]

INK = "#20242c"
MUTED = "#5f6671"
HAIR = "#dadde2"
CARD = "#fffffe"
# After Okabe and Ito (2008): told apart with every common colour blindness; darkened to carry text.
SERIES = ("#68707c", "#0b62a8", "#b5510a", "#00755a", "#8b3f8f", "#806200")

WIDTH = 360
"""The width of a figure: it can be read on a phone, and two are beside one another on a desk."""

_NAMES = {INK: "ink", MUTED: "muted", HAIR: "hair", CARD: "card"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}
_STYLE = {
    "font.size": 11,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": HAIR,
    "axes.labelcolor": MUTED,
    "xtick.color": HAIR,
    "ytick.color": HAIR,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "image.interpolation": "none",
}


@final
class Canvas:
    """A matplotlib figure whose coordinates are pixels from the top left."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure = figure
        self.width = width
        self.height = height
        # Measures text as it will be written: another renderer rounds every letter otherwise.
        self._ruler = cast(Any, RendererSVG)(width, height, io.StringIO())

    def axes(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        *,
        grid: Literal["x", "y", "both"] | None = None,
    ) -> Axes:
        """Bare axes in that rectangle, without a frame: hairlines at the ticks of `grid`."""
        w, h = self.width, self.height
        axes = self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
        axes.set_frame_on(False)
        axes.tick_params(length=0, pad=5)
        if grid is not None:
            axes.grid(axis=grid, color=HAIR, lw=1)
            axes.set_axisbelow(True)
        return axes

    def settle(self, axes: Axes, *, below: float = 0.0) -> None:
        """Gives the labels of the axes their room, whatever they say; `below` the canvas is taken.

        The left edge moves right and the lower one up as far as needed, and of horizontal labels
        that touch or leave the canvas some go. To be called once scales and ticks are set, and
        before anything is placed by them.
        """
        renderer = self._ruler
        across, up = axes.yaxis.get_tightbbox(renderer), axes.xaxis.get_tightbbox(renderer)
        box = axes.get_position()
        left = box.x0 + max(0.0, 1 - across.x0 if across else 0.0) / self.width
        foot = box.y0 + max(0.0, below + 1 - up.y0 if up else 0.0) / self.height
        axes.set_position((left, foot, box.x1 - left, box.y1 - foot))
        ends = sorted(axes.get_xlim())
        places = [place for place in axes.get_xticks() if ends[0] <= place <= ends[1]]
        words = axes.xaxis.get_major_formatter().format_ticks(places)
        for step in range(1, len(places) + 1):
            axes.set_xticks(places[::step], words[::step])
            boxes = [each.get_window_extent(renderer) for each in axes.get_xticklabels()]
            if all(one.x1 + 2 < other.x0 for one, other in pairwise(boxes)):
                break
        inside = [each.x0 >= 0 and each.x1 <= self.width for each in boxes] if places else []
        kept = list(zip(places[::step], words[::step], inside, strict=True)) if places else []
        axes.set_xticks([p for p, _, fits in kept if fits], [w for _, w, fits in kept if fits])

    def title(self, words: str) -> None:
        """The title of the figure, in bold at its top."""
        self.text(0, 12, words, bold=True, size=12.5)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        color: str = INK,
        size: float = 11,
        align: Literal["left", "center", "right"] = "left",
        bold: bool = False,
        room: float = math.inf,
    ) -> None:
        """One line of text, centred vertically on `y`; cut where it is wider than its room."""
        written = self.figure.text(
            x / self.width,
            1 - y / self.height,
            words,
            color=color,
            fontsize=size,
            ha=align,
            va="center",
            fontweight="bold" if bold else "normal",
        )
        while words and written.get_window_extent(self._ruler).width > room:
            words = words[:-1]
            written.set_text(f"{words}…")


def render(name: str, title: str, size: tuple[float, float], draw: Callable[[Canvas], None]) -> str:
    """The drawing of `draw` as SVG for an HTML body; `name` makes its identifiers its own."""
    width, height = size
    buffer = io.StringIO()
    settings = {**_STYLE, "svg.hashsalt": name}
    with warnings.catch_warnings(), style.context(settings, after_reset=True):
        # The reader's browser sets the type, so a glyph that our own font lacks is no loss.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        draw(Canvas(figure, width, height))
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), title)


def css(color: str) -> str:
    """A colour of ours as its custom property, with itself as the fallback."""
    return f"var(--{_NAMES[color]}, {color})" if color in _NAMES else color


def short(name: str, limit: int = 14) -> str:
    """A class or variant name on one line, cut to `limit` characters."""
    words = "".join(letter if letter.isprintable() else " " for letter in name).split()
    line = " ".join(words)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in the order in which they appear; plain is grey and first."""
    others = [name for name in dict.fromkeys(names) if name != "plain"]
    hues = SERIES[1:]
    return {"plain": SERIES[0]} | {n: hues[i % len(hues)] for i, n in enumerate(others)}


def variant_colors(record: RunRecord) -> dict[str, str]:
    """The colour of every variant of a run, the same in all of its figures."""
    return colors_of(part.variant for part in (*record.parts, *record.cost))


def percents(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Shares at an axis in percent, at these ticks if there are any."""
    if ticks is not None:
        axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(tick_percent))


def tick_percent(value: float, _place: object = None) -> str:
    """A share in percent with all its digits: 57.5% must not be read as a tick at 58%."""
    return f"{round(100 * value, 6):g}%"


def _inline(svg: str, title: str) -> str:
    """With a title and in the page's colours; without prologue, metadata and shared group names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]+"', "<g", svg)
    # Two images that are alike would have one identifier, to which nothing refers.
    svg = re.sub(r'(<image [^>]*?) id="\w+"', r"\1", svg)
    themed = re.compile(r"#[0-9a-f]{6}")
    svg = re.sub(r'style="[^"]*"', lambda style: themed.sub(lambda c: css(c[0]), style[0]), svg)
    label = html.escape(printable(title))
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
