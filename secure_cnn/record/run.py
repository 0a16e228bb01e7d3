"""The records of a run, an audit and an evaluation: what was done, found and may be claimed.

They hold no training data and no keys. `run.json` does hold the size of the training data, which is
treated as public and not covered by any ε; the fingerprint of private data is keyed, and the key is
not here. Reports are plain values, as `privacy.audit` and `defenses` write them down; a record
checks that they hold what its page shows. Deliberately not here: how a number was
found.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from secure_cnn.errors import RunError
from secure_cnn.record import wording
from secure_cnn.record.document import Checked, Document, require, require_share
from secure_cnn.record.measurements import Row

__all__ = [
    "AuditRecord",
    "ChosenRecord",
    "DataRecord",
    "EpochRecord",
    "ModelRecord",
    "PrivacyRecord",
    "ResultRecord",
    "RobustnessRecord",
    "RunRecord",
    "ThreatRecord",
]


@dataclass(frozen=True, kw_only=True)
class DataRecord(Checked):
    """Which images a run used, how many, and of which shape (channels, height, width).

    `fingerprint` is a digest of images and labels, under a key of the run where ε must cover it.
    """

    name: str
    fingerprint: str
    train: int
    test: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def _check(self) -> None:
        require(len(self.classes) >= 2, "data.classes", "at least two classes", self.classes)
        require(min(self.train, self.test, *self.shape) >= 0, "data", "no negative size", self)

    @property
    def keyed(self) -> bool:
        """Whether the fingerprint says nothing without its key."""
        return self.fingerprint.startswith("hmac-")


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Checked):
    """Which network a run trained, and how many trainable parameters it has.

    `weights` is the SHA-256 of the file that it started from, in hexadecimal; empty if it did not.
    Of a network of one's own, `source` is that of the file with the function that makes it, and
    `structure` that of the names and shapes of its tensors.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"weights", "source", "structure"})

    name: str
    parameters: int
    weights: str = ""
    source: str = ""
    structure: str = ""


