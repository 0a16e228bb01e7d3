"""What `secure-cnn evaluate` prints of its findings, and what `--require` demands of them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import typer
from rich.table import Table
from rich.text import Text

import defenses
from secure_cnn.evaluate import ClassificationReport

__all__ = ["Requirement", "attacks", "bounds", "certificates", "read_requirements", "table"]
__all__ += ["verdicts"]


def table(found: ClassificationReport, robust: defenses.RobustnessReport | None) -> Table:
    """Clean and robust figures, overall and per class."""
    table = Table()
    table.add_column("")
    table.add_column("clean", justify="right")
    recalls = [found.recall]
    if robust is not None:
        threat = robust.threat
        title = (
            f"{' and '.join(robust.robust)}, {threat.norm} {threat.eps:g}, {robust.samples} images"
        )
        table.add_column(title, justify="right")
        recalls.append(robust.worst_case_recall)
    low, high = robust.worst_case_interval if robust else (0.0, 0.0)
    table.add_row(
        "accuracy",
        _percent(found.accuracy),
        *(
            [f"{_percent(robust.worst_case_accuracy)} ({100 * low:.1f}-{100 * high:.1f})"]
            if robust
            else []
        ),
    )
    table.add_row(
        "macro recall",
        _percent(found.macro_recall),
        *([_percent(robust.worst_case_macro_recall)] if robust else []),
        end_section=True,
    )
    for index, name in enumerate(found.classes):
        table.add_row(f"recall of {name}", *(_percent(recall[index]) for recall in recalls))
    return table


def attacks(robust: defenses.RobustnessReport) -> Table:
    """How many images each attack was tried on and fooled, and what is left after it."""
    table = Table()
    for name in ("attack", "tried on", "fooled", "alone", "after it and those before"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for name, accuracy in robust.attack_accuracy.items():
        low, high = robust.attack_intervals[name]
        table.add_row(
            name,
            str(robust.tried[name]),
            str(robust.fooled[name]),
            _percent(robust.individual_accuracy[name]),
            f"{_percent(accuracy)} ({100 * low:.1f}-{100 * high:.1f})",
        )
    return table


def verdicts(robust: defenses.RobustnessReport) -> Table:
    """Each check with its outcome and what was found."""
    table = Table()
    for name in ("what should hold", "verdict", "found"):
        table.add_column(name)
    styles = {"pass": "green", "fail": "bold red", "not checked": "dim"}
    for each in robust.verdicts:
        words = "FAIL" if each.outcome == "fail" else each.outcome
        table.add_row(each.name, Text(words, styles[each.outcome]), each.sentence)
    return table


def certificates(proven: defenses.CertificationReport) -> Table:
    """Certified accuracy at a few radii, with the conditions of the proof."""
    smoothing, points = proven.smoothing, proven.curve(points=7)
    return _certified(
        f"proven by smoothing, sigma {smoothing.sigma:g}, {smoothing.samples} samples, "
        f"alpha {smoothing.alpha:g}, {len(proven.indices)} images",
        points,
    )


def bounds(proven: defenses.LipschitzReport) -> Table:
    """Accuracy that is certified by a Lipschitz constant, at a few radii."""
    return _certified(
        f"proven by the Lipschitz constant of its features, {proven.constant:.3g}, "
        f"{len(proven.labels)} images",
        [proven.certified(radius) for radius in _RADII],
    )


def _certified(title: str, points: Iterable[defenses.CertifiedPoint]) -> Table:
    """Certified accuracy at some radii."""
    table = Table(title=title)
    for name in ("l2 radius", "certified accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    for point in points:
        low, high = point.interval
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        table.add_row(f"{point.radius:.2f}", _percent(point.accuracy), interval)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_RADII = (0.1, 0.25, 0.5, 1.0)
_FIGURES = ("clean", "robust", "robust-low")
_PATTERN = re.compile(rf"({'|'.join(_FIGURES)})\s*>=\s*(\d+(?:\.\d*)?|\.\d+)(%?)")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One demand, as it was given: which share, in [0, 1], must be how large.

    Without a figure it demands that no verdict failed.
    """

    text: str
    figure: str | None
    least: float

    @property
    def attacked(self) -> bool:
        """Whether it is about images under attack."""
        return self.figure != "clean"

    def missed(self, clean: float, robust: defenses.RobustnessReport | None) -> str | None:
        """What is missing, in words; None where the demand is met."""
        if self.figure is None:
            return self._failed_verdicts(robust)
        found = {"clean": clean}
        if robust is not None:
            low, _ = robust.worst_case_interval
            found |= {"robust": robust.worst_case_accuracy, "robust-low": low}
        return self._too_small(found)

    def _too_small(self, found: Mapping[str, float]) -> str | None:
        """The figure, where it was not measured or is below the demand."""
        assert self.figure is not None, "verdicts are no figure"
        if self.figure not in found:
            return f"missed: {self.text}: not measured"
        value = found[self.figure]
        return None if value >= self.least else f"missed: {self.text}: got {value:.4f}"

    def _failed_verdicts(self, robust: defenses.RobustnessReport | None) -> str | None:
        """The names of the verdicts that failed; those not checked are no failure."""
        if robust is None or not robust.verdicts:
            return f"missed: {self.text}: not checked"
        failed = [each.name for each in robust.verdicts if each.outcome == "fail"]
        return f"missed: {self.text}: failed: {', '.join(failed)}" if failed else None


def read_requirements(texts: list[str]) -> list[Requirement]:
    """The demands in `--require`."""
    return [_read(text) for text in texts]


def _read(text: str) -> Requirement:
    """One demand."""
    if text.strip() == "verdicts":
        return Requirement(text=text, figure=None, least=1.0)
    match = _PATTERN.fullmatch(text.strip())
    least = float(match[2]) / (100 if match[3] else 1) if match else -1.0
    if match is None or not 0 <= least <= 1:
        raise typer.BadParameter(
            f"expected {', '.join(f'{name}>=SHARE' for name in _FIGURES)} with a share in [0, 1], "
            f"or verdicts; got {text!r}",
            param_hint="--require",
        )
    return Requirement(text=text, figure=match[1], least=least)
