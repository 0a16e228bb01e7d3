"""Who was in the data: shadow models are trained and asked, and what they say becomes figures."""

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, final

import numpy as np

from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    AttackFigures,
    AugmentationVotes,
    Confidence,
    Control,
    LeakageReport,
    NoiseVotes,
    PointOnCurve,
    Question,
    ScoreTable,
    ShadowDesign,
    global_threshold,
    membership_report,
    score_tables,
)
from privacy.statistics import Numbers, area_interval
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.leakage import arguments
from secure_cnn.leakage.boundary import BoundaryDistance
from secure_cnn.leakage.shadows import ShadowTraining
from secure_cnn.leakage.table_file import TableFolder, TableRecord, design_digest, exposed_key
from secure_cnn.leakage.target import Target
from secure_cnn.progress import part_progress
from secure_cnn.record import (
    ClassRecord,
    ControlRecord,
    ExposedRecord,
    MembershipAttackRecord,
    MembershipRecord,
    RateRecord,
)

__all__ = ["LABEL_ONLY", "MembershipSettings", "measure_membership", "others_asked"]

_Whose = Literal["target", "all", "oracle"]
CONFIDENCE = "confidence"
_SHIFTED, _NOISY = AugmentationVotes(shift=2), NoiseVotes(sigma=0.1, draws=50)
_DISTANCE = BoundaryDistance()
LABEL_ONLY: Mapping[str, Question] = MappingProxyType(
    {
        "augmentation-votes": Question(signal=_SHIFTED, queries=_SHIFTED.queries, most=2000),
        "noise-votes": Question(signal=_NOISY, queries=_NOISY.queries, most=400),
        "boundary": Question(signal=_DISTANCE, queries=_DISTANCE.queries, most=200),
    }
)
"""Attacks on a model that says a class alone; fewer examples the more often it must be asked."""
_QUESTIONS = {CONFIDENCE: Question(signal=Confidence()), **LABEL_ONLY}
_UNASKED = ("boundary",)
_PRIORS = (0.01, 0.1, 0.5)
_LEAST_FPR = 1e-5
_POINTS = 60


