"""What there is of a person beside the model, and what was done to it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.certificates.fields import check_fields
from secure_cnn.archive.errors import CertificateError

__all__ = ["ARTEFACT_ACTIONS", "ARTEFACT_KINDS", "Artefact", "whole_inventory"]

ARTEFACT_KINDS = (
    *("raw images", "derived caches", "checkpoints", "averages", "optimizer state", "logs"),
    *("shadow models", "copies sent", "backups"),
)
"""Every inventory has each of them: what nobody looked for is said to be not known."""

ARTEFACT_ACTIONS = (
    *("re-trained", "changed by the method", "kept, untouched by the request", "destroyed"),
    *("none exist", "not known"),
)
"""Or "retained until" and a date, for a reason in `detail`."""

_RETAINED = re.compile(r"retained until \d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")


@final
@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One thing that held the data of who left, or might.

    Attributes:
        kind: One of `ARTEFACT_KINDS`.
        name: Which, without its folder; "" if nothing there has one.
        action: One of `ARTEFACT_ACTIONS`, or "retained until 2027-01-31".
        detail: How, by what, or why; needed for what is retained.

    Raises:
        CertificateError: It is none of these, or two fields contradict each other.
    """

    kind: str
    name: str
    action: str
    detail: str

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in ARTEFACT_KINDS:
            raise CertificateError(
                f"kind: expected one of {', '.join(ARTEFACT_KINDS)}, got {self.kind!r}"
            )
        retained = _RETAINED.fullmatch(self.action)
        if self.action not in ARTEFACT_ACTIONS and not retained:
            raise CertificateError(
                f"action: expected one of {'; '.join(ARTEFACT_ACTIONS)}; or retained until "
                f"YYYY-MM-DD, got {self.action!r}"
            )
        if retained and not self.detail.strip():
            raise CertificateError(
                f"{self.kind}: expected the reason in detail why it is {self.action}, got none"
            )
        if "/" in self.name or "\\" in self.name:
            raise CertificateError(
                f"name: expected that of an artefact without its folder, got {self.name!r}"
            )
        if bool(self.name.strip()) and self.action == "none exist":
            raise CertificateError(
                f"{self.kind}: expected no name where none exist, got {self.name!r}"
            )


def whole_inventory(known: Sequence[Artefact]) -> tuple[Artefact, ...]:
    """The known artefacts in the order of their kinds, with "not known" for each kind without."""
    missing = [
        Artefact(kind=kind, name="", action="not known", detail="")
        for kind in ARTEFACT_KINDS
        if kind not in {each.kind for each in known}
    ]
    return tuple(sorted([*known, *missing], key=lambda each: ARTEFACT_KINDS.index(each.kind)))
