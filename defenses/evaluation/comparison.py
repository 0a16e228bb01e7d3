"""Two models on the same images: is the difference more than chance?

Paired, since images differ far more than models do: two intervals may overlap widely where one
model is better on almost every image on which the two differ.
"""

import math
from dataclasses import dataclass
from typing import final

from defenses.errors import EvaluationError
from defenses.evaluation.report import RobustnessReport, check_report
from defenses.measuring.counting import mcnemar, wilson_interval

__all__ = ["PairedComparison", "compare"]


@final
@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """On how many images two models are right, together and alone.

    Attributes:
        both: Images on which both are right.
        first_only: Only the first.
        second_only: Only the second.
        neither: None of the two.

    Raises:
        EvaluationError: A count is negative, or there is no image.

    Example:
        >>> found = PairedComparison(both=50, first_only=20, second_only=5, neither=25)
        >>> found.samples, found.difference, round(found.p_value, 4)
        (100, 0.15, 0.0041)
    """

    both: int
    first_only: int
    second_only: int
    neither: int

    def __post_init__(self) -> None:
        counts = (self.both, self.first_only, self.second_only, self.neither)
        if min(counts) < 0 or sum(counts) < 1:
            raise EvaluationError(f"expected counts of at least one image, got {counts}")

    @property
    def samples(self) -> int:
        """How many images were compared."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second, in [-1, 1]."""
        return (self.first_only - self.second_only) / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference (Newcombe 1998, for paired data, method 10)."""
        n = self.samples
        one, other = self.both + self.first_only, self.both + self.second_only
        low, high = wilson_interval(one, n)
        other_low, other_high = wilson_interval(other, n)
        below, above = one / n - low, high - one / n
        other_below, other_above = other / n - other_low, other_high - other / n
        together = self._correlation()
        lower = _joined(below, other_above, together)
        upper = _joined(above, other_below, together)
        return max(-1.0, self.difference - lower), min(1.0, self.difference + upper)

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided one: how probable such counts are of equally good models."""
        return mcnemar(self.first_only, self.second_only)

    def _correlation(self) -> float:
        """Phi of the two models' answers, corrected for continuity where it is above 0."""
        one, other = self.both + self.first_only, self.both + self.second_only
        n = self.samples
        margins = one * (n - one) * other * (n - other)
        agreement = float(self.both * self.neither - self.first_only * self.second_only)
        if agreement > 0:
            agreement = max(0.0, agreement - n / 2)
        return agreement / math.sqrt(margins) if margins else 0.0


def compare(first: RobustnessReport, second: RobustnessReport) -> PairedComparison:
    """Compares the worst case of two models, image by image.

    Args:
        first: Of one model.
        second: Of another, on the same images, within the same ball, under the same attacks.

    Raises:
        EvaluationError: The reports differ in one of these: the difference would not be the
            models'.

    Example:
        >>> import torch
        >>> from defenses import ThreatModel, evaluate
        >>> data = [(torch.rand(1, 2, 2), 0) for _ in range(20)]
        >>> one, other = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        ...               for _ in range(2))
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> compare(*(evaluate(model, data, threat, attacks=["fgsm"])
        ...           for model in (one, other))).samples
        20
    """
    for report in (first, second):
        check_report(report)
    parts = {
        "threat models": (first.threat, second.threat),
        "images": ((first.images, first.indices), (second.images, second.indices)),
        "attacks": (first.settings, second.settings),
    }
    different = [name for name, (one, other) in parts.items() if one != other]
    if different:
        raise EvaluationError(
            f"expected two reports on the same images, ball and attacks, got other "
            f"{' and '.join(different)}; evaluate both models with the same data, samples and seed"
        )
    pairs = list(zip(first.worst_case, second.worst_case, strict=True))
    return PairedComparison(
        both=pairs.count((True, True)),
        first_only=pairs.count((True, False)),
        second_only=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _joined(one: float, other: float, correlation: float) -> float:
    """The half-width of a difference of two correlated shares, from their own half-widths."""
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))
