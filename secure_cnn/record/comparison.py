"""What each variant gives and takes, which are beaten, which to take; and runs side by side.

Deliberately not here: one score for everything. A protection is something that one needs or does
not need, so a choice is made by limits (`Needs`) and not by weights. Runs on other data are
refused; what is measured under other conditions is shown and not compared: robust accuracy within
another threat model, ε at another δ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import Checked, Document, require
from secure_cnn.record.run import AuditRecord, DataRecord, ResultRecord, RunRecord, ThreatRecord

__all__ = [
    "FRONT_RULE",
    "Comparison",
    "Estimate",
    "Needs",
    "SavedRun",
    "TradeoffPoint",
    "choose",
    "compare_runs",
    "pareto_front",
    "points_of",
]

FRONT_RULE = (
    "Filled marks are on the Pareto front: no other variant is at least as good in accuracy, macro "
    "recall, robust accuracy, ε and time, and better in one of them. What was not measured counts "
    "as worst; intervals are not taken into account."
)
_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Estimate(Checked):
    """A measured value between the ends of its interval."""

    value: float
    low: float
    high: float

    def _check(self) -> None:
        ordered = self.low <= self.value <= self.high
        require(ordered, "estimate", "low <= value <= high", (self.low, self.value, self.high))


@dataclass(frozen=True, kw_only=True)
class TradeoffPoint(Checked):
    """What one variant gives and takes; None is not measured, or not promised.

    `audited` is of one step: the largest lower bound on ε that an audit found, and the claim.
    `time` is that of a step against plain.
    """

    name: str
    accuracy: Estimate
    macro_recall: float
    robust_accuracy: Estimate | None = None
    epsilon: float | None = None
    audited: tuple[float, float] | None = None
    time: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Needs(Checked):
    """The limits that a variant must keep to be taken; None is no limit."""

    epsilon: float | None = None
    robust_accuracy: float | None = None
    time: float | None = None

    def _check(self) -> None:
        for name in ("epsilon", "robust_accuracy", "time"):
            limit: float | None = getattr(self, name)
            require(limit is None or limit >= 0, f"needs.{name}", "a number of at least 0", limit)

    @property
    def words(self) -> str:
        """The limits in one phrase; empty where there are none."""
        said = (
            self.epsilon is not None and f"ε ≤ {self.epsilon:g}",
            self.robust_accuracy is not None
            and f"robust accuracy ≥ {wording.share(self.robust_accuracy)}",
            self.time is not None and f"a step of at most {self.time:g} × plain",
        )
        return ", ".join(part for part in said if part)

    def met_by(self, point: TradeoffPoint) -> bool:
        """Whether a point keeps every limit; what was not measured keeps none."""
        _, _, robust, private, quick = _merits(point)
        return (
            (self.epsilon is None or -private <= self.epsilon)
            and (self.robust_accuracy is None or robust >= self.robust_accuracy)
            and (self.time is None or -quick <= self.time)
        )


def pareto_front(points: Sequence[TradeoffPoint]) -> tuple[bool, ...]:
    """Whether each point is beaten by no other: `FRONT_RULE` says when one is."""
    merits = [_merits(point) for point in points]
    return tuple(not any(_beats(other, own) for other in merits) for own in merits)


def choose(points: Sequence[TradeoffPoint], needs: Needs) -> TradeoffPoint | None:
    """The most accurate point of the front that keeps the limits, or None if there is none."""
    front = pareto_front(points)
    fit = [point for point, on in zip(points, front, strict=True) if on and needs.met_by(point)]
    return max(fit, key=_merits, default=None)


def points_of(record: RunRecord) -> list[TradeoffPoint]:
    """A point for each result of a run, with what the run itself measured."""
    times = {
        row.variant: Estimate(value=row.median, low=row.low, high=row.high)
        for row in record.cost
        if row.metric == "time_ratio"
    }
    # Plain against itself: a benchmark of the protections alone need not say so.
    times = {"plain": Estimate(value=1.0, low=1.0, high=1.0)} | times if times else {}
    return [
        TradeoffPoint(
            name=result.variant,
            accuracy=_accuracy(result),
            macro_recall=result.macro_recall,
            robust_accuracy=_robust(result),
            epsilon=result.epsilon,
            time=times.get(result.variant),
        )
        for result in record.results
        if math.isfinite(result.accuracy)
    ]


def _merits(point: TradeoffPoint) -> tuple[float, float, float, float, float]:
    """The five measures, larger being better; what is not known is worst."""
    robust, epsilon, time = point.robust_accuracy, point.epsilon, point.time
    recall = point.macro_recall
    return (
        point.accuracy.value,
        -math.inf if math.isnan(recall) else recall,
        -math.inf if robust is None else robust.value,
        -math.inf if epsilon is None else -epsilon,
        -math.inf if time is None else -time.value,
    )


def _beats(other: Sequence[float], own: Sequence[float]) -> bool:
    """Whether `other` is nowhere worse and somewhere better."""
    pairs = list(zip(other, own, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _accuracy(result: ResultRecord) -> Estimate:
    """Accuracy with its Wilson (1927) interval, from the images that were counted.

    `defenses` has the same formula, and may not be imported: a record stands on no package.
    """
    count, share = sum(map(sum, result.confusion)), result.accuracy
    if count == 0:
        return Estimate(value=share, low=0.0, high=1.0)
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Estimate(value=share, low=low, high=high)


def _robust(result: ResultRecord) -> Estimate | None:
    value, low, high = result.robust_accuracy, result.robust_low, result.robust_high
    if value is None or low is None or high is None:
        return None
    return Estimate(value=value, low=low, high=high) if low <= value <= high else None


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
        settings = [pair for pair in record.settings_in_words if pair[0] != "out"]
        words = [
            pair for part in (record.versions, record.hardware) for pair in wording.shown(part)
        ]
        return {"model": record.model.name, "status": record.status, **dict(settings + words)}


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
    digest = data.fingerprint[:12] or "no digest"
    if data.keyed:
        digest = "a fingerprint under a key of its own, which cannot be compared"
    return f"{data.name} ({data.train}+{data.test} images, {digest})"


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
