"""What `--require` demands of an evaluation: `robust>=0.4`, `clean>=0.8`, `verdicts`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import typer

import defenses

__all__ = ["Requirement", "read_requirements"]

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