@final
@dataclass(frozen=True, kw_only=True)
class MembershipSettings:
    """How membership is measured.

    Attributes:
        shadows: Shadow models, an even number of at least 2; 16 tell well, 64 and more best.
        pool: Examples that are guessed about, at most; None takes nine tenths of what there is.
        attacks: Names of attacks, of `MEMBERSHIP_ATTACKS` and `LABEL_ONLY`; none takes all but
            `boundary`, which asks hundreds of times about each example.
        seed: Of who is trained on what, and of the shadow models.

    Raises:
        RunError: A value is out of range, or there is no such attack.
    """

    shadows: int = 16
    pool: int | None = None
    attacks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.shadows) is not int or self.shadows < 2 or self.shadows % 2:
            odd = type(self.shadows) is int and self.shadows > 2
            cure = f"take {self.shadows - 1} or {self.shadows + 1}" if odd else "take 2, or 16"
            raise RunError(
                f"shadows: expected an even number of at least 2, got {self.shadows!r}; {cure}: "
                "each example is in half of them"
            )
        if self.pool is not None and (type(self.pool) is not int or self.pool < 4):
            raise RunError(
                f"pool: expected a whole number of at least 4, got {self.pool!r}; leave it out for "
                "nine tenths of the test images and as many of the training"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise RunError(
                f"seed: expected a whole number of at least 0, got {self.seed!r}; take 0, or leave "
                "it out"
            )
        known = [*MEMBERSHIP_ATTACKS, *LABEL_ONLY]
        for name in arguments.instance("attacks", self.attacks, tuple):
            if name not in known:
                raise RunError(
                    f"attacks: expected some of {', '.join(known)}, got {name!r}; leave it out for "
                    "all of them"
                )
        if len(set(self.attacks)) < len(self.attacks):
            raise RunError(
                f"attacks: expected each once, got {', '.join(self.attacks)}; name it once"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the attacks that are made."""
        usual = [n for n in (*MEMBERSHIP_ATTACKS, *LABEL_ONLY) if n not in _UNASKED]
        return self.attacks or tuple(usual)

    def attacks_on(self, question: str) -> Mapping[str, Callable[[ScoreTable], Numbers]]:
        """The attacks that are made on the table of a question; of labels it is the score."""
        if question != CONFIDENCE:
            return {question: global_threshold}
        return {n: MEMBERSHIP_ATTACKS[n] for n in self.chosen if n in MEMBERSHIP_ATTACKS}

    @property
    def questions(self) -> dict[str, Question]:
        """What models are asked for these attacks."""
        own = {n: LABEL_ONLY[n] for n in self.chosen if n in LABEL_ONLY}
        if any(name in MEMBERSHIP_ATTACKS for name in self.chosen):
            return {CONFIDENCE: _QUESTIONS[CONFIDENCE], **own}
        return own


def measure_membership(
    target: Target,
    settings: MembershipSettings,
    folder: Path,
    *,
    stop: StopRequest,
    force: bool = False,
) -> tuple[MembershipRecord, tuple[ControlRecord, ...]]:
    """Trains shadow models by the target's recipe, asks them all, and attacks.

    Guarantee: what a shadow model said is written down before the next one is trained; the same
    call goes on from there. Nothing but its answers is kept of a shadow model.

    Args:
        target: Whom it is about.
        settings: How.
        folder: Of the table, made where it is not there.
        stop: Looked at after every step of a training.
        force: Begin anew where another table is in the folder.

    Returns:
        What was found, and the planted truths that the attacks must find.

    Raises:
        Stopped: A stop was requested.
        LeakageError: There are too few examples, or a model says no numbers.
        RunError: The folder holds another table, or cannot be written to.
    """
    key = exposed_key(folder, force=force)
    tables = _tables(target, settings, folder, key, stop, force=force)
    return _recorded(target, tables, settings, key)


def _tables(
    target: Target,
    settings: MembershipSettings,
    folder: Path,
    key: bytes,
    stop: StopRequest,
    *,
    force: bool,
) -> dict[str, ScoreTable]:
    """What all models say, asked or read, with a bar over their trainings."""
    design = _design(target, settings)
    record = _record_of(target, design, _rows(design, settings.questions), key)
    place = TableFolder(root=folder, record=record, key=key)
    if not force:
        place = place.with_others(_rows(design, _QUESTIONS))
    # Whatever the models of the table were asked, the next ones are asked too: it stays one table.
    questions = {name: _QUESTIONS[name] for name in place.record.questions}
    said = place.begin(force=force)
    kept = len(said.keys() - {0})
    with part_progress("shadow model", settings.shadows, kept=kept) as advance:

        def share(done: float) -> None:
            # One that is trained has yet to be asked.
            advance(len(said.keys() - {0}) + min(done, 0.99))

        def keep(model: int, signals: Mapping[str, Numbers]) -> None:
            said[model] = dict(signals)
            place.keep(said)
            advance(len(said.keys() - {0}))

        tables = score_tables(
            ShadowTraining(target=target, stop=stop, advance=share),
            target.everybody,
            design,
            recipe=target.digest,
            questions=questions,
            target=target.model,
            known=dict(said),
            keep=keep,
        )
    return {name: tables[name] for name in settings.questions}


def _design(target: Target, settings: MembershipSettings) -> ShadowDesign:
    return ShadowDesign.around(
        target.members,
        target.others,
        shadows=settings.shadows,
        pool=settings.pool,
        seed=settings.seed,
        apart=target.copies,
    )


def others_asked(target: Target, settings: MembershipSettings) -> int:
    """Others than members that the attack is asked about which is asked about most.

    Raises:
        LeakageError: There are too few examples.
    """
    pool = len(_design(target, settings).pool)
    limits = [question.most for question in settings.questions.values()]
    return max(pool if most is None else min(pool, most) for most in limits) // 2


def _rows(design: ShadowDesign, questions: Mapping[str, Question]) -> dict[str, int]:
    """About how many examples each is asked."""
    return {name: len(design.rows(each.most)) for name, each in questions.items()}


def _record_of(
    target: Target, design: ShadowDesign, questions: Mapping[str, int], key: bytes
) -> TableRecord:
    """What the table is of."""
    return TableRecord(
        run=target.record.run_id,
        recipe=target.digest,
        design=design_digest(design),
        target=target.weights,
        data=hmac.digest(key, target.data.fingerprint.encode(), "sha256").hex(),
        models=design.models,
        questions=questions,
    )


def _recorded(
    target: Target, tables: Mapping[str, ScoreTable], settings: MembershipSettings, key: bytes
) -> tuple[MembershipRecord, tuple[ControlRecord, ...]]:
    """The figures of all attacks, each on the table of its own question."""
    reports: list[LeakageReport] = []
    found: dict[str, MembershipAttackRecord] = {}
    for name, table in tables.items():
        attacks = settings.attacks_on(name)
        report = membership_report(table, key=key, attacks=attacks, promise=target.promise)
        reports.append(report)
        queries, classes = settings.questions[name].queries, target.data.spec.classes
        for each in report.attacks:
            curve = _curve(table, attacks[each.name])
            found[each.name] = _attack_record(each, queries, curve, _classes(each, table, classes))
    first = reports[0]
    record = MembershipRecord(
        members=first.members,
        others=first.others,
        shadows=first.shadows,
        attacks=tuple(found[name] for name in settings.chosen if name in found),
        exposed=tuple(
            ExposedRecord(digest=each.digest, found=each.found, of=each.of)
            for each in first.exposed
        ),
        broken=tuple(words for report in reports for words in report.broken),
    )
    return record, tuple(_control(each) for report in reports for each in report.controls)


def _control(found: Control) -> ControlRecord:
    return ControlRecord(
        name=f"{found.attack}, {found.name}",
        expected=found.expected,
        got=found.got,
        passed=found.passed,
    )


def _attack_record(
    figures: AttackFigures,
    queries: int,
    curve: tuple[tuple[float, float], ...],
    classes: tuple[ClassRecord, ...],
) -> MembershipAttackRecord:
    sides: tuple[tuple[_Whose, tuple[PointOnCurve, ...]], ...] = (
        ("target", figures.of_target),
        ("all", figures.of_all),
        ("oracle", figures.oracle),
    )
    return MembershipAttackRecord(
        name=figures.name,
        queries=queries,
        areas=figures.areas,
        rates=tuple(_rate(of, each) for of, points in sides for each in points),
        curve=curve,
        classes=classes,
    )


def _classes(
    figures: AttackFigures, table: ScoreTable, names: Sequence[str]
) -> tuple[ClassRecord, ...]:
    pool = ~table.population
    labels, mine = table.labels[pool], table.members[pool, 0]
    found = []
    for label, area in figures.by_class.items():
        members, others = (int((labels[side] == label).sum()) for side in (mine, ~mine))
        low, high = area_interval(area, members, others, error=0.025)
        found.append(
            ClassRecord(
                name=names[label], area=area, low=low, high=high, members=members, others=others
            )
        )
    return tuple(found)


def _rate(of: _Whose, point: PointOnCurve) -> RateRecord:
    low, high = point.tpr_interval
    return RateRecord(
        of=of,
        fpr=point.fpr,
        tpr=point.tpr,
        tpr_low=low,
        tpr_high=high,
        realised_fpr=point.realised_fpr,
        hits=point.hits,
        members=point.positives,
        false_alarms=point.false_alarms,
        others=point.negatives,
        ties=point.ties,
        ppv={f"{prior:g}": point.ppv(prior) for prior in _PRIORS},
    )


def _curve(
    table: ScoreTable, attack: Callable[[ScoreTable], Numbers]
) -> tuple[tuple[float, float], ...]:
    """What the target's scores give at every threshold, thinned to some points on a log scale."""
    pool = ~table.population
    scores, members = attack(table)[pool, 0], table.members[pool, 0]
    order = np.argsort(-scores, kind="stable")
    # Of equal scores the last one alone is a threshold.
    last = np.append(np.diff(scores[order]) != 0, True)
    hits, alarms = np.cumsum(members[order])[last], np.cumsum(~members[order])[last]
    tpr, fpr = hits / members.sum(), alarms / (~members).sum()
    wanted = np.unique(np.concatenate([np.geomspace(_LEAST_FPR, 1, _POINTS), [1.0]]))
    # Of each rate the largest share that is found with no more false alarms.
    places = np.searchsorted(fpr, wanted, side="right") - 1
    return tuple(
        (float(rate), float(tpr[place]) if place >= 0 else 0.0)
        for rate, place in zip(wanted, places, strict=True)
        if rate * (~members).sum() >= 1
    )
