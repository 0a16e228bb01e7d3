"""A verdict: one thing that must hold if a robust accuracy is to be believed, and whether it does.

Plain values. What is checked, and how, is in `defenses.checks`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final, get_args

from defenses.errors import EvaluationError
from defenses.measuring.counting import wilson_interval
from defenses.quantities import shown

__all__ = ["CurvePoint", "Finding", "Outcome", "Verdict"]

Outcome = Literal["pass", "fail", "not checked"]


@final
@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """How many images are still classified correctly at one radius.

    Attributes:
        eps: The radius, at least 0.
        correct: Images that are right and that the attack did not fool.
        samples: Images in all.

    Example:
        >>> CurvePoint(eps=0.1, correct=30, samples=40).accuracy
        0.75
    """

    eps: float
    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Share of all images."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.samples)


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One check with its outcome.

    Attributes:
        name: What should hold, in a few words.
        outcome: `"pass"`, `"fail"` or `"not checked"`.
        figure: What was measured, mostly a share of images; None where nothing was.
        sentence: What was found, and what it means.
        curve: The accuracy curve, from the check that measures one.

    Raises:
        EvaluationError: The outcome is none of the three.

    Example:
        >>> verdict = Verdict(name="sky is blue", outcome="pass", figure=1.0, sentence="It is.")
        >>> Verdict.from_dict(verdict.to_dict()) == verdict
        True
    """

    name: str
    outcome: Outcome
    figure: float | None
    sentence: str
    curve: tuple[CurvePoint, ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            expected = ", ".join(map(repr, get_args(Outcome)))
            raise EvaluationError(f"outcome: expected one of {expected}, got {shown(self.outcome)}")

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-able values."""
        curve = [
            {**asdict(point), "accuracy": point.accuracy, "interval": list(point.interval)}
            for point in self.curve
        ]
        return {**asdict(self), "curve": curve}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """The verdict that `to_dict` described."""
        try:
            figure = values["figure"]
            return cls(
                name=str(values["name"]),
                outcome=values["outcome"],
                figure=None if figure is None else float(figure),
                sentence=str(values["sentence"]),
                curve=tuple(
                    CurvePoint(
                        eps=float(each["eps"]),
                        correct=int(each["correct"]),
                        samples=int(each["samples"]),
                    )
                    for each in values["curve"]
                ),
            )
        except EvaluationError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(f"expected the values of a verdict: {error!r}") from error


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found; with the name of the check it is a verdict."""

    outcome: Outcome
    sentence: str
    figure: float | None = None
    curve: tuple[CurvePoint, ...] = ()

    @classmethod
    def passed(cls, found: str, figure: float) -> "Finding":
        """What should hold does."""
        return cls(outcome="pass", sentence=f"{found}.", figure=figure)

    @classmethod
    def failed(cls, found: str, meaning: str, figure: float) -> "Finding":
        """What should hold does not; and what that means."""
        return cls(outcome="fail", sentence=f"{found}: {meaning}.", figure=figure)

    @classmethod
    def not_checked(cls, reason: str) -> "Finding":
        """Whether it holds is unknown; and why."""
        return cls(outcome="not checked", sentence=f"{reason}.")

    def named(self, name: str) -> Verdict:
        """This finding as the verdict of a check."""
        return Verdict(name=name, **vars(self))
