"""What a model leaks, as `leakage.json` keeps it: who was in its data, images, copies of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

from secure_cnn.record.document import Checked, Document, require, require_share
from secure_cnn.record.measurements import Row

__all__ = [
    "ClassRecord",
    "ControlRecord",
    "ExposedRecord",
    "ExtractionRecord",
    "InversionRecord",
    "LeakageRecord",
    "MembershipAttackRecord",
    "MembershipRecord",
    "RateRecord",
]


@dataclass(frozen=True, kw_only=True)
class RateRecord(Checked):
    """How many members a threshold finds at a false positive rate; all rates are fractions.

    `of` says whose scores: the `target`'s at a threshold of its shadow models, those of `all`
    models each at a threshold of the others, or the target's at the `oracle` threshold, which no
    attacker knows. `ppv` is the share of members among the named, by the prior in words.
    """

    of: Literal["target", "all", "oracle"]
    fpr: float
    tpr: float
    tpr_low: float
    tpr_high: float
    realised_fpr: float
    hits: int
    members: int
    false_alarms: int
    others: int
    ties: int
    ppv: Mapping[str, float] = field(default_factory=dict)

    @property
    def named(self) -> int:
        """Members and others that are above the threshold."""
        return self.hits + self.false_alarms

    @property
    def kept(self) -> bool:
        """Whether it names about as many others as was asked: half as many, or twice.

        Where models differ or scores tie it may not, and what it finds then is no figure at all.
        """
        least = self.fpr / 2 if self.ties else 0.0
        return least <= self.realised_fpr <= 2 * self.fpr

    def _check(self) -> None:
        for value in (self.fpr, self.tpr, self.tpr_low, self.tpr_high, self.realised_fpr):
            _require_known_share("rate", value)
        for value in self.ppv.values():
            require_share("rate.ppv", value)
        ordered = self.tpr_low <= self.tpr <= self.tpr_high
        require(ordered, "rate.tpr", "a rate within its interval", self.tpr)
        counts = ((self.hits, self.members), (self.false_alarms, self.others))
        fits = all(0 <= found <= count > 0 for found, count in counts) and self.ties >= 0
        require(fits, "rate.hits", "at most as many as there are", counts)
        for name, (found, count) in zip(("tpr", "realised_fpr"), counts, strict=True):
            value = getattr(self, name)
            share = math.isclose(value, found / count, abs_tol=1e-9)
            require(share, f"rate.{name}", f"the share of {found} of {count}", value)


@dataclass(frozen=True, kw_only=True)
class ClassRecord(Checked):
    """What an attack finds in one class of the target: its area, with a 95 % interval."""

    name: str
    area: float
    low: float
    high: float
    members: int
    others: int

    def _check(self) -> None:
        ordered = 0 <= self.low <= self.area <= self.high <= 1
        require(ordered, "class.area", "an area within its interval", self.area)
        counted = min(self.members, self.others) > 0
        require(counted, "class.others", "some members and some others", self.others)


@dataclass(frozen=True, kw_only=True)
class MembershipAttackRecord(Checked):
    """What one membership attack finds.

    `areas` are of every model attacked with the others, the target first; `curve` is the target's,
    pairs of a false positive rate and a true positive rate, rising. `queries` is how often a model
    is asked about one example. `classes` are those with members and others.
    """

    name: str
    queries: int
    areas: tuple[float, ...]
    rates: tuple[RateRecord, ...]
    curve: tuple[tuple[float, float], ...]
    classes: tuple[ClassRecord, ...] = ()

    def _check(self) -> None:
        where = f"membership[{self.name}]"
        for value in (*self.areas, *(x for pair in self.curve for x in pair)):
            _require_known_share(where, value)
        require(len(self.areas) > 0, "membership.areas", "that of the target", self.areas)
        rises = all(a <= c and b <= d for (a, b), (c, d) in pairwise(self.curve))
        require(rises, f"{where}.curve", "pairs that rise", self.curve)
        # Between two of its points a curve is nowhere below the first of them.
        ends = [*(fpr for fpr, _ in self.curve[1:]), 1.0]
        below = sum(tpr * (end - fpr) for (fpr, tpr), end in zip(self.curve, ends, strict=False))
        above = self.areas[0] >= below - 1e-9
        require(above, f"{where}.areas", f"at least {below:.4g}, as is below its curve", self.areas)
        self._check_rates(where)

    def _check_rates(self, where: str) -> None:
        """Each comes once, and those of the target are of the same examples."""
        once = {(each.of, each.fpr) for each in self.rates}
        require(len(once) == len(self.rates), f"{where}.rates", "each once", self.rates)
        own = [each for each in self.rates if each.of != "all"]
        sizes = {(each.members, each.others) for each in own}
        require(len(sizes) <= 1, f"{where}.rates", "one number of members and of others", sizes)

    def rate(self, fpr: float, of: str = "target") -> RateRecord | None:
        """The rate at a false positive rate; None where the examples are too few to tell."""
        found = (each for each in self.rates if each.of == of and each.fpr == fpr)
        return next(found, None)

    def resolved_rate(self, fpr: float) -> RateRecord | None:
        """The target's rate, or where its examples are too few, that of all models together."""
        return self.rate(fpr) or self.rate(fpr, "all")


