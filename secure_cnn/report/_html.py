"""One design for every page: the templates of this room, and how numbers are written in them."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from secure_cnn.report import _words
from secure_cnn.report._canvas import css

__all__ = ["fill"]


def fill(template: str, values: Mapping[str, object]) -> str:
    """The text of a page: `template` with `values`, all of them escaped."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    """Templates by name; what they do not define is an error."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FunctionLoader(_source),
    )
    environment.filters |= {
        "breakable": _words.breakable,
        "css": css,
        "date": _words.date,
        "delta": _words.delta,
        "epsilon": _words.epsilon,
        "figure": _words.figure,
        "number": _words.number,
        "share": _words.share,
        "shown": _words.shown,
    }
    return environment


def _source(name: str) -> str:
    """A template's text, wherever the package is installed."""
    return files("secure_cnn.report").joinpath(name).read_text(encoding="utf-8")
