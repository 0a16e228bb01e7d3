"""What a table says of a target: every attack's figures, what privacy allows, who is most exposed.

It is a measurement, never a verification of epsilon: rates are taken over all examples together,
and one may be told apart more often than they all (that is what `privacy.audit` asks).
"""

import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import final

import numpy as np

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.attacks import (
    attack_p,
    attack_r,
    base,
    bavaria,
    global_threshold,
    lira,
    rmia,
)
from privacy.leakage.controls import Control, controls
from privacy.leakage.metrics import (
    PointOnCurve,
    area,
    areas,
    oracle_threshold,
    point,
    point_of_all,
    resolved,
    shadow_thresholds,
)
from privacy.leakage.promise import Promise
from privacy.leakage.table import Flags, ScoreTable
from privacy.statistics import Numbers, clopper_pearson

__all__ = [
    "MEMBERSHIP_ATTACKS",
    "AttackFigures",
    "Exposed",
    "LeakageReport",
    "checked_attacks",
    "membership_report",
]

_RATES = (0.1, 0.01, 0.001)
_EXPOSED_AT = 0.01
"""The false positive rate at which an example counts as found."""
_GATE_ERROR = 1e-5
_CURVE_POINTS = 200
"""Of each end where a promise is held against a figure: of some dozens none fails by chance."""

MEMBERSHIP_ATTACKS: Mapping[str, Callable[[ScoreTable], Numbers]] = MappingProxyType(
    {
        "global-threshold": global_threshold,
        "attack-p": attack_p,
        "attack-r": attack_r,
        "lira": lira,
        "lira-offline": partial(lira, online=False),
        "lira-own-variance": partial(lira, pooled=False),
        "rmia": rmia,
        "rmia-offline": partial(rmia, online=False),
        "base": base,
        "base-offline": partial(base, online=False),
        "bavaria": bavaria,
        "bavaria-offline": partial(bavaria, online=False),
    }
)
"""All attacks on a table, by name."""
_NOT_KEPT = "not kept: the threshold names more than twice as many others as was asked"
_OF_POPULATION = ("attack-p", "rmia", "rmia-offline")


@final
@dataclass(frozen=True, kw_only=True)
class AttackFigures:
    """What one attack finds.

    Attributes:
        name: Of `MEMBERSHIP_ATTACKS`.
        areas: Area under the curve of every model, the target first, each attacked with the others
            but the one that has the other half: ½ is a guess, and how they differ is the error bar.
        of_target: Points of the target, at thresholds of its shadow models, for each of 10 %, 1 %
            and 0.1 % that its non-members resolve.
        of_all: Points of all models together, each at a threshold of the others: more decisions
            resolve smaller rates. Those of one model are not independent, so that an interval of
            them is too short rather than too long.
        oracle: As `of_target`, at the threshold that is best for the target: no attacker knows it.
        by_class: Area of the target for each class with members and others.
    """

    name: str
    areas: tuple[float, ...]
    of_target: tuple[PointOnCurve, ...]
    of_all: tuple[PointOnCurve, ...]
    oracle: tuple[PointOnCurve, ...]
    by_class: Mapping[int, float]

    @property
    def area(self) -> float:
        """That of the target."""
        return self.areas[0]


