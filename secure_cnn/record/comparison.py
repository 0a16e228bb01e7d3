"""Runs side by side: their variants as points of one trade-off, and what forbids comparing them.

Runs on other data are refused. What is measured under other conditions is shown and not compared:
robust accuracy within another threat model, ε at another δ. Deliberately not here: where runs are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import Document
from secure_cnn.record.reports import AuditRecord
from secure_cnn.record.run import DataRecord, ResultRecord, RunRecord, ThreatRecord
from secure_cnn.record.tradeoff import TradeoffPoint, points_of

__all__ = ["Comparison", "SavedRun", "compare_runs"]

_ELSEWHERE = {"out", "device"}
"""Settings that say where a run was made, not what it is."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as it is found in its folder, by the name that it has beside others."""

    name: str
    record: RunRecord
    audit: AuditRecord | None = None

    @classmethod
    def read(cls, folder: str | Path, name: str) -> "SavedRun":
        """The run in a folder with its `audit.json`; one of another recipe is refused."""
        record = RunRecord.read(Path(folder, "run.json"))
        path = Path(folder, "audit.json")
        if not path.exists():
            return cls(name=name, record=record)
        audit = AuditRecord.read(path)
        names = sorted(({*record.settings} | {*audit.settings}) - _ELSEWHERE)
        other = [name for name in names if record.settings.get(name) != audit.settings.get(name)]
        if other:
            raise RunError(
                f"{path}: expected an audit of this run's recipe, got another "
                f"{', '.join(other[:8])}; make it with secure-cnn audit --run {folder}"
            )
        return cls(name=name, record=record, audit=audit)

    @property
    def threat(self) -> ThreatRecord | None:
        """The threat model in which the run was attacked."""
        attacked = any(result.robust_accuracy is not None for result in self.record.results)
        return self.record.threat if attacked else None

    @property
    def failed(self) -> bool:
        """Whether an audit found that the training is not what its plan says."""
        return self.audit is not None and not self.audit.report.get("passed", True)

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
        parts = (record.settings, record.versions, record.hardware)
        words = [pair for part in parts for pair in wording.shown(part) if pair[0] != "out"]
        return {"model": record.model.name, "status": record.status, **dict(words)}


@dataclass(frozen=True, kw_only=True)
class Comparison(Document):
    """Variants of runs on the same data, side by side; `results` are by the names of `points`.

    `differences` are rows of what is not the same in all runs: the name, then its value in each;
    `warnings` are of audits that failed, so that an ε does not count.
    """

    KIND: ClassVar[str | None] = "comparison"

    data: DataRecord
    points: tuple[TradeoffPoint, ...]
    results: Mapping[str, ResultRecord]
    runs: Mapping[str, str]
    differences: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    run: SavedRun
    result: ResultRecord
    point: TradeoffPoint


def compare_runs(runs: Sequence[SavedRun]) -> Comparison:
    """Puts the variants of runs on the same data side by side.

    A plain training that several runs made in the same way (the same network with the same
    confusion matrix) is shown once.
    """
    if not runs:
        raise RunError("runs: expected at least one, got none; name their folders")
    for run in runs:
        _refuse(run, runs)
    threat = next(filter(None, (run.threat for run in runs)), None)
    named = _named(_once([entry for run in runs for entry in _entries(run, threat)]))
    return Comparison(
        data=runs[0].record.data,
        points=tuple(replace(entry.point, name=name) for name, entry in named.items()),
        results={name: entry.result for name, entry in named.items()},
        runs={run.name: run.record.created for run in runs},
        differences=_differences(runs),
        notes=_notes(runs, threat),
        warnings=tuple(
            f"{run.name}: its audit failed, so its ε does not count: {run.audit.report['verdict']}"
            for run in runs
            if run.audit is not None and run.failed
        ),
    )


