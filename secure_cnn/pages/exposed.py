"""Who is most exposed: shown where it is more than chance, and where models are enough to tell."""

from math import comb

from secure_cnn.pages.template import Table
from secure_cnn.record import ExposedRecord, MembershipRecord, wording

__all__ = ["exposed_table", "too_few"]

_FEWEST_SHADOWS = 8
"""With fewer an example is in the data of so few models that being found in all tells little."""
_EXPOSED_AT = 0.01
"""The false positive rate at which an example counts as found."""
_BY_CHANCE = 0.1
"""Of the whole pool, examples that chance alone may have found as often as one that is shown."""


def exposed_table(membership: MembershipRecord) -> Table:
    """Those that are found more often than chance explains, a row each."""
    pool = membership.members + membership.others
    rows = [
        (each.digest[:16], f"{each.found} of {each.of}", wording.fraction(each.found / each.of))
        for each in membership.exposed
        if membership.shadows >= _FEWEST_SHADOWS and _by_chance(each, pool) < _BY_CHANCE
    ]
    return ("digest, first 16 digits", "found in", "share"), rows


def _by_chance(found: ExposedRecord, pool: int) -> float:
    """Examples of a pool that are found as often by chance alone, in as many models."""
    tail = (
        comb(found.of, k) * _EXPOSED_AT**k * (1 - _EXPOSED_AT) ** (found.of - k)
        for k in range(found.found, found.of + 1)
    )
    return pool * sum(tail)


def too_few(shadows: int) -> str:
    """Why nobody can be told to be exposed; empty where there are shadow models enough."""
    if shadows >= _FEWEST_SHADOWS:
        return ""
    return (
        f"Not told: with {shadows} shadow models each image is in the data of {shadows // 2} of "
        "them, and whoever is found in so few may be found by chance. With "
        f"{_FEWEST_SHADOWS} and more it is told."
    )
