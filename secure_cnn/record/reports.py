"""What an audit and an evaluation found, as `audit.json` and `robustness.json` keep it.

The reports are plain values, as `privacy.audit` and `defenses` write them down. A record checks
that they hold what its page shows. Deliberately not here: the audit and the evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from secure_cnn.record.document import Document, require

__all__ = ["AuditRecord", "RobustnessRecord"]

_AUDIT = ("in_scores", "out_scores", "bounds", "checks", "claimed_epsilon", "delta", "verdict")
_ATTACKED = ("threat", "outcomes", "settings", "seed", "images", "versions", "verdicts", "summary")
_PROVEN = ("smoothing", "summary")


@dataclass(frozen=True, kw_only=True)
class AuditRecord(Document):
    """An audit of a recipe's private training, its `settings`.

    `report` is that of `privacy.audit.AuditReport.to_dict`; scores are in units of the clipping
    norm.
    """

    KIND: ClassVar[str | None] = "audit"

    created: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    report: Mapping[str, Any]

    def _check(self) -> None:
        _require_entries("audit.report", _AUDIT, self.report)


@dataclass(frozen=True, kw_only=True)
class RobustnessRecord(Document):
    """A robustness evaluation of a model.

    `report` and `certification` are from `to_dict` of `defenses.RobustnessReport` and
    `defenses.CertificationReport`.
    """

    KIND: ClassVar[str | None] = "robustness"

    created: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    model: str
    data: str
    classes: tuple[str, ...]
    report: Mapping[str, Any]
    certification: Mapping[str, Any] | None = None

    def _check(self) -> None:
        _require_entries("robustness.report", _ATTACKED, self.report)
        if self.certification is not None:
            _require_entries("robustness.certification", _PROVEN, self.certification)


def _require_entries(where: str, names: tuple[str, ...], report: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in report]
    require(not missing, where, f"entries {', '.join(names)}", missing)
