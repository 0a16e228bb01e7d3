"""Names from elsewhere are shown as text: no terminal and no page obeys them."""

import io
import unicodedata

import pytest
from rich.table import Table

from secure_cnn.pages.template import _shown
from secure_cnn.printable import Terminal, printable, spell_out

HOSTILE = "cat\x1b[2J\x07\u202edog\u2066\u2069\x9b[/bold] [red]:cat:\x7f\u2028\ud800\ufeff"


def test_nothing_that_moves_or_hides_text_is_left():
    """Over all scripts: what is left is printable, or a joiner inside of words."""
    for number in (*range(0x3400), *range(0xD7F0, 0x1F000), *range(0xE0000, 0xE0200)):
        shown = printable(chr(number))
        assert shown == chr(number) or shown.isascii()
        if unicodedata.category(chr(number)) in ("Cc", "Cs", "Zl", "Zp"):
            assert shown.isprintable()
    for number in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C, 0xE0041):
        assert printable(chr(number)).startswith("\\")
    assert printable("Привет 猫 é نمی\u200cخواهم") == "Привет 猫 é نمی\u200cخواهم"
    assert printable("a\nb") == "a\\nb"
    assert printable("a\nb", layout=True) == "a\nb"


@pytest.mark.parametrize("where", ["text", "cell", "title", "column"])
def test_a_terminal_prints_what_it_is_given(where):
    """No markup, no emoji by name, no control characters: in messages as in tables."""
    table = Table(title=HOSTILE if where == "title" else None, min_width=200)
    table.add_column(HOSTILE if where == "column" else "")
    table.add_row(HOSTILE if where == "cell" else "")
    console = Terminal(width=200)
    with console.capture() as shown:
        console.print(HOSTILE if where == "text" else table)
    text = shown.get()
    assert printable(HOSTILE) in text
    assert printable(text, layout=True) == text


def test_a_page_shows_what_it_is_given():
    """As the templates get every value, before HTML's own characters are escaped."""
    assert _shown(HOSTILE) == printable(HOSTILE)
    assert _shown(3) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_narrow_terminal_spells_out_what_it_has_no_letter_for(encoding, monkeypatch):
    """Nothing ends a command at its last line; what the encoding has stays as it is."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    spell_out(stream)
    monkeypatch.setattr("sys.stdout", stream)
    table = Table(title="ε ≥ 1 ÷ plain")
    table.add_column("é – 猫 \ud800")
    table.add_row("∞")
    Terminal(width=60).print(table)
    stream.flush()
    found = raw.getvalue().decode(encoding)
    words = "ε ≥ 1 ÷ plain" if encoding == "utf-8" else "eps >= 1"
    assert words in found
    assert ("猫" if encoding == "utf-8" else "\\u732b") in found
    assert ("é" in found) is (encoding != "ascii")