def _refuse(run: SavedRun, runs: Sequence[SavedRun]) -> None:
    first = runs[0]
    if sum(other.name == run.name for other in runs) > 1:
        raise RunError(f"{run.name}: expected each run once, got it twice; leave one out")
    if not _same_data(run.record.data, first.record.data):
        raise RunError(
            f"{run.name}: expected the data of {first.name}, {_data(first)}, got {_data(run)}; "
            "figures on other images, or on another split, say nothing beside each other"
        )
    if not run.record.results:
        raise RunError(f"{run.name}: expected a result, got none; wait until it is complete")


def _same_data(data: DataRecord, other: DataRecord) -> bool:
    """Whether two runs had the same images, as far as a fingerprint under a key can tell."""
    if data.keyed or other.keyed:
        data, other = replace(data, fingerprint=""), replace(other, fingerprint="")
    return data == other


def _data(run: SavedRun) -> str:
    data = run.record.data
    return f"{data.name} ({data.train}+{data.test} images, {data.fingerprint[:12] or 'no digest'})"


def _entries(run: SavedRun, threat: ThreatRecord | None) -> list[_Entry]:
    """The variants of one run; robust accuracy only within the common threat model."""
    results = {result.variant: result for result in run.record.results}
    entries = []
    for point in points_of(run.record):
        shown = replace(
            point,
            robust_accuracy=point.robust_accuracy if run.record.threat == threat else None,
            audited=run.audited if point.epsilon is not None else None,
            # The plan of a training that failed its audit says nothing about it.
            epsilon=None if run.failed else point.epsilon,
        )
        entries.append(_Entry(run=run, result=results[point.name], point=shown))
    return entries


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """Plain first, and the same plain training once: the one of which most is known."""
    plain: dict[object, _Entry] = {}
    for entry in (entry for entry in entries if entry.result.variant == "plain"):
        known = plain.setdefault((entry.run.record.model, entry.result.confusion), entry)
        if known.point.robust_accuracy is None and entry.point.robust_accuracy is not None:
            plain[entry.run.record.model, entry.result.confusion] = entry
    return [*plain.values(), *(entry for entry in entries if entry.result.variant != "plain")]


def _named(entries: Sequence[_Entry]) -> dict[str, _Entry]:
    """A variant's name, with its run where several have it."""
    variants = [entry.result.variant for entry in entries]
    return {
        entry.result.variant
        if variants.count(entry.result.variant) == 1
        else f"{entry.run.name}: {entry.result.variant}": entry
        for entry in entries
    }


def _differences(runs: Sequence[SavedRun]) -> tuple[tuple[str, ...], ...]:
    """What was set, installed or used in one run otherwise than in another."""
    described = [run.described for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    rows = [(name, *(each.get(name, "–") for each in described)) for name in names]
    return tuple(row for row in rows if len(set(row[1:])) > 1)


def _notes(runs: Sequence[SavedRun], threat: ThreatRecord | None) -> tuple[str, ...]:
    notes = []
    if threat is not None:
        notes.append(f"Robust accuracy is within {threat.words}.")
        others = [run.name for run in runs if run.threat not in (None, threat)]
        if others:
            names = ", ".join(others)
            notes.append(f"Attacked within another threat model, so not shown: {names}.")
    plans = [run.record.privacy for run in runs]
    deltas = sorted({wording.delta(plan.delta) for plan in plans if plan is not None})
    if deltas:
        notes.append(f"ε is at δ = {' or '.join(deltas)}.")
    if len(deltas) > 1:
        notes.append("These δ differ, so these ε are not on one scale.")
    if len({run.record.model.name for run in runs}) > 1:
        notes.append("The networks differ: time is against the plain step of the same network.")
    keyed = [run.name for run in runs if run.record.data.keyed]
    if keyed and len(runs) > 1:
        notes.append(
            f"The fingerprint of private data is keyed: that {', '.join(keyed)} had the same data "
            "as the others is told by name, sizes and classes only."
        )
    unfinished = [run.name for run in runs if run.record.status != "complete"]
    if unfinished:
        notes.append(f"Not complete: {', '.join(unfinished)}.")
    return tuple(notes)
