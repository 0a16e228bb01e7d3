"""Numbers and conditions in words, written the same way in every record and on every page.

Deliberately not here: rounding in anyone's favour. ε is rounded up, and what is unknown is a dash.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime

__all__ = [
    *("between", "date", "delta", "epsilon", "figure", "fraction", "number", "share", "shown"),
    "threat",
]

_NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1", "l0": "ℓ0"}


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def fraction(value: float | None) -> str:
    """A rate or an area as a fraction: of three decimals, and where it is small, three digits."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or value >= 0.0995 else f"{value:#.3g}"


def between(ends: Sequence[float | None]) -> str:
    """An interval of shares in percent."""
    low, high = ends
    return f"{share(low)} to {share(high)}"


def epsilon(value: float | None) -> str:
    """ε with two decimals, never rounded down."""
    if value is None:
        return "–"
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}" if math.isfinite(value) else "∞"


def delta(value: float) -> str:
    """δ in short."""
    return f"{value:.3g}".replace("e-0", "e-")


def number(value: float | None, digits: int = 3) -> str:
    """A number to read in a table."""
    return "–" if value is None else f"{value:.{digits}g}"


def figure(value: float | None) -> str:
    """A number to read in a table, with a digit more."""
    return number(None if value is None else float(value), 4)


def threat(norm: str, eps: float, bounds: Sequence[float]) -> str:
    """A threat model in one phrase."""
    low, high = bounds
    return f"{_NORMS.get(norm, norm)} ≤ {eps:.4g}, pixels in [{low:g}, {high:g}]"


def date(created: str) -> str:
    """A moment as people write it; what is no moment stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M %Z}".strip()


def shown(content: Mapping[str, object]) -> list[tuple[str, str]]:
    """Names and values of a free-form object in words; of one inside of it `outer: inner`."""
    found = []
    for name, value in content.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping) and value:
            found += [(f"{words}: {inner}", each) for inner, each in shown(value)]
        else:
            found.append((words, _show(name, value)))
    return found


def _show(name: str, value: object) -> str:
    """Any plain JSON value in words; `memory` is in bytes."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "memory" and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, Mapping)) and not value:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(name, each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
