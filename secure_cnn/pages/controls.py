"""The controls of a measurement in words: which failed, which fired, and which could do neither."""

import re
from dataclasses import dataclass

from secure_cnn.record import ControlRecord, LeakageRecord

__all__ = ["ControlWords"]

_WEAK = 0.25
"""An area that may be farther from a half than this is no test: from 0.25 to 0.75 all passes."""
_WITHIN = re.compile(r"0\.5 within (\d+\.?\d*)$")


@dataclass(frozen=True, kw_only=True)
class ControlWords:
    """Controls with the sign of each, failed ones first, and what to say of all of them.

    `said` counts them; `weak` says why some are no test.
    """

    rows: list[tuple[str, ControlRecord]]
    said: str
    weak: str

    @classmethod
    def of(cls, record: LeakageRecord) -> "ControlWords":
        """Those of a record; without any there are no rows."""
        every = sorted(record.controls, key=lambda each: each.passed)
        weak = sum(each.passed and _is_weak(each) for each in every)
        said = f"All {len(every)} controls of memberships fired"
        if weak:
            said = (
                f"{len(every) - weak} of {len(every)} controls of memberships fired, {weak} are "
                "too weak to tell anything"
            )
        return cls(
            rows=[(_sign(each), each) for each in every],
            said=said,
            weak=f"Too weak are those by which an area may be more than {_WEAK:g} from a half: "
            "with so few images they cannot fail. More images (--pool) make them a test."
            if weak
            else "",
        )


def _is_weak(control: ControlRecord) -> bool:
    within = _WITHIN.search(control.expected)
    return within is not None and float(within[1]) > _WEAK


def _sign(control: ControlRecord) -> str:
    if not control.passed:
        return "✗ FAILED"
    return "– too weak" if _is_weak(control) else "✓ fired"