@dataclass(frozen=True, kw_only=True)
class PrivacyRecord(Checked):
    """The conditions under which a run's ε holds: the plan, not what was spent of it.

    The noise is in units of `max_grad_norm`, `relation` says which data sets count as neighbours:
    those with one `unit` more or less, an example, or a person of whom up to `images_per_person`
    were in a step. ε does not charge for `trials`, the settings tried on the data as stated, None
    where not stated.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sampling_rate: float
    steps: int
    relation: str
    accountant: str
    trials: int | None = None
    unit: Literal["example", "person"] = "example"
    images_per_person: int | None = None

    LATER: ClassVar[frozenset[str]] = frozenset({"trials", "unit", "images_per_person"})

    def _check(self) -> None:
        require(self.epsilon >= 0, "privacy.epsilon", "a number of at least 0", self.epsilon)
        require(0 < self.delta < 1, "privacy.delta", "a number in (0, 1)", self.delta)
        rate = self.sampling_rate
        require(0 < rate <= 1, "privacy.sampling_rate", "a number in (0, 1]", rate)
        tried = self.trials
        require(tried is None or tried >= 1, "privacy.trials", "a number of at least 1", tried)
        images, persons = self.images_per_person, self.unit == "person"
        fits = (images is not None and images >= 1) if persons else images is None
        require(fits, "privacy.images_per_person", "a number with the unit person only", images)


@dataclass(frozen=True, kw_only=True)
class ThreatRecord(Checked):
    """The attacker against whom robustness was measured: the fields of `defenses.ThreatModel`."""

    norm: str
    eps: float
    bounds: tuple[float, float]

    def _check(self) -> None:
        require(self.eps >= 0, "threat.eps", "a number of at least 0", self.eps)

    @property
    def words(self) -> str:
        """All of it in one phrase."""
        return wording.threat(self.norm, self.eps, self.bounds)


@dataclass(frozen=True, kw_only=True)
class ChosenRecord(Checked):
    """What the settings of one variant came to, whether somebody gave them or nobody did.

    `learning_rate` is its peak, `batch_size` that of a step, of a private training the expected
    one in units of the plan; `delta` is of a private training, `attack` of an adversarial one.
    """

    variant: str
    batch_size: int
    steps: int
    learning_rate: float
    delta: float | None = None
    attack: str | None = None

    def _check(self) -> None:
        require(self.batch_size >= 1, "chosen.batch_size", "a number of at least 1", self)
        require(self.steps >= 1, "chosen.steps", "a number of at least 1", self)


@dataclass(frozen=True, kw_only=True)
class EpochRecord(Checked):
    """One epoch of one variant, counted from 1; `learning_rate` is that at its end.

    The training loss is None in a private run, where ε does not cover it.
    """

    variant: str
    epoch: int
    step: int
    seconds: float
    learning_rate: float
    test_loss: float
    test_accuracy: float
    train_loss: float | None = None
    epsilon: float | None = None

    def _check(self) -> None:
        require_share("epochs.test_accuracy", self.test_accuracy)
        # An exact loss beside ε would publish what ε does not cover.
        if self.epsilon is not None and self.train_loss is not None:
            raise RunError(
                "epochs.train_loss: expected none in a private run, got a number; leave it out, "
                "since epsilon does not cover it"
            )


@dataclass(frozen=True, kw_only=True)
class ResultRecord(Checked):
    """What one finished variant can do, before and under attack.

    What was not measured is None: robust accuracy and its 95 % interval together. Robust figures
    are of the worst case over `attacks`, image by image. Rows of `confusion` are true classes;
    recall is NaN for a class without test images; `seconds_per_step` is a median.
    """

    variant: str
    accuracy: float
    macro_recall: float
    recall: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    epsilon: float | None = None
    robust_accuracy: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    robust_recall: tuple[float, ...] | None = None
    attacks: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None

    def _check(self) -> None:
        robust = (self.robust_accuracy, self.robust_low, self.robust_high)
        shares = (self.accuracy, self.macro_recall, *self.recall, *(self.robust_recall or ()))
        for value in (*shares, *self.attacks.values(), *robust):
            require_share(f"results[{self.variant}]", value)
        size = len(self.recall)
        square = [len(row) for row in self.confusion] == [size] * size
        require(square, "results.confusion", f"{size} rows of {size}", self.confusion)
        fits = self.robust_recall is None or len(self.robust_recall) == size
        require(fits, "results.robust_recall", f"{size} values", self.robust_recall)
        whole = len({value is None for value in robust}) == 1
        require(whole, "results.robust_accuracy", "all or none of it and its interval", robust)

    @property
    def robust_macro_recall(self) -> float | None:
        """Mean of `robust_recall` over the classes that have test images, or None without it."""
        there = [share for share in self.robust_recall or () if not math.isnan(share)]
        return sum(there) / len(there) if there else None


@dataclass(frozen=True, kw_only=True)
class RunRecord(Document):
    """The whole run, as `run.json` keeps it.

    Guarantee: a record claims nothing without its conditions. ε needs `privacy`, robust accuracy
    needs `threat`, and `"plain"` never carries ε.

    Epochs and results are in the order in which they ran: the last protected result is the run's
    own. `claims` are bound into the sealed checkpoint; the states of the run bear its `run_id`; and
    `released`, the noised steps that may have become visible, is written before they do. `settings`
    are as they were given, `chosen` what they came to in each variant that has begun, and
    `model_digest` is that of the names and values in the model that the finished run left.
    `follows` are the ids of the runs that people left, of which this one is what is left, the first
    one first; `stage_epochs` are the epochs of each stage of a training in shards, of which none is
    among `epochs`, else 0.
    """

    KIND: ClassVar[str | None] = "run"
    LATER: ClassVar[frozenset[str]] = frozenset(
        {"run_id", "signer", "released", "chosen", "model_digest", "follows", "stage_epochs"}
    )

    created: str
    data: DataRecord
    model: ModelRecord
    status: Literal["running", "complete", "interrupted"] = "running"
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    privacy: PrivacyRecord | None = None
    threat: ThreatRecord | None = None
    epochs: tuple[EpochRecord, ...] = ()
    results: tuple[ResultRecord, ...] = ()
    cost: tuple[Row, ...] = ()
    claims: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    run_id: str = ""
    signer: str = ""
    released: int = 0
    chosen: tuple[ChosenRecord, ...] = ()
    model_digest: str = ""
    follows: tuple[str, ...] = ()
    stage_epochs: int = 0

    @property
    def stages_in_words(self) -> str:
        """Of a training in shards how many, and how long; else empty."""
        shards, slices = (self.settings.get(name) for name in ("shards", "slices"))
        if not (self.stage_epochs and type(shards) is int and type(slices) is int):
            return ""
        told = [
            f"{count} {name}{'' if count == 1 else 's'}"
            for count, name in ((shards, "shard"), (slices, "slice"), (self.stage_epochs, "epoch"))
        ]
        return f"{shards * slices}: {told[0]} of {told[1]}, {told[2]} a stage"

    @property
    def settings_in_words(self) -> list[tuple[str, str]]:
        """Names and values of the settings, with what those came to that nobody gave.

        Where the variants differ, each value has its variant behind it.
        """
        words = dict(wording.shown(self.settings))
        for part in fields(ChosenRecord)[1:]:
            values = {each.variant: getattr(each, part.name) for each in self.chosen}
            told = {name: value for name, value in values.items() if value is not None}
            if told:
                same = len(set(told.values())) == 1
                ((word, _),) = wording.shown({part.name: None})
                words[word] = ", ".join(
                    dict.fromkeys(
                        wording.shown({part.name: value})[0][1] + ("" if same else f" ({name})")
                        for name, value in told.items()
                    )
                )
        if self.stages_in_words:
            words["stages"] = self.stages_in_words
        return list(words.items())

    @property
    def parts(self) -> tuple[EpochRecord | ResultRecord, ...]:
        """Epochs and results, whatever bears a variant and may bear its ε."""
        return (*self.epochs, *self.results)

    def _check(self) -> None:
        try:
            datetime.fromisoformat(self.created)
        except ValueError as error:
            raise RunError(
                f"created: expected an ISO 8601 time, got {self.created[:40]!r}"
            ) from error
        for part in self.parts:
            if part.epsilon is not None:
                require(self.privacy is not None, "privacy", "the conditions of epsilon", None)
                require(part.variant != "plain", "epsilon of plain", "none", part.epsilon)
        self._check_results()
        for name in ("released", "stage_epochs"):
            value = getattr(self, name)
            require(value >= 0, name, "a number of at least 0", value)
        begun = [each.variant for each in self.chosen]
        require(len(set(begun)) == len(begun), "chosen", "one for each variant", begun)
        for name in self.checkpoints:
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts
            require(inside, "checkpoints", "a path inside the run's folder", name)

    def _check_results(self) -> None:
        """Each is about the classes of this data and the attacker on record, and comes once."""
        size = len(self.data.classes)
        for result in self.results:
            require(len(result.recall) == size, "results.recall", f"{size} values", result.recall)
            covered = result.robust_accuracy is None or self.threat is not None
            require(covered, "threat", "the conditions of robust_accuracy", self.threat)
        variants = [result.variant for result in self.results]
        require(len(set(variants)) == len(variants), "results", "one for each variant", variants)


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