@final
@dataclass(frozen=True, kw_only=True)
class Exposed:
    """An example that is told to be a member again and again.

    Attributes:
        digest: HMAC-SHA256, by a key, of "example N", N being its index: no name without the key.
        found: Models that were trained on it and give that away, of `of`.
        of: Models that were trained on it.
    """

    digest: str
    found: int
    of: int


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class LeakageReport:
    """What a target and its shadow models give away of who they were trained on.

    Printed, it is a table of its attacks with the verdict below.

    Attributes:
        attacks: Figures of each attack.
        exposed: The most exposed examples of the pool, the most exposed first.
        members: Members of the target in the pool.
        others: Examples of the pool that the target was not trained on.
        shadows: How many shadow models there were.
        promise: What was promised of the target, if anything.
        broken: Attacks and rates at which more members are found than that allows.
        controls: Planted truths, and which attacks found them; one that fails voids the report.
    """

    attacks: tuple[AttackFigures, ...]
    exposed: tuple[Exposed, ...]
    members: int
    others: int
    shadows: int
    promise: Promise | None
    broken: tuple[str, ...]
    controls: tuple[Control, ...]

    @property
    def void(self) -> bool:
        """Whether an attack failed a control, so that no figure can be believed."""
        return not all(each.passed for each in self.controls)

    @property
    def passed(self) -> bool:
        """Whether all controls passed, and nothing was found that the promise rules out."""
        return not self.void and not self.broken

    @property
    def verdict(self) -> str:
        """What there is to say of it as a whole, in a sentence or two."""
        if self.void:
            failed = [each for each in self.controls if not each.passed]
            lines = [
                f"{each.attack} on the {each.name} table: expected {each.expected}, got {each.got}"
                for each in failed
            ]
            return f"void, no figure can be believed: {'; '.join(lines)}"
        if self.broken:
            return f"more than was promised: {'; '.join(self.broken)}"
        if self.promise is None:
            return "measured, with nothing promised that it could be held against"
        return f"within what {self.promise} allows; that is a measurement and verifies nothing"

    def __repr__(self) -> str:
        rates = sorted({each.fpr for found in self.attacks for each in found.of_target})[::-1]
        lines = [("attack", "area", "of all models", *(f"TPR at FPR {fpr:g}" for fpr in rates))]
        lines += [
            (
                each.name,
                f"{each.area:.3f}",
                f"{min(each.areas):.3f} to {max(each.areas):.3f}",
                *(_told(each, fpr) for fpr in rates),
            )
            for each in self.attacks
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        head = f"{self.members} members, {self.others} others, {self.shadows} shadow models"
        notes = [_NOT_KEPT] if any("not kept" in row for row in rows) else []
        return "\n".join([head, *rows, *notes, self.verdict])

    def attack(self, name: str) -> AttackFigures:
        """The figures of one attack.

        Raises:
            LeakageError: It is not in the report.
        """
        for each in self.attacks:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.attacks)
        raise LeakageError(f"attack: expected one of {names}, got {name!r}")


def _told(figures: AttackFigures, fpr: float) -> str:
    """A rate of the target with its interval, if it is kept; a dash where others are too few."""
    for each in figures.of_target:
        if each.fpr == fpr:
            low, high = each.tpr_interval
            if not each.kept:
                return f"not kept: FPR {each.realised_fpr:.3f}"
            return f"{each.tpr:.3f} ({low:.3f} to {high:.3f}) at {each.realised_fpr:.3f}"
    return "-"


def membership_report(
    table: ScoreTable,
    *,
    key: bytes,
    attacks: Mapping[str, Callable[[ScoreTable], Numbers]] = MEMBERSHIP_ATTACKS,
    promise: Promise | None = None,
    exposed: int = 10,
) -> LeakageReport:
    """Runs attacks on a table, and their controls.

    Those that need a population are left out where it has none.

    Args:
        table: Of a target, the first model, and its shadow models.
        key: At least 16 secret bytes, by which the most exposed examples are told.
        attacks: By name.
        promise: What was promised of the target; None where nothing was.
        exposed: Examples to tell, at most.

    Raises:
        LeakageError: The key is short, there is no attack, or one does not score every example.
    """
    arguments.secret("key", key)
    arguments.instance("table", table, ScoreTable)
    arguments.whole("exposed", exposed, least=0)
    if promise is not None:
        arguments.instance("promise", promise, Promise)
    attacks = checked_attacks(attacks, population=bool(table.population.any()))
    pool = ~table.population
    scores = {name: _scores(name, attack, table)[pool] for name, attack in attacks.items()}
    members, labels = table.members[pool], table.labels[pool]
    limits = {name: shadow_thresholds(found, members, _RATES) for name, found in scores.items()}
    figures = [_figures(name, scores[name], limits[name], members, labels) for name in scores]
    at = _RATES.index(_EXPOSED_AT)
    above = [scores[name] > limits[name][at] for name in scores]
    broken: list[str] = []
    if promise is not None:
        broken += [x for each in figures for x in _beyond(each, promise)]
        mine = members[:, 0]
        broken += [
            x for name in scores for x in _beyond_anywhere(name, scores[name][:, 0], mine, promise)
        ]
    return LeakageReport(
        attacks=tuple(figures),
        exposed=tuple(_exposed(above, table, key, exposed)),
        members=int(members[:, 0].sum()),
        others=int((~members[:, 0]).sum()),
        shadows=members.shape[1] - 1,
        promise=promise,
        broken=tuple(broken),
        controls=controls(table, attacks),
    )


def checked_attacks(
    attacks: Mapping[str, Callable[[ScoreTable], Numbers]], *, population: bool
) -> dict[str, Callable[[ScoreTable], Numbers]]:
    """Those that can be made on a table with a population, or on one without.

    Raises:
        LeakageError: There is none, or one is no function.
    """
    for name, attack in arguments.named("attacks", attacks, "attacks").items():
        arguments.called(f"attacks: {name}", attack, "a function of a table", takes=1)
    usable = {n: each for n, each in attacks.items() if population or n not in _OF_POPULATION}
    if not usable:
        raise LeakageError(
            "attacks: expected at least one that this table allows, got none: those named need a "
            "population, examples that no model was trained on"
        )
    return usable


