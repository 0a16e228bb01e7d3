"""What an evaluation found: a report, never a bare number.

A robust accuracy means nothing without the ball, the attacks with their constants, how many
images, which ones, and how wide the interval is. `RobustnessReport` carries them together, as a
value that goes to JSON and back.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from defenses.attacks import Setting
from defenses.errors import DefenseError, EvaluationError
from defenses.threat import ThreatModel

__all__ = ["AdversarialExamples", "RobustnessReport", "wilson_interval"]

_SCHEMA = 1


@final
@dataclass(frozen=True, kw_only=True)
class AdversarialExamples:
    """A few images with what the attacks made of them.

    Attributes:
        clean: Images, floating point in the threat model's bounds, [k, channels, height, width].
        adversarial: For each the one that fooled the model, or the last that did not.
        labels: True classes, int64, [k].
        predictions: What the model sees in the adversarial images, int64, [k].

    Example:
        >>> AdversarialExamples.__dataclass_fields__.keys()
        dict_keys(['clean', 'adversarial', 'labels', 'predictions'])
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    predictions: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class RobustnessReport:
    """Clean and robust accuracy of a model on a set of images, with everything that they rest on.

    The attacks ran in order, each only on images that were still classified correctly. So a row
    of `robust` is the worst case of that attack *and those before it*, and the last row is the
    worst case of all.

    Attributes:
        threat: The ball.
        classes: How many the model tells apart.
        indices: Which images of the data set, [n].
        labels: Their true classes, [n].
        predictions: What the model sees in the clean images, [n].
        robust: By attack, in order: is image i still right after it and those before it, [n].
        settings: By attack, every constant it ran with.
        seed: What chose the images and every random start.
        versions: Of the packages involved.
        examples: Up to 8 images with their attacked versions; not in `to_dict`.

    Raises:
        EvaluationError: The parts do not fit together.

    Example:
        >>> report = RobustnessReport(
        ...     threat=ThreatModel(norm="linf", eps=0.1), classes=2, indices=(0, 1, 2, 3),
        ...     labels=(0, 0, 1, 1), predictions=(0, 0, 1, 0),
        ...     robust={"pgd": (True, False, True, False)}, settings={"pgd": {"steps": 100}},
        ...     seed=0, versions={},
        ... )
        >>> report.clean_accuracy, report.worst_case_accuracy, report.worst_case_recall
        (0.75, 0.5, (0.5, 0.5))
    """

    threat: ThreatModel
    classes: int
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    robust: Mapping[str, tuple[bool, ...]]
    settings: Mapping[str, Mapping[str, Setting]]
    seed: int
    versions: Mapping[str, str]
    examples: AdversarialExamples | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        rows = (self.labels, self.predictions, *self.robust.values())
        if not self.indices or any(len(row) != len(self.indices) for row in rows):
            raise EvaluationError(
                f"expected one label, prediction and verdict for each of n >= 1 images, got "
                f"{[len(row) for row in rows]} for {len(self.indices)}"
            )
        if not all(0 <= value < self.classes for value in (*self.labels, *self.predictions)):
            raise EvaluationError(f"labels: expected 0 to {self.classes - 1}, got others")
        if self.robust.keys() != self.settings.keys():
            raise EvaluationError(
                f"expected settings for {list(self.robust)}, got {list(self.settings)}"
            )

    @property
    def samples(self) -> int:
        """How many images were evaluated."""
        return len(self.indices)

    @property
    def correct(self) -> tuple[bool, ...]:
        """Is each clean image classified correctly, [n]."""
        return tuple(a == b for a, b in zip(self.predictions, self.labels, strict=True))

    @property
    def worst_case(self) -> tuple[bool, ...]:
        """Is each image correct, clean and after every attack, [n]."""
        return list(self.robust.values())[-1] if self.robust else self.correct

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images that are classified correctly."""
        return _mean(self.correct)

    @property
    def attack_accuracy(self) -> dict[str, float]:
        """Share of all images still correct after each attack and those before it."""
        return {name: _mean(row) for name, row in self.robust.items()}

    @property
    def worst_case_accuracy(self) -> float:
        """Share of all images that no attack fooled: the robust accuracy to quote."""
        return _mean(self.worst_case)

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the clean accuracy."""
        return wilson_interval(sum(self.correct), self.samples)

    @property
    def attack_intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson 95 % interval of each attack's accuracy."""
        return {name: wilson_interval(sum(row), self.samples) for name, row in self.robust.items()}

    @property
    def worst_case_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the worst-case accuracy."""
        return wilson_interval(sum(self.worst_case), self.samples)

    @property
    def clean_recall(self) -> tuple[float | None, ...]:
        """Clean recall of each class; None where no image of the class was evaluated."""
        return self._recall(self.correct)

    @property
    def worst_case_recall(self) -> tuple[float | None, ...]:
        """Recall of each class under the worst case; None where it was not evaluated."""
        return self._recall(self.worst_case)

    @property
    def clean_macro_recall(self) -> float:
        """Mean clean recall of the classes that were evaluated."""
        return _mean([value for value in self.clean_recall if value is not None])

    @property
    def worst_case_macro_recall(self) -> float:
        """Mean worst-case recall of the classes that were evaluated."""
        return _mean([value for value in self.worst_case_recall if value is not None])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values: what it rests on, and under `summary` its figures.

        Rows of verdicts are strings of 0 and 1. The example images are left out.

        Example:
            >>> sorted(RobustnessReport(
            ...     threat=ThreatModel(norm="l2", eps=0.5), classes=2, indices=(7,), labels=(1,),
            ...     predictions=(1,), robust={}, settings={}, seed=0, versions={},
            ... ).to_dict()["threat"].items())
            [('bounds', [0.0, 1.0]), ('eps', 0.5), ('norm', 'l2')]
        """
        threat = {"norm": self.threat.norm, "eps": self.threat.eps}
        return {
            "schema": _SCHEMA,
            "threat": {**threat, "bounds": list(self.threat.bounds)},
            "classes": self.classes,
            "indices": list(self.indices),
            "labels": list(self.labels),
            "predictions": list(self.predictions),
            "robust": {
                name: "".join("01"[verdict] for verdict in row) for name, row in self.robust.items()
            },
            "settings": {name: dict(settings) for name, settings in self.settings.items()},
            "seed": self.seed,
            "versions": dict(self.versions),
            "summary": self._summary(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RobustnessReport":
        """The report that `to_dict` described, without the example images.

        Raises:
            EvaluationError: The values do not describe a report.

        Example:
            >>> RobustnessReport.from_dict({"schema": 2})
            Traceback (most recent call last):
            ...
            defenses.errors.EvaluationError: expected a report of schema 1, got 2
        """
        if values.get("schema") != _SCHEMA:
            raise EvaluationError(
                f"expected a report of schema {_SCHEMA}, got {values.get('schema')!r}"
            )
        try:
            threat = values["threat"]
            low, high = threat["bounds"]
            return cls(
                threat=ThreatModel(norm=threat["norm"], eps=threat["eps"], bounds=(low, high)),
                classes=int(values["classes"]),
                indices=tuple(map(int, values["indices"])),
                labels=tuple(map(int, values["labels"])),
                predictions=tuple(map(int, values["predictions"])),
                robust={
                    name: tuple(digit == "1" for digit in row)
                    for name, row in values["robust"].items()
                },
                settings={name: dict(each) for name, each in values["settings"].items()},
                seed=int(values["seed"]),
                versions=dict(values["versions"]),
            )
        except DefenseError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(f"expected the values of a report: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as JSON, whole or not at all.

        Raises:
            OSError: The folder cannot be written to; a file already there is left as it was.

        Example:
            >>> import tempfile
            >>> report = RobustnessReport(
            ...     threat=ThreatModel(norm="l2", eps=0.5), classes=2, indices=(7,), labels=(1,),
            ...     predictions=(1,), robust={}, settings={}, seed=0, versions={},
            ... )
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.save(Path(folder) / "robustness.json")
            ...     saved = json.loads((Path(folder) / "robustness.json").read_text())
            >>> RobustnessReport.from_dict(saved) == report
            True
        """
        target = Path(path)
        text = json.dumps(self.to_dict(), allow_nan=False) + "\n"
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _recall(self, correct: Sequence[bool]) -> tuple[float | None, ...]:
        """Share of each class's images that are correct."""
        hits, counts = [0] * self.classes, [0] * self.classes
        for label, right in zip(self.labels, correct, strict=True):
            hits[label] += right
            counts[label] += 1
        return tuple(hit / n if n else None for hit, n in zip(hits, counts, strict=True))

    def _summary(self) -> dict[str, Any]:
        """Every figure that follows from the verdicts."""
        return {
            "samples": self.samples,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(self.clean_interval),
            "attack_accuracy": self.attack_accuracy,
            "attack_intervals": {k: list(v) for k, v in self.attack_intervals.items()},
            "worst_case_accuracy": self.worst_case_accuracy,
            "worst_case_interval": list(self.worst_case_interval),
            "clean_macro_recall": self.clean_macro_recall,
            "worst_case_macro_recall": self.worst_case_macro_recall,
            "clean_recall": list(self.clean_recall),
            "worst_case_recall": list(self.worst_case_recall),
        }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), sound near 0 and 1 too.

    Args:
        successes: 0 <= successes <= trials.
        trials: At least 1.

    Returns:
        Its ends, 0 <= low <= successes / trials <= high <= 1.

    Raises:
        EvaluationError: The counts are out of range.

    Example:
        >>> low, high = wilson_interval(500, 1000)
        >>> round(low, 3), round(high, 3)
        (0.469, 0.531)
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise EvaluationError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    z, share = 1.959963984540054, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)