@dataclass(frozen=True, kw_only=True)
class ExposedRecord(Checked):
    """An example that most models trained on it give away, by a keyed digest, never by name."""

    digest: str
    found: int
    of: int

    def _check(self) -> None:
        fits = 0 <= self.found <= self.of > 0
        require(fits, "exposed.found", "at most as many as were asked", self.found)


@dataclass(frozen=True, kw_only=True)
class ControlRecord(Checked):
    """A planted truth that the measurement must find; one that fails voids the report."""

    name: str
    expected: str
    got: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class MembershipRecord(Checked):
    """Who was in the data: `members` of the target and `others`, told apart by `shadows` models.

    `broken` are attacks that find more than ε allows.
    """

    members: int
    others: int
    shadows: int
    attacks: tuple[MembershipAttackRecord, ...]
    exposed: tuple[ExposedRecord, ...]
    broken: tuple[str, ...] = ()

    @property
    def strongest(self) -> MembershipAttackRecord:
        """The attack with the largest area on the target."""
        return max(self.attacks, key=lambda each: each.areas[0])

    @property
    def resolution(self) -> float:
        """The false positive rate that lets one expect ten false alarms: less tells nothing."""
        return min(1.0, 10 / self.others)

    def most_found(self, fpr: float) -> tuple[MembershipAttackRecord, RateRecord] | None:
        """The attack that finds most members at this false positive rate, and how many.

        Of those that `kept` to it: on the target, or where its examples are too few for any
        attack, on all models together; None where those are too.
        """
        for of in ("target", "all"):
            found = [(each, each.rate(fpr, of)) for each in self.attacks]
            known = [(each, rate) for each, rate in found if rate is not None and rate.kept]
            if known:
                return max(known, key=lambda pair: pair[1].tpr)
        return None

    def _check(self) -> None:
        require(len(self.attacks) > 0, "membership.attacks", "at least one", self.attacks)
        counted = min(self.members, self.others) > 0
        require(counted, "membership.others", "some members and some others", self.others)
        names = [each.name for each in self.attacks]
        require(len(set(names)) == len(names), "membership.attacks", "each once", names)


@dataclass(frozen=True, kw_only=True)
class InversionRecord(Checked):
    """Images found from gradients: `identified` of `asked` first among so many `candidates`.

    `protection` is what was shared: a `plain` gradient, a `clipped` one, or a `noised` one.
    `psnr` is in dB, the mean over the images, and so is `ssim`, in [-1, 1].
    """

    protection: Literal["plain", "clipped", "noised"]
    batch: int
    identified: int
    asked: int
    candidates: int
    low: float
    high: float
    psnr: float
    ssim: float

    @property
    def share(self) -> float:
        """Of the images that were identified."""
        return self.identified / self.asked

    def _check(self) -> None:
        possible = 0 <= self.identified <= self.asked > 0 and self.candidates > 0
        require(possible, "inversion.identified", "at most as many as asked", self.identified)
        _require_known_share("inversion.low", self.low)
        _require_known_share("inversion.high", self.high)
        ordered = self.low <= self.share <= self.high
        require(ordered, "inversion.low", "an interval around the share", (self.low, self.high))


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord(Checked):
    """A copy made of a model's answers, beside one that never asked.

    `transfer` is the share of images, right before, that an attack made on the copy turns wrong for
    the victim; None where no attack was made.
    """

    pool: str
    answers: str
    queries: int
    accuracy: float
    fidelity: float
    baseline: float | None
    baseline_fidelity: float | None
    transfer: float | None = None
    baseline_transfer: float | None = None

    def _check(self) -> None:
        shares = (self.accuracy, self.fidelity, self.baseline, self.baseline_fidelity)
        for value in (*shares, self.transfer, self.baseline_transfer):
            require_share("extraction", value)
        require(self.queries >= 0, "extraction.queries", "at least 0", self.queries)


