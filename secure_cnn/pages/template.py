"""One design for every page: the templates of this room, and how numbers are written in them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from secure_cnn.pages.canvas import css
from secure_cnn.printable import printable
from secure_cnn.record import wording

__all__ = ["Fact", "Table", "breakable", "fill"]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A head, and rows of as many cells."""

_FEW = 2
_HEAD = re.compile(r'<th scope="col"[^>]*>(.*?)</th>', re.DOTALL)
_ROW = re.compile(r"<tr.*?</tr>", re.DOTALL)
_CELL = re.compile(r'<(?:td|th scope="row")(?=[ >])')


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure of a summary: what it is, its value, and what to know before quoting it."""

    name: str
    value: str
    detail: str


def fill(template: str, values: Mapping[str, object]) -> str:
    """The text of a page: `template` with `values`, all of them escaped."""
    return _environment().get_template(template).render(values)


def breakable(name: str) -> str:
    """A variant's name that a narrow column may break where protections are joined."""
    return name.replace("+", "+\N{ZERO WIDTH SPACE}")


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {
        "between": wording.between,
        "breakable": breakable,
        "css": css,
        "date": wording.date,
        "delta": wording.delta,
        "epsilon": wording.epsilon,
        "figure": wording.figure,
        "labelled": _labelled,
        "number": wording.number,
        "share": wording.share,
        "shown": wording.shown,
    }
    return environment


def _shown(value: object) -> object:
    """A value as a page may show it; what is HTML already was made of such values."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, layout=True)
    return value


def _labelled(html: Markup) -> Markup:
    """A table of ours whose cells carry the name of their column, if it has more than a few.

    On a phone, where it is too wide, each row then stands alone with every figure named.
    """
    text = str(html)  # markup escapes whatever is joined to it
    names = [re.sub(r"<[^>]*>", "", name) for name in _HEAD.findall(text)]
    start = text.find("<tbody>")
    if len(names) <= _FEW or 'class="stacked"' in text[:start]:
        return html

    def row(match: re.Match[str]) -> str:
        columns = iter(names)
        return _CELL.sub(lambda cell: f'{cell[0]} data-name="{next(columns)}"', match[0])

    body = _ROW.sub(row, text[start:])
    return Markup(f'<div class="labelled">{text[:start]}{body}</div>')  # noqa: S704 - ours, escaped
