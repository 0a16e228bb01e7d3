"""Runs side by side.

Runs on other data are refused, but for what is left of a run that people left: its test images are
the same where there are as many. What is measured under other conditions is shown and not compared:
robust accuracy within another threat model, ε at another δ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import Document
from secure_cnn.record.leakage import MembershipRecord
from secure_cnn.record.run import DataRecord, ResultRecord, ThreatRecord
from secure_cnn.record.saved import SavedRun
from secure_cnn.record.tradeoff import TradeoffPoint, points_of

__all__ = ["Comparison", "compare_runs"]


@dataclass(frozen=True, kw_only=True)
class Comparison(Document):
    """Variants of runs on the same data, side by side; `results` are by the names of `points`.

    `differences` are rows of what is not the same in all runs: the name, then its value in each;
    `warnings` are of audits and of leakage that failed, so that an ε or a figure does not count.
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

    A plain training that several runs made in the same way (the same network with the same figures
    after every epoch) is shown once, unless they say otherwise of its leakage or its robustness.
    """
    if not runs:
        raise RunError("runs: expected at least one, got none; name their folders")
    for run in runs:
        _refuse(run, runs)
    threat = next(filter(None, (run.threat for run in runs)), None)
    named = _named(_once([entry for run in runs for entry in _entries(run, threat)]))
    if len(_ways(runs)) > 1:
        named = {name: _marked(entry) for name, entry in named.items()}
    return Comparison(
        data=runs[0].record.data,
        points=tuple(replace(entry.point, name=name) for name, entry in named.items()),
        results={name: entry.result for name, entry in named.items()},
        runs={run.name: run.record.created for run in runs},
        differences=_differences(runs),
        notes=_notes(runs, threat),
        warnings=tuple(warning for run in runs for warning in run.warnings),
    )


def _refuse(run: SavedRun, runs: Sequence[SavedRun]) -> None:
    first = runs[0]
    if sum(other.name == run.name for other in runs) > 1:
        raise RunError(f"{run.name}: expected each run once, got it twice; leave one out")
    if not (_same_data(run.record.data, first.record.data) or _left(run, first)):
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


def _left(run: SavedRun, other: SavedRun) -> bool:
    """Whether people left one, and the other is what is left, with all of its test images."""
    pair = (run.record, other.record)
    followed = any(
        before.run_id and before.run_id in after.follows for before, after in (pair, pair[::-1])
    )
    alike = [replace(each.data, fingerprint="", train=1) for each in pair]
    return followed and alike[0] == alike[1]


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
            leakage=run.leaked(point.name),
        )
        entries.append(_Entry(run=run, result=results[point.name], point=shown))
    return entries


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """Plain first, and the same plain training once, with all that is known of it."""
    plain: list[_Entry] = []
    for entry in (entry for entry in entries if entry.result.variant == "plain"):
        place = next((n for n, known in enumerate(plain) if _same_training(known, entry)), None)
        if place is None:
            plain.append(entry)
        else:
            plain[place] = _fuller(plain[place], entry)
    return [*plain, *(entry for entry in entries if entry.result.variant != "plain")]


def _same_training(known: _Entry, other: _Entry) -> bool:
    """Whether two are one training, and nothing that is known of one contradicts the other.

    Many trainings end with the same confusion matrix, where all images are named right above all:
    one has to be the other at the end of every epoch, to the last digit.
    """
    leaked, robust = (
        {value for each in (known, other) if (value := getattr(each.point, name)) is not None}
        for name in ("leakage", "robust_accuracy")
    )
    return _course(known) == _course(other) and len(leaked) <= 1 and len(robust) <= 1


def _course(entry: _Entry) -> tuple[object, ...]:
    """What was trained and what it found, epoch by epoch; a training loss is not always told."""
    course = [
        (each.step, each.learning_rate, each.test_loss, each.test_accuracy)
        for each in entry.run.record.epochs
        if each.variant == entry.result.variant
    ]
    # A training in shards leaves no epoch on record: there the same weights are the same one.
    record = entry.run.record
    own = [] if course else [record.model_digest or entry.run.name]
    return (record.model, entry.result.confusion, *course, *own)


def _fuller(known: _Entry, other: _Entry) -> _Entry:
    """The one of two of the same training that was attacked, with what either leaks."""
    leakage = known.point.leakage or other.point.leakage
    if known.point.robust_accuracy is None and other.point.robust_accuracy is not None:
        known = other
    return replace(known, point=replace(known.point, leakage=leakage))


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
    notes += [
        f"{run.name} is what is left of a run that people left: it was trained on "
        f"{run.record.data.train:,} images, and is measured on the same test images."
        for run in runs
        if run.record.follows
    ]
    notes += _leakage_notes(runs)
    unfinished = [run.name for run in runs if run.record.status != "complete"]
    if unfinished:
        notes.append(f"Not complete: {', '.join(unfinished)}.")
    return tuple(notes)


def _memberships(runs: Sequence[SavedRun]) -> dict[str, MembershipRecord]:
    """By run, where they were measured and count."""
    return {
        run.name: run.leakage.membership
        for run in runs
        if run.leakage is not None and run.leakage.membership is not None and not run.leakage.void
    }


def _ways(runs: Sequence[SavedRun]) -> set[tuple[int, frozenset[str]]]:
    """In how many ways leakage was measured: shadow models and attacks."""
    return {
        (each.shadows, frozenset(attack.name for attack in each.attacks))
        for each in _memberships(runs).values()
    }


def _marked(entry: _Entry) -> _Entry:
    """One whose leakage, if it has any, is marked as measured otherwise than another's."""
    if entry.point.leakage is None:
        return entry
    unlike = replace(entry.point.leakage, unlike=True)
    return replace(entry, point=replace(entry.point, leakage=unlike))


def _leakage_notes(runs: Sequence[SavedRun]) -> list[str]:
    """What to know of leakage, where some of it is shown."""
    measured = _memberships(runs)
    if not measured:
        return []
    notes = [
        "AUC is that of the strongest attack on memberships, between the least and the largest of "
        "its models; TPR is the most that any attack finds, beside the share of others that it "
        "named (FPR). Both are fractions: a guess has an AUC of 0.5, and a TPR of that FPR; a "
        "measurement, never a verification of ε."
    ]
    if len(_ways(runs)) > 1:
        told = ", ".join(
            f"{len(each.attacks)} attack{'s' if len(each.attacks) > 1 else ''} with "
            f"{each.shadows} shadow models ({name})"
            for name, each in measured.items()
        )
        notes.append(f"* Leakage was not measured alike, and more find more: {told}.")
    return notes