@dataclass(frozen=True, kw_only=True)
class LeakageRecord(Document):
    """What a model was found to leak, and under which conditions.

    A measurement, never a verification of ε: that is an audit. `run` is the number of the run whose
    model it is; `recipe` the digest of how it and its shadow models were trained. `promised` are
    further pairs of ε and δ that hold at once, with that by which ε is told: they bound more.
    `weights` is a digest of the model's; `measured` says when each part was, of which one that is
    not asked for anew stays; `left_out` what copies had too few images for, a sentence each.
    """

    KIND: ClassVar[str | None] = "leakage"

    created: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    model: str
    variant: str
    data: str
    classes: tuple[str, ...]
    run: str
    recipe: str
    settings: Mapping[str, Any]
    accuracy: float
    train_accuracy: float
    epsilon: float | None = None
    delta: float | None = None
    promised: tuple[tuple[float, float], ...] = ()
    controls: tuple[ControlRecord, ...] = ()
    membership: MembershipRecord | None = None
    inversion: tuple[InversionRecord, ...] = ()
    extraction: tuple[ExtractionRecord, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str = ""
    measured: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def void(self) -> bool:
        """Whether a control failed or none was made, so that no figure of membership counts."""
        unproven = self.membership is not None and not self.controls
        return unproven or not all(each.passed for each in self.controls)

    @property
    def uncontrolled(self) -> tuple[str, ...]:
        """Attacks on memberships without both of their controls, by name."""
        made = {each.name for each in self.controls}
        attacks = () if self.membership is None else self.membership.attacks
        return tuple(
            each.name
            for each in attacks
            if not made.issuperset(f"{each.name}, {kind}" for kind in ("permuted", "planted"))
        )

    @property
    def broken(self) -> tuple[str, ...]:
        """Where an attack finds more than ε allows, a sentence each."""
        return () if self.membership is None else self.membership.broken

    @property
    def passed(self) -> bool:
        """Whether every control fired, and nothing was found that ε rules out."""
        return not self.void and not self.broken

    def allowed_tpr(self, fpr: float) -> float | None:
        """The largest true positive rate that privacy allows; None where nothing was promised.

        Of all that was `promised`, for a member in another's place: one removal and one addition,
        each bounded (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776, theorem 2.1). The measurement
        has the same formula in `privacy.leakage.Promise`, and a record stands on no package.
        """
        if self.epsilon is None or self.delta is None:
            return None
        pairs = self.promised or ((self.epsilon, self.delta),)
        for _ in range(2):
            fpr = min(_allowed(fpr, *pair) for pair in pairs)
        return fpr

    @property
    def rows(self) -> tuple[Row, ...]:
        """The figures that stand beside accuracy and ε, as other measurements have them."""
        rows = []
        if self.membership is not None:
            best = self.membership.strongest
            rows.append(
                self._row("auc", best.areas[0], min(best.areas), max(best.areas), len(best.areas))
            )
            for fpr in (0.1, 0.01, 0.001):
                found = self.membership.most_found(fpr)
                if found is not None:
                    top = found[1]
                    rows.append(
                        self._row(f"tpr@{fpr:g}", top.tpr, top.tpr_low, top.tpr_high, top.members)
                    )
        for each in self.inversion:
            name = f"identified-{each.protection}-{each.batch}"
            rows.append(self._row(name, each.share, each.low, each.high, each.asked))
        return tuple(rows)

    def _row(self, metric: str, value: float, low: float, high: float, n: int) -> Row:
        return Row(
            case=self.model,
            variant=self.variant,
            metric=metric,
            median=value,
            low=low,
            high=high,
            unit="1",
            n=n,
        )

    def _check(self) -> None:
        require_share("leakage.accuracy", self.accuracy)
        require_share("leakage.train_accuracy", self.train_accuracy)
        both = (self.epsilon is None) == (self.delta is None)
        require(both, "leakage.epsilon", "epsilon with delta, or neither", self.epsilon)
        told = () if self.epsilon is None or self.delta is None else ((self.epsilon, self.delta),)
        for epsilon, delta in (*told, *self.promised):
            stated = epsilon >= 0 and 0 <= delta < 1
            require(stated, "leakage.epsilon", "at least 0, with a delta in [0, 1)", epsilon)
        require(
            bool(told) or not self.promised, "leakage.promised", "none without ε", self.promised
        )


def _allowed(fpr: float, epsilon: float, delta: float) -> float:
    above = math.exp(min(700.0, epsilon)) * fpr + delta
    return min(1.0, above, 1 - math.exp(-epsilon) * (1 - delta - fpr))


def _require_known_share(where: str, value: float) -> None:
    """Raise unless a share lies in [0, 1]; that there was nothing to share is no figure."""
    require(0 <= value <= 1, where, "a share in [0, 1]", value)