def _scores(name: str, attack: Callable[[ScoreTable], Numbers], table: ScoreTable) -> Numbers:
    scores = attack(table)
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fiub":
        raise LeakageError(
            f"attacks: expected an array of numbers from {name}, got "
            f"{getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.shape != table.signals.shape or np.isnan(scores).any():
        raise LeakageError(
            f"attacks: expected a number for each of {list(table.signals.shape)} signals from "
            f"{name}, got {list(scores.shape)}, {int(np.isnan(scores).sum())} of them no number"
        )
    return scores


def _figures(
    name: str,
    scores: Numbers,
    thresholds: Numbers,
    members: Flags,
    labels: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> AttackFigures:
    own, mine = scores[:, 0], members[:, 0]
    limits = dict(zip(_RATES, thresholds, strict=True))
    told = [fpr for fpr in _RATES if resolved(int((~mine).sum()), fpr)]
    told_of_all = [fpr for fpr in _RATES if resolved(int((~members).sum()), fpr)]
    classes = {
        int(label): area(own[labels == label], mine[labels == label])
        for label in np.unique(labels)
        if len(set(mine[labels == label].tolist())) == 2
    }
    return AttackFigures(
        name=name,
        areas=tuple(areas(scores, members).tolist()),
        of_target=tuple(
            point(own[mine], own[~mine], threshold=float(limits[fpr][0]), fpr=fpr) for fpr in told
        ),
        of_all=tuple(point_of_all(scores, limits[fpr], members, fpr=fpr) for fpr in told_of_all),
        oracle=tuple(
            point(own[mine], own[~mine], threshold=oracle_threshold(own, mine, fpr), fpr=fpr)
            for fpr in told
        ),
        by_class=MappingProxyType(classes),
    )


def _beyond(figures: AttackFigures, promise: Promise) -> list[str]:
    """Where even the lower limit of what is found is above what the upper limit of FPR allows."""
    broken = []
    for found in figures.of_target:
        least = clopper_pearson(found.hits, found.positives, error=_GATE_ERROR)[0]
        most = clopper_pearson(found.false_alarms, found.negatives, error=_GATE_ERROR)[1]
        bound = promise.allowed_tpr(most)
        if least > bound:
            broken.append(
                f"{figures.name}: TPR at least {least:.3g} at FPR at most {most:.3g}, where "
                f"{promise} allows {bound:.3g}"
            )
    return broken


def _beyond_anywhere(name: str, scores: Numbers, members: Flags, promise: Promise) -> list[str]:
    """Where the target's own curve is beyond, with room for all thresholds at once.

    Thresholds of shadow models may lie far off where they are unlike the target, or be too few
    where there are few examples. The room is that of Dvoretzky, Kiefer and Wolfowitz, with
    Massart's constant (1990).
    """
    positives, negatives = scores[members], scores[~members]
    room = [math.sqrt(math.log(1 / _GATE_ERROR) / (2 * len(e))) for e in (positives, negatives)]
    worst = (0.0, "")
    levels = np.unique(scores)
    chosen = np.linspace(0, len(levels) - 1, min(len(levels), _CURVE_POINTS)).astype(int)
    for threshold in levels[chosen].tolist():
        least = float((positives > threshold).mean()) - room[0]
        most = float((negatives > threshold).mean()) + room[1]
        bound = promise.allowed_tpr(min(1.0, most))
        if least - bound > worst[0]:
            worst = (
                least - bound,
                f"{name}: TPR at least {least:.3g} at FPR at most {most:.3g} on the target's own "
                f"curve, where {promise} allows {bound:.3g}",
            )
    return [worst[1]] if worst[0] else []


def _exposed(above: Sequence[Flags], table: ScoreTable, key: bytes, most: int) -> list[Exposed]:
    """Those whom most of the models that were trained on them give away, by what finds most."""
    members, told = table.members[~table.population], table.told[~table.population]
    found = max(((each & members).sum(1) for each in above), key=np.sum)
    asked = members.sum(1)
    share = found / np.maximum(1, asked)
    order = np.argsort(-share, kind="stable")[:most]
    return [
        Exposed(
            digest=hmac.new(key, f"example {told[row]}".encode(), "sha256").hexdigest(),
            found=int(found[row]),
            of=int(asked[row]),
        )
        for row in order.tolist()
        if found[row]
    ]
