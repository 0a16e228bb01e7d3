"""Claims as the command line takes them: `NAME=JSON`, or `NAME=word`."""

import json

import typer

from secure_cnn import archive
from secure_cnn.archive.format.claims import parse_json
from secure_cnn.printable import printable

__all__ = ["claims_from"]


def claims_from(given: list[str] | None) -> dict[str, archive.JSON]:
    """Claims from NAME=JSON; what begins as a word does is a text without quotes."""
    claims: dict[str, archive.JSON] = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"expected a claim as NAME=JSON, got {text!r}")
        if name in claims:
            raise typer.BadParameter(f"expected one claim {name!r}, got two")
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                claims[name] = _word(text, value)
                continue
        try:
            claims[name] = parse_json(value.encode(), f"claim {name}")
        except (archive.Tampered, UnicodeEncodeError) as error:
            reason = str(error).partition("; ")[0]
            raise typer.BadParameter(f"{printable(reason)}; give plain JSON") from None
    return claims


def _word(text: str, value: str) -> str:
    """A text without quotes, unless it was meant as JSON: a number gone wrong is no text."""
    if value[:1].isalpha() and value not in ("True", "False", "None", "nan", "inf"):
        return value
    raise typer.BadParameter(
        f"expected NAME=JSON or NAME=word, got {printable(text)!r}; JSON has 0.5, true, null and, "
        'in quotes, "any text"'
    )
