"""Text from elsewhere, as it may be shown: the one place that decides what a name may do to a page.

A name out of a file can move the cursor, turn the reading direction round, or look like markup of
the library that prints it. Here it becomes text that only says what it holds.
"""

import codecs
import io
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["Terminal", "printable", "spell_out"]

# Cc: terminals obey them. Cf: unseen, and some reverse the text behind them. Cs: no encoding has
# them. Zl and Zp: some programs begin a new line there.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Joiners are letters' business in Persian, in Indic scripts and in emoji, and move nothing.
_JOINERS = "\u200c\u200d"
_LAYOUT = "\n\t\N{ZERO WIDTH SPACE}"


def printable(text: object, *, layout: bool = False) -> str:
    r"""The text with everything unseen written out, as Python writes it: `\x1b`, `\u202e`.

    With `layout` line ends, tabs and places to break a word stay: for whole messages and pages of
    ours, not for a name.
    """
    kept = _JOINERS + _LAYOUT if layout else _JOINERS
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        mark
        if mark in kept or unicodedata.category(mark) not in _ESCAPED
        else mark.encode("unicode_escape").decode("ascii")
        for mark in text
    )


_SPELT = {
    **{"ε": "eps", "δ": "delta", "σ": "sigma", "∞": "inf", "÷": "/", "×": "x", "±": "+-"},
    **{"≥": ">=", "≤": "<=", "–": "-", "−": "-", "…": "...", "·": "-", "✓": "ok", "✗": "x"},
    **{"★": "*", "→": "->", "←": "<-", "↑": "^", "é": "e", "•": "*"},
}
_NARROW = "secure_cnn.spelt"


def spell_out(stream: object) -> None:
    r"""Lets a stream write what its encoding has no letter for: `eps` for ε, `\u732b` for others.

    A table that a narrow terminal cannot show must not end a command whose work is done.
    """
    codecs.register_error(_NARROW, _spelt)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_NARROW)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    escaped = (
        _SPELT.get(each) or each.encode("unicode_escape").decode("ascii") for each in letters
    )
    return "".join(escaped), error.end


class Terminal(Console):
    """A console that obeys no text: what it is given to print, in tables too, is printed as it is.

    No markup, no names of emoji, no highlighting, and `printable`. Where a style is wanted, print a
    `rich.text.Text`, whose content is then the caller's to make `printable`. With `stderr` messages
    for people go to standard error, unwrapped unless `wrap` is set, as progress bars need it.
    """

    def __init__(
        self, *, stderr: bool = False, wrap: bool = False, width: int | None = None
    ) -> None:
        super().__init__(
            stderr=stderr,
            width=width,
            soft_wrap=stderr and not wrap,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        r"""Every text that is printed passes here, cells and titles of tables as well."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text, layout=True), **{**options, **plain})
