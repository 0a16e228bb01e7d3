"""Figures as words, and words as tables: what every table of the documents is made of."""

from collections.abc import Iterable, Sequence

from secure_cnn.record import Measurements, Row

# Whose versions stand under a table, as far as its document names them.
MADE_OF = ("torch", "opacus", "torchattacks")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with words in its first column, figures in the others, and goals as they fit."""
    sides = ["---" if head in (heads[0], "goal") else "--:" for head in heads]
    lines = [heads, sides, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def blocks(*parts: str) -> str:
    """Paragraphs and tables under one another."""
    return "\n\n".join(parts)


def spread(
    row: Row | None, *, scale: float = 1.0, unit: str = "", digits: int | None = None
) -> str:
    """The median, with its interval in brackets where it has one; about three digits."""
    if row is None:
        return ""
    low, median, high = (scale * value for value in (row.low, row.median, row.high))
    if digits is None:
        digits = next((n for n, least in enumerate((100, 10, 0.1, 0.01)) if median >= least), 4)
    words = f"{median:.{digits}f}{unit}"
    return words if low == high else f"{words} ({low:.{digits}f} to {high:.{digits}f})"


def middle(row: Row | None) -> str:
    """The median alone."""
    return "" if row is None else f"{row.median:.2f}"


def index(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """The rows by what identifies them."""
    return {(row.case, row.variant, row.metric): row for row in rows}


def cases_of(measured: Measurements, metric: str) -> list[str]:
    """The cases for which something was measured, in their order."""
    return list(dict.fromkeys(row.case for row in measured.rows if row.metric == metric))


def made_on(measured: Measurements, rounds: str = "", *, made_of: Sequence[str] = MADE_OF) -> str:
    """On what, with what and when."""
    hardware, versions = measured.hardware, measured.versions
    used = ", ".join(f"{name} {versions[name]}" for name in made_of if name in versions)
    return (
        f"{hardware['cpu']}, {hardware['threads']} threads; {used}; {rounds}"
        f"measured {measured.created[:10]}."
    )
