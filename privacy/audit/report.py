"""The report of an audit: what was compared with what, and whether the gate opens."""

from dataclasses import asdict, dataclass
from typing import Any

from privacy.audit.checks import Check

__all__ = ["AuditReport", "Bound"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound on epsilon.

    Attributes:
        method: How it was found.
        epsilon: No smaller epsilon is true, ...
        confidence: ... with this confidence.

    Example:
        >>> Bound(method="gdp", epsilon=1.0, confidence=0.95).method
        'gdp'
    """

    method: str
    epsilon: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit of a private training found.

    What is compared: one step's release, of which the adversary knows everything but the noise and
    whether one canary was in. The plan claims it to be mu-GDP with mu = 1 / noise_multiplier, that
    is (claimed_epsilon, delta)-private *without* amplification by sampling, since the coins are
    opened. The epsilon of the whole training follows from that of a step by accounting, which an
    audit cannot see.

    Attributes:
        claimed_epsilon: Of one step with its coin opened, at `delta`.
        delta: In (0, 1).
        bounds: Lower bounds on it from the scores.
        checks: The tests that the gate consists of.
        false_alarm: Chance with which the gate fails an honest training, at most.
        noise_multiplier: The plan's.
        max_grad_norm: The plan's.
        batch_size: Expected size of the audited samples.
        samples: Rows of the audited data, canaries among them.
        steps: Steps that were watched.
        canaries: Canaries in the data.
        attack_auroc: Of guessing from its score whether a canary was in.
        in_scores: Of canaries that were in; near 1 plus noise, in units of the clipping norm.
        out_scores: Of canaries that were out: noise.

    Example:
        >>> fields = AuditReport.__dataclass_fields__
        >>> "claimed_epsilon" in fields, "checks" in fields
        (True, True)
    """

    claimed_epsilon: float
    delta: float
    bounds: tuple[Bound, ...]
    checks: tuple[Check, ...]
    false_alarm: float
    noise_multiplier: float
    max_grad_norm: float
    batch_size: int
    samples: int
    steps: int
    canaries: int
    attack_auroc: float
    in_scores: tuple[float, ...]
    out_scores: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed.

        Example:
            >>> isinstance(AuditReport.passed, property)
            True
        """
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not pass.

        Example:
            >>> isinstance(AuditReport.failed, property)
            True
        """
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def verdict(self) -> str:
        """One sentence.

        Example:
            >>> isinstance(AuditReport.verdict, property)
            True
        """
        if self.passed:
            return (
                f"passed: nothing in {self.steps} steps contradicts epsilon "
                f"{self.claimed_epsilon:.3g} a step"
            )
        return f"FAILED: {', '.join(self.failed)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the verdict with it.

        Example:
            >>> callable(AuditReport.to_dict)
            True
        """
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}
