"""What an evaluation found: a report, never a bare number.

A robust accuracy means nothing without the ball, the attacks with their constants, how many
images, which ones, and how wide the interval is. `RobustnessReport` carries them together, as a
value that goes to JSON and back.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, final

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from defenses.attacks.attack import Setting
from defenses.errors import EvaluationError
from defenses.measuring.counting import Answers, check_repeats, draws_interval, share, standing
from defenses.measuring.journal import FiledReport, is_path, write_bytes
from defenses.measuring.verdict import Verdict
from defenses.quantities import shown
from defenses.threat import ThreatModel

__all__ = ["AdversarialExamples", "RobustnessReport", "check_report"]

_SIGNS: Mapping[bool | None, str] = {True: "1", False: "0", None: "-"}
_OUTCOMES = {sign: outcome for outcome, sign in _SIGNS.items()}
# The figures of a file's summary, by the name of the property that computes each.
_SUMMARY = (
    *("samples", "clean_accuracy", "clean_interval", "attack_accuracy", "individual_accuracy"),
    *("tried", "fooled", "attack_intervals", "worst_case_accuracy", "worst_case_interval"),
    *("clean_macro_recall", "worst_case_macro_recall", "clean_recall", "worst_case_recall"),
)


@final
@dataclass(frozen=True, kw_only=True)
class AdversarialExamples:
    """Images with what the attacks made of them.

    Attributes:
        indices: Which images of the data set, int64, [k].
        clean: Images, floating point in the threat model's bounds, [k, channels, ...].
        adversarial: For each the one that fooled the model, or the last that did not.
        labels: True classes, int64, [k].
        predictions: What the model sees in the adversarial images, int64, [k].

    Example:
        >>> import torch
        >>> from defenses import ThreatModel, evaluate
        >>> model, threat = torch.nn.Flatten(), ThreatModel(norm="linf", eps=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.tensor([[[[0.6, 0.5]]]]), torch.tensor([0]))
        >>> settings = {"examples": None, "verdicts": False, "progress": False}
        >>> evaluate(model, data, threat, attacks=["fgsm"], **settings).examples.predictions
        tensor([1])
    """

    indices: Tensor
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    predictions: Tensor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as one safetensors file, named as here; on an `OSError` nothing changes."""
        names = ("indices", "clean", "adversarial", "labels", "predictions")
        kept = {name: getattr(self, name).detach().cpu().clone().contiguous() for name in names}
        write_bytes(path, safetensors_bytes(kept))


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class RobustnessReport(FiledReport):
    """Clean and robust accuracy of a model on a set of images, with everything that they rest on.

    The attacks ran in order, by default each only on images that were still classified correctly:
    the worst case over all attacks needs no more. `exhaustive=True` in `evaluate` tries every
    attack on every image that the model gets right; then `individual_accuracy` is known too.

    Attributes:
        threat: The ball.
        classes: How many the model tells apart.
        indices: Which images of the data set, [n].
        labels: Their true classes, [n].
        predictions: What the model sees in the clean images, [n].
        outcomes: By attack, in order: did image i survive it; None where it was not tried, [n].
        settings: By attack, every constant it ran with.
        seed: What chose the images and every random start.
        batch_size: Images a forward pass.
        exhaustive: Whether every attack was tried on every image that was right at first.
        images: SHA-256 of the images and labels.
        model: SHA-256 of the model's layers with their settings, parameters and buffers.
        data: What the data set is called, where it has a name.
        checks: The settings of the checks; empty where none ran.
        versions: Of the packages involved.
        verdicts: Of the checks on whether the figures can be believed; empty where none ran.
        repeats: Of a model that answers at random, by `"clean"` and attack: which draws were right
            (1 and 0), image by image; empty of others. Every figure is then the mean of shares of
            draws, `predictions` are the most frequent, an image survives while any draw is right,
            and counts as `robust` while most are.
        examples: Up to 8 images with their attacked versions, or as many as were asked for; not
            in `to_dict`.

    Raises:
        EvaluationError: The parts do not fit together.

    Example:
        >>> report = RobustnessReport(
        ...     threat=ThreatModel(norm="linf", eps=0.1), classes=2, indices=(0, 1, 2, 3),
        ...     labels=(0, 0, 1, 1), predictions=(0, 0, 1, 0),
        ...     outcomes={"pgd": (True, False, True, None)}, settings={"pgd": {"steps": 100}},
        ...     seed=0, images="", versions={},
        ... )
        >>> report.clean_accuracy, report.worst_case_accuracy, report.worst_case_recall
        (0.75, 0.5, (0.5, 0.5))
        >>> report.tried["pgd"], report.fooled["pgd"]
        (3, 1)
    """

    _CALLED = "a report"
    _SCHEMA = 3

    threat: ThreatModel
    classes: int
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    outcomes: Mapping[str, tuple[bool | None, ...]]
    settings: Mapping[str, Mapping[str, Setting]]
    seed: int
    images: str
    versions: Mapping[str, str]
    batch_size: int = 256
    exhaustive: bool = False
    model: str = ""
    data: str = ""
    checks: Mapping[str, Setting] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    repeats: Mapping[str, Answers] = field(default_factory=dict)
    examples: AdversarialExamples | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        rows = (self.labels, self.predictions, *self.outcomes.values())
        if not self.indices or any(len(row) != len(self.indices) for row in rows):
            raise EvaluationError(
                f"expected one label, prediction and outcome for each of n >= 1 images, got "
                f"{[len(row) for row in rows]} for {len(self.indices)}"
            )
        if not all(0 <= value < self.classes for value in (*self.labels, *self.predictions)):
            raise EvaluationError(f"labels: expected 0 to {self.classes - 1}, got others")
        if self.outcomes.keys() != self.settings.keys():
            raise EvaluationError(
                f"expected settings for {list(self.outcomes)}, got {list(self.settings)}"
            )
        check_repeats(self.repeats, self.outcomes, len(self.indices))

    def __repr__(self) -> str:
        low, high = self.worst_case_interval
        failed = [verdict.name for verdict in self.verdicts if verdict.outcome == "fail"]
        told = f"failed verdicts: {', '.join(failed) or 'none'}" if self.verdicts else "no verdicts"
        eps, (least, most) = f"{self.threat.norm} eps={self.threat.eps:g}", self.threat.bounds
        return (
            f"RobustnessReport(clean {self.clean_accuracy:.1%}, robust "
            f"{self.worst_case_accuracy:.1%} ({low:.1%} to {high:.1%}) in {eps} in "
            f"[{least:g}, {most:g}]; {self.samples} images; attacks: "
            f"{', '.join(self.outcomes) or 'none'}; {told})"
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
    def robust(self) -> dict[str, tuple[bool, ...]]:
        """By attack, in order: is image i still right after it *and those before it*, [n]."""
        rows = self._standing()
        return {name: tuple(share(row) > 0.5 for row in rows[name]) for name in self.outcomes}

    @property
    def worst_case(self) -> tuple[bool, ...]:
        """Is each image correct, clean and after every attack, [n]."""
        return list(self.robust.values())[-1] if self.outcomes else self.correct

    @property
    def tried(self) -> dict[str, int]:
        """By attack: on how many images it ran."""
        return {name: len(row) - row.count(None) for name, row in self.outcomes.items()}

    @property
    def undrawn(self) -> tuple[str, ...]:
        """Attacks that met one draw at a time of a model that answers at random: too weak."""
        asked = self.settings if self.repeats else ()
        return tuple(name for name in asked if self.settings[name].get("draws", 1) == 1)

    @property
    def fooled(self) -> dict[str, int]:
        """By attack: how many of the images it ran on it fooled."""
        return {name: row.count(False) for name, row in self.outcomes.items()}

    @property
    def individual_accuracy(self) -> dict[str, float | None]:
        """Accuracy under each attack alone; None where it did not try every correct image."""
        right = sum("1" in row for row in self._standing()["clean"])
        alone = {
            name: dict(standing(self.correct, {name: row}, self.repeats))[name]
            for name, row in self.outcomes.items()
        }
        return {
            name: fmean(map(share, alone[name])) if tried == right else None
            for name, tried in self.tried.items()
        }

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images that are classified correctly."""
        return fmean(map(share, self._standing()["clean"]))

    @property
    def attack_accuracy(self) -> dict[str, float]:
        """Share of all images still correct after each attack and those before it."""
        rows = self._standing().items()
        return {name: fmean(map(share, row)) for name, row in rows if name != "clean"}

    @property
    def worst_case_accuracy(self) -> float:
        """Share of all images that no attack fooled: the robust accuracy to quote."""
        return fmean(map(share, self._worst()))

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the clean accuracy, with the variance of the draws."""
        return draws_interval(self._standing()["clean"])

    @property
    def attack_intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson 95 % interval of each attack's accuracy."""
        rows = self._standing().items()
        return {name: draws_interval(row) for name, row in rows if name != "clean"}

    @property
    def worst_case_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the worst-case accuracy."""
        return draws_interval(self._worst())

    @property
    def clean_recall(self) -> tuple[float | None, ...]:
        """Clean recall of each class; None where no image of the class was evaluated."""
        return self._recall(self._standing()["clean"])

    @property
    def worst_case_recall(self) -> tuple[float | None, ...]:
        """Recall of each class under the worst case; None where it was not evaluated."""
        return self._recall(self._worst())

    @property
    def clean_macro_recall(self) -> float:
        """Mean clean recall of the classes that were evaluated."""
        return fmean(value for value in self.clean_recall if value is not None)

    @property
    def worst_case_macro_recall(self) -> float:
        """Mean worst-case recall of the classes that were evaluated."""
        return fmean(value for value in self.worst_case_recall if value is not None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values: what it rests on, and under `summary` its figures.

        Rows of outcomes are strings of 0 (fooled), 1 and - (not tried). The example images are
        left out.
        """
        return {
            "schema": self._SCHEMA,
            "threat": self.threat.to_dict(),
            "classes": self.classes,
            "indices": list(self.indices),
            "labels": list(self.labels),
            "predictions": list(self.predictions),
            "outcomes": {k: "".join(map(_SIGNS.__getitem__, v)) for k, v in self.outcomes.items()},
            "settings": {name: dict(settings) for name, settings in self.settings.items()},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "exhaustive": self.exhaustive,
            "images": self.images,
            "model": self.model,
            "data": self.data,
            "checks": dict(self.checks),
            "versions": dict(self.versions),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "repeats": {name: list(rows) for name, rows in self.repeats.items()},
            "summary": self._summary(),
        }

    @classmethod
    def _built(cls, values: Mapping[str, Any]) -> "RobustnessReport":
        threat = values["threat"]
        low, high = threat["bounds"]
        return cls(
            threat=ThreatModel(norm=threat["norm"], eps=threat["eps"], bounds=(low, high)),
            classes=int(values["classes"]),
            indices=tuple(map(int, values["indices"])),
            labels=tuple(map(int, values["labels"])),
            predictions=tuple(map(int, values["predictions"])),
            outcomes={
                k: tuple(map(_OUTCOMES.__getitem__, v)) for k, v in values["outcomes"].items()
            },
            settings={name: dict(each) for name, each in values["settings"].items()},
            seed=int(values["seed"]),
            batch_size=int(values["batch_size"]),
            exhaustive=bool(values["exhaustive"]),
            images=str(values["images"]),
            model=str(values["model"]),
            data=str(values["data"]),
            checks=dict(values["checks"]),
            versions=dict(values["versions"]),
            verdicts=tuple(map(Verdict.from_dict, values["verdicts"])),
            repeats={k: tuple(map(str, v)) for k, v in values.get("repeats", {}).items()},
        )

    def _standing(self) -> dict[str, Answers]:
        """By `"clean"` and attack, the answers to each image's worst version so far."""
        return dict(standing(self.correct, self.outcomes, self.repeats))

    def _worst(self) -> Answers:
        return list(self._standing().values())[-1]

    def _recall(self, rows: Answers) -> tuple[float | None, ...]:
        hits, counts = [0.0] * self.classes, [0] * self.classes
        for label, row in zip(self.labels, rows, strict=True):
            hits[label] += share(row)
            counts[label] += 1
        return tuple(hit / n if n else None for hit, n in zip(hits, counts, strict=True))

    def _summary(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in _SUMMARY}
        figures["attack_intervals"] = {k: list(v) for k, v in self.attack_intervals.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in figures.items()}


def check_report(report: object) -> None:
    """Refuses what is no report, such as the path of one."""
    if not isinstance(report, RobustnessReport):
        cure = "; give RobustnessReport.load(path)" if is_path(report) else ""
        raise EvaluationError(f"report: expected one of an evaluation, got {shown(report)}{cure}")
