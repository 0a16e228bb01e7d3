"""A run as it is found in its folder, with the audit and the leakage measurement beside it."""

from dataclasses import dataclass
from pathlib import Path

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import OlderVersionError
from secure_cnn.record.leakage import LeakageRecord, MembershipRecord
from secure_cnn.record.run import AuditRecord, RunRecord, ThreatRecord
from secure_cnn.record.tradeoff import Estimate, LeakageEstimate

__all__ = ["SavedRun"]

_ELSEWHERE = {"out", "device"}
"""Settings that say where a run was made, not what it is."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as it is found in its folder, by the name that it has beside others."""

    name: str
    record: RunRecord
    audit: AuditRecord | None = None
    leakage: LeakageRecord | None = None

    @classmethod
    def read(cls, folder: str | Path, name: str) -> "SavedRun":
        """The run in a folder with its `audit.json` and its `leakage.json`, where it has them.

        An audit of another recipe is refused, and so is what another run's model leaks, or what
        has lost the controls of an attack.
        """
        record = RunRecord.read(Path(folder, "run.json"))
        audit, leakage = Path(folder, "audit.json"), Path(folder, "leakage.json")
        return cls(
            name=name,
            record=record,
            audit=_audit_of(record, audit) if audit.exists() else None,
            leakage=_leakage_of(record, leakage) if leakage.exists() else None,
        )

    @property
    def threat(self) -> ThreatRecord | None:
        """The threat model in which the run was attacked."""
        attacked = any(result.robust_accuracy is not None for result in self.record.results)
        return self.record.threat if attacked else None

    @property
    def failed(self) -> bool:
        """Whether ε is not what the plan says: an audit found so, or attacks that it rules out."""
        return self._audit_failed or self._promise_broken

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found beside the run and speaks against its figures, a sentence each."""
        said = []
        if self.audit is not None and self._audit_failed:
            verdict = self.audit.report["verdict"]
            said.append(f"{self.name}: its audit failed, so its ε does not count: {verdict}")
        if self.leakage is not None and self.leakage.void:
            failed = [each.name for each in self.leakage.controls if not each.passed]
            said.append(
                f"{self.name}: controls of its leakage failed, so it counts as not measured: "
                f"{', '.join(failed)}"
            )
        elif self.leakage is not None and self._promise_broken:
            said.append(
                f"{self.name}: attacks find more than its ε allows, so its ε does not count: "
                f"{self.leakage.broken[0]}"
            )
        return tuple(said)

    def leaked(self, variant: str) -> LeakageEstimate | None:
        """How well attacks tell who a variant was trained on; None where that is not known."""
        leakage = self.leakage
        if leakage is None or leakage.membership is None or leakage.variant != variant:
            return None
        return None if leakage.void else _estimate(leakage.membership)

    @property
    def audited(self) -> tuple[float, float] | None:
        """The largest lower bound on ε of one step, and what the plan claims for it."""
        bounds = [] if self.audit is None else self.audit.report["bounds"]
        if self.audit is None or not bounds:
            return None
        largest = max(float(bound["epsilon"]) for bound in bounds)
        return largest, float(self.audit.report["claimed_epsilon"])

    @property
    def described(self) -> dict[str, str]:
        """Everything in which it may differ from others, in words by name."""
        record = self.record
        settings = [pair for pair in record.settings_in_words if pair[0] != "out"]
        words = [
            pair for part in (record.versions, record.hardware) for pair in wording.shown(part)
        ]
        own = {
            "model": record.model.name,
            "status": record.status,
            "training images": f"{record.data.train:,}",
        }
        return {**own, **dict(settings + words)}

    @property
    def _audit_failed(self) -> bool:
        return self.audit is not None and not self.audit.report.get("passed", True)

    @property
    def _promise_broken(self) -> bool:
        # What is wrong with the measurement may be why an attack found too much.
        leakage = self.leakage
        return leakage is not None and not leakage.void and bool(leakage.broken)


def _audit_of(record: RunRecord, path: Path) -> AuditRecord:
    audit = AuditRecord.read(path)
    names = sorted(({*record.settings} | {*audit.settings}) - _ELSEWHERE)
    other = [name for name in names if record.settings.get(name) != audit.settings.get(name)]
    if other:
        raise RunError(
            f"{path}: expected an audit of this run's recipe, got another "
            f"{', '.join(other[:8])}; make it with secure-cnn audit --run {path.parent}"
        )
    return audit


def _leakage_of(record: RunRecord, path: Path) -> LeakageRecord:
    try:
        leakage = LeakageRecord.read(path)
    except OlderVersionError as error:
        raise OlderVersionError(f"{error} with secure-cnn leakage {path.parent}") from error
    results = {result.variant: result for result in record.results}
    found = None
    if leakage.run != record.run_id:
        found = "that of another run"
    elif results and leakage.variant not in results:
        found = f"{leakage.variant}, where the run has {', '.join(results)}"
    elif results and leakage.accuracy != (known := results[leakage.variant].accuracy):
        # A measurement begins with the accuracy that is on record, or does not begin.
        found = (
            f"that of a model whose accuracy is {leakage.accuracy:.4g}, where the run's has "
            f"{known:.4g}"
        )
    elif leakage.uncontrolled:
        found = f"attacks without their controls: {', '.join(leakage.uncontrolled)}"
    if found is not None:
        raise RunError(
            f"{path}: expected what this run's model leaks, got {found}; make it anew with "
            f"secure-cnn leakage {path.parent}"
        )
    return leakage


def _estimate(membership: MembershipRecord) -> LeakageEstimate:
    """With the rate at 1 %, or where that is not resolved, at 10 %."""
    areas = membership.strongest.areas
    auc = Estimate(value=areas[0], low=min(areas), high=max(areas))
    found = membership.most_found(0.01) or membership.most_found(0.1)
    if found is None:
        return LeakageEstimate(auc=auc)
    rate = found[1]
    tpr = Estimate(value=rate.tpr, low=rate.tpr_low, high=rate.tpr_high)
    return LeakageEstimate(auc=auc, tpr=tpr, fpr=rate.fpr, realised_fpr=rate.realised_fpr)
