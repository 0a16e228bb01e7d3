"""Runs side by side: their variants as points of one trade-off, and what keeps them from being so.

Runs on other data are refused. What is measured under other conditions is shown and not compared:
robust accuracy within another threat model, ε at another δ. Deliberately not here: files' places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import Document, conform
from secure_cnn.record.reports import AuditRecord
from secure_cnn.record.results import ResultRecord
from secure_cnn.record.run import DataRecord, RunRecord, ThreatRecord
from secure_cnn.record.tradeoff import TradeoffPoint, points_of

__all__ = ["Comparison", "SavedRun", "compare_runs"]

_ELSEWHERE = {"out", "device"}
"""Settings that say where a run was made, not what it is."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as it is found in its folder.

    Attributes:
        name: What it is called beside others.
        record: Its record.
        audit: The audit of its recipe, where there was one.
    """

    name: str
    record: RunRecord
    audit: AuditRecord | None = None

    @classmethod
    def read(cls, folder: str | Path, name: str) -> "SavedRun":
        """The run in a folder, with its `audit.json` if there is one.

        Args:
            folder: Where `run.json` is.

        Raises:
            RunError: There is no readable run, or the audit is of another recipe.
        """
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


@dataclass(frozen=True, kw_only=True)
class Comparison(Document):
    """Variants of runs on the same data, side by side.

    Attributes:
        data: The data of all of them.
        points: What each variant gives and takes.
        results: What each can do, by the names of the points.
        runs: When each run was made, by its name.
        differences: Settings, versions and hardware that are not the same in all runs: the name,
            then its value in each run.
        notes: What a reader must know before comparing.
        warnings: What a reader must not believe.
    """

    KIND: ClassVar[str | None] = "comparison"

    data: DataRecord
    points: tuple[TradeoffPoint, ...]
    results: Mapping[str, ResultRecord]
    runs: Mapping[str, str]
    differences: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse values of the wrong type."""
        conform(self)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One variant of one run."""

    run: SavedRun
    result: ResultRecord
    point: TradeoffPoint


def compare_runs(runs: Sequence[SavedRun]) -> Comparison:
    """Puts the variants of runs on the same data side by side.

    A plain training that several runs made in the same way (the same network with the same
    confusion matrix) is shown once.

    Raises:
        RunError: A run is on other data than the first, has no result, or comes twice.
    """
    if not runs:
        raise RunError("runs: expected at least one, got none; name their folders")
    for run in runs:
        _refuse(run, runs)
    threat = next(filter(None, (_threat(run) for run in runs)), None)
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
            if run.audit is not None and _failed(run)
        ),
    )


def _refuse(run: SavedRun, runs: Sequence[SavedRun]) -> None:
    """Raise unless a run can stand beside the others."""
    first = runs[0]
    if sum(other.name == run.name for other in runs) > 1:
        raise RunError(f"{run.name}: expected each run once, got it twice; leave one out")
    if _comparable(run, first) != _comparable(first, run):
        raise RunError(
            f"{run.name}: expected the data of {first.name}, {_data(first)}, got {_data(run)}; "
            "figures on other images, or on another split, say nothing beside each other"
        )
    if not run.record.results:
        raise RunError(f"{run.name}: expected a result, got none; wait until it is complete")


def _comparable(run: SavedRun, other: SavedRun) -> DataRecord:
    """A run's data as far as the other's can be held against them."""
    data = run.record.data
    keyed = any(each.record.data.fingerprint.startswith("hmac-") for each in (run, other))
    return replace(data, fingerprint="") if keyed else data


def _data(run: SavedRun) -> str:
    """Which images, in a few words."""
    data = run.record.data
    return f"{data.name} ({data.train}+{data.test} images, {data.fingerprint[:12] or 'no digest'})"


def _threat(run: SavedRun) -> ThreatRecord | None:
    """The threat model in which a run was attacked."""
    attacked = any(result.robust_accuracy is not None for result in run.record.results)
    return run.record.threat if attacked else None


def _entries(run: SavedRun, threat: ThreatRecord | None) -> list[_Entry]:
    """The variants of one run; robust accuracy only within the common threat model."""
    results = {result.variant: result for result in run.record.results}
    entries = []
    for point in points_of(run.record):
        robust = point.robust_accuracy if run.record.threat == threat else None
        audited = _audited(run) if point.epsilon is not None else None
        epsilon = None if _failed(run) else point.epsilon
        shown = replace(point, robust_accuracy=robust, audited=audited, epsilon=epsilon)
        entries.append(_Entry(run=run, result=results[point.name], point=shown))
    return entries


def _audited(run: SavedRun) -> tuple[float, float] | None:
    """The largest lower bound on ε of one step, and what the plan claims for it."""
    bounds = [] if run.audit is None else run.audit.report["bounds"]
    if run.audit is None or not bounds:
        return None
    largest = max(float(bound["epsilon"]) for bound in bounds)
    return largest, float(run.audit.report["claimed_epsilon"])


def _failed(run: SavedRun) -> bool:
    """Whether an audit found that the training is not what its plan says."""
    return run.audit is not None and not run.audit.report.get("passed", True)


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """Plain first, and the same plain training once: the one of which most is known."""
    plain: dict[object, _Entry] = {}
    for entry in (entry for entry in entries if entry.result.variant == "plain"):
        key = (entry.run.record.model, entry.result.confusion)
        known = plain.get(key)
        more = known is None or known.point.robust_accuracy is None
        if more and (known is None or entry.point.robust_accuracy is not None):
            plain[key] = entry
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
    described = [
        {
            "model": run.record.model.name,
            "status": run.record.status,
            **dict(wording.shown(run.record.settings)),
            **dict(wording.shown(run.record.versions)),
            **dict(wording.shown(run.record.hardware)),
        }
        for run in runs
    ]
    names = dict.fromkeys(name for each in described for name in each if name != "out")
    rows = [(name, *(each.get(name, "–") for each in described)) for name in names]
    return tuple(row for row in rows if len(set(row[1:])) > 1)


def _notes(runs: Sequence[SavedRun], threat: ThreatRecord | None) -> tuple[str, ...]:
    """Conditions that are not the same everywhere, or that a reader must know."""
    notes = []
    if threat is not None:
        words = wording.threat(threat.norm, threat.eps, threat.bounds)
        notes.append(f"Robust accuracy is within {words}.")
        others = [run.name for run in runs if _threat(run) not in (None, threat)]
        if others:
            notes.append(f"Attacked within another threat model, so not shown: {_list(others)}.")
    plans = {run.name: run.record.privacy for run in runs}
    deltas = sorted({wording.delta(plan.delta) for plan in plans.values() if plan is not None})
    if deltas:
        notes.append(f"ε is at δ = {' or '.join(deltas)}.")
    if len(deltas) > 1:
        notes.append("These δ differ, so these ε are not on one scale.")
    if len({run.record.model.name for run in runs}) > 1:
        notes.append("The networks differ: time is against the plain step of the same network.")
    keyed = [run.name for run in runs if run.record.data.fingerprint.startswith("hmac-")]
    if keyed and len(runs) > 1:
        notes.append(
            f"The fingerprint of private data is keyed: that {_list(keyed)} had the same data as "
            "the others is told by name, sizes and classes only."
        )
    unfinished = [run.name for run in runs if run.record.status != "complete"]
    if unfinished:
        notes.append(f"Not complete: {_list(unfinished)}.")
    return tuple(notes)


def _list(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names)
