"""The run record: `run.json`, what a run was, what it found and what may be claimed about it.

A record holds no training data and no keys. It does hold the size of the training data, which is
treated as public and not covered by any ε. The fingerprint of private data is keyed, and the key is
not here. Deliberately not here either: how a number was found, and how it is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from secure_cnn.errors import RunError
from secure_cnn.record.document import Document, conform, require
from secure_cnn.record.measurements import Row
from secure_cnn.record.results import EpochRecord, ResultRecord

__all__ = [
    "DataRecord",
    "ModelRecord",
    "PrivacyRecord",
    "RunRecord",
    "ThreatRecord",
]


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """Which images a run used.

    Attributes:
        name: The data set's name.
        fingerprint: A digest of images and labels; under a key of the run where ε must cover it.
        train: Number of training images.
        test: Number of test images.
        shape: Channels, height and width of one image.
        classes: The class names, in the order of the labels; at least two.

    Raises:
        RunError: A value has the wrong type or range.
    """

    name: str
    fingerprint: str
    train: int
    test: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what is no image data set."""
        conform(self)
        require(len(self.classes) >= 2, "data.classes", "at least two classes", self.classes)
        require(min(self.train, self.test, *self.shape) >= 0, "data", "no negative size", self)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Which network a run trained.

    Attributes:
        name: The architecture's name.
        parameters: Number of trainable parameters.

    Raises:
        RunError: A value has the wrong type.
    """

    name: str
    parameters: int

    def __post_init__(self) -> None:
        """Refuse what the schema does not know."""
        conform(self)


@dataclass(frozen=True, kw_only=True)
class PrivacyRecord:
    """The conditions under which a run's ε holds: the plan, not what was spent of it.

    Attributes:
        epsilon: ε of the whole plan.
        delta: δ, in (0, 1).
        noise_multiplier: Standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: The L2 norm to which each example's gradient is clipped.
        sampling_rate: The probability with which each example joins a step, in (0, 1].
        steps: Number of steps in the plan.
        relation: Which two data sets count as neighbours.
        accountant: Which accountant computed ε.
        trials: How many settings were tried on the data, as stated; ε does not charge them. None
            where it was not stated.

    Raises:
        RunError: A value has the wrong type or range.
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

    LATER: ClassVar[frozenset[str]] = frozenset({"trials"})

    def __post_init__(self) -> None:
        """Refuse conditions under which no ε can hold."""
        conform(self)
        require(self.epsilon >= 0, "privacy.epsilon", "a number of at least 0", self.epsilon)
        require(0 < self.delta < 1, "privacy.delta", "a number in (0, 1)", self.delta)
        rate = self.sampling_rate
        require(0 < rate <= 1, "privacy.sampling_rate", "a number in (0, 1]", rate)
        tried = self.trials
        require(tried is None or tried >= 1, "privacy.trials", "a number of at least 1", tried)


@dataclass(frozen=True, kw_only=True)
class ThreatRecord:
    """The attacker against whom robustness was measured.

    Attributes:
        norm: The norm of the perturbation, such as `"linf"`.
        eps: Its largest size, in the units of the images.
        bounds: The smallest and the largest value of a pixel.

    Raises:
        RunError: A value has the wrong type or range.
    """

    norm: str
    eps: float
    bounds: tuple[float, float]

    def __post_init__(self) -> None:
        """Refuse what is no threat model."""
        conform(self)
        require(self.eps >= 0, "threat.eps", "a number of at least 0", self.eps)


@dataclass(frozen=True, kw_only=True)
class RunRecord(Document):
    """The whole run, as `run.json` keeps it.

    Guarantee: a record claims nothing without its conditions. ε needs `privacy`, robust accuracy
    needs `threat`, and `"plain"` never carries ε. What is written is read back equal (NaN aside,
    which equals nothing).

    Attributes:
        created: When the run started, as ISO 8601.
        data: Which images.
        model: Which network.
        status: `"running"`, `"complete"` or `"interrupted"`.
        seconds: Seconds that the run has taken.
        settings: The recipe's fields as plain JSON.
        versions: As `versions` gives it.
        hardware: As `hardware` gives it.
        privacy: The conditions of ε; None without differential privacy.
        threat: The conditions of robust accuracy; None when it was not evaluated.
        epochs: Every epoch of every variant, in the order they ran.
        results: One for each finished variant; the last protected one is the run's own.
        cost: What the protections cost, in the rows of a benchmark.
        claims: What is bound into the sealed checkpoint.
        checkpoints: Paths relative to the run's folder, with forward slashes.
        notes: Sentences for the reader.
        run_id: Which run it is; its states bear the same.
        signer: Who signs the run's checkpoints, as public text; empty where nobody does.
        released: Noised steps of which something could be seen: written before it could.

    Raises:
        RunError: A value has the wrong type, shape or range, or a claim lacks its conditions.

    Example:
        >>> record = RunRecord(
        ...     created="2025-01-01T00:00:00+00:00",
        ...     model=ModelRecord(name="compact", parameters=9000),
        ...     data=DataRecord(name="digits", fingerprint="", train=8, test=2, shape=(1, 8, 8),
        ...                     classes=("0", "1")))
        >>> RunRecord.from_dict(record.to_dict()) == record
        True
    """

    KIND: ClassVar[str | None] = "run"

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

    LATER: ClassVar[frozenset[str]] = frozenset({"run_id", "signer", "released"})

    def __post_init__(self) -> None:
        """Refuse a record that claims without conditions."""
        conform(self)
        _timestamp(self.created)
        parts: tuple[EpochRecord | ResultRecord, ...] = (*self.epochs, *self.results)
        for part in parts:
            _private_only_under_conditions(part, self.privacy)
        for result in self.results:
            _fits(result, self.data, self.threat)
        require(self.released >= 0, "released", "a number of at least 0", self.released)
        variants = [result.variant for result in self.results]
        require(len(set(variants)) == len(variants), "results", "one for each variant", variants)
        for name in self.checkpoints:
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts
            require(inside, "checkpoints", "a path inside the run's folder", name)


def _private_only_under_conditions(
    part: EpochRecord | ResultRecord, privacy: PrivacyRecord | None
) -> None:
    """ε belongs to a protected variant whose plan is on record."""
    if part.epsilon is not None:
        require(privacy is not None, "privacy", "the conditions of epsilon", privacy)
        require(part.variant != "plain", "epsilon of plain", "none", part.epsilon)


def _fits(result: ResultRecord, data: DataRecord, threat: ThreatRecord | None) -> None:
    """A result is about the classes of this data and the attacker on record."""
    size = len(data.classes)
    require(len(result.recall) == size, "results.recall", f"{size} values", result.recall)
    covered = result.robust_accuracy is None or threat is not None
    require(covered, "threat", "the conditions of robust_accuracy", threat)


def _timestamp(created: str) -> None:
    """A record that cannot be dated cannot be compared."""
    try:
        datetime.fromisoformat(created)
    except ValueError as error:
        raise RunError(f"created: expected an ISO 8601 time, got {created[:40]!r}") from error
