"""What an audit is asked and what it answers: its settings, checks, bounds and report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from privacy.statistics import smallest
from privacy.validate import probability, whole

__all__ = ["AuditReport", "AuditSettings", "Bound", "Check", "at_most", "joint"]


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How much is looked at, and how sure the result is.

    Attributes:
        canaries: Canaries in the data, at least 2.
        steps: Steps to watch, at least 2: as many with the plan's noise, with hardly any, and at a
            low sampling rate. What happens once in `steps` is seen about as often as not.
        largest_batch: The audited sample is no larger than this, for speed: a step's privacy does
            not depend on it.
        confidence: Of each bound that is reported, in (0, 1).
        false_alarm: Chance that the gate fails an honest training, shared by all its checks.
        seed: Chooses the rows and the directions of the canaries; no secret.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> AuditSettings(steps=20).canaries
        32
    """

    canaries: int = 32
    steps: int = 100
    largest_batch: int = 64
    confidence: float = 0.95
    false_alarm: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("canaries", "steps", "largest_batch"):
            whole(name, getattr(self, name), least=2)
        for name in ("confidence", "false_alarm"):
            probability(name, getattr(self, name))
        whole("seed", self.seed, least=0)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test that the gate consists of.

    Attributes:
        name: What is tested.
        passed: Whether the training may be what the plan says.
        measured: What was found.
        limit: What it was compared with.
        says: The comparison in words.

    Example:
        >>> Check(name="noise", passed=True, measured=1.0, limit=0.99, says="...").passed
        True
    """

    name: str
    passed: bool
    measured: float
    limit: float
    says: str


def at_most(name: str, measured: float, limit: float, *, says: str) -> Check:
    """A check that passes where what was measured is at most the limit; not a number fails."""
    return Check(name=name, passed=measured <= limit, measured=measured, limit=limit, says=says)


def joint(name: str, tests: Mapping[str, float], *, error: float, says: str) -> Check:
    """One check of several tests' p-values, which share its error equally."""
    least = min(tests, key=lambda test: tests[test])
    p_value = smallest(list(tests.values()))
    says = f"{says}; least likely: {least}"
    return Check(name=name, passed=p_value >= error, measured=p_value, limit=error, says=says)


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
        unseen: What none of them can see, a sentence each.
        false_alarm: Chance with which the gate fails an honest training, at most.
        noise_multiplier: The plan's.
        max_grad_norm: The plan's.
        batch_size: Expected size of the audited samples.
        samples: Rows of the audited data, canaries among them.
        steps: Steps that were watched with the plan's noise.
        quiet_steps: Steps that were watched with hardly any noise, to see the sum itself.
        sampling_rates: At which samples were watched.
        canaries: Canaries in the data.
        attack_auroc: Of guessing from its score whether a canary was in.
        in_scores: Of canaries that were in; near 1 plus noise, in units of the clipping norm.
        out_scores: Of canaries that were out: noise.
        unit: What a canary is, and batch size and samples count: an example, or a person with all
            images of theirs.
    """

    claimed_epsilon: float
    delta: float
    bounds: tuple[Bound, ...]
    checks: tuple[Check, ...]
    unseen: tuple[str, ...]
    false_alarm: float
    noise_multiplier: float
    max_grad_norm: float
    batch_size: int
    samples: int
    steps: int
    quiet_steps: int
    sampling_rates: tuple[float, ...]
    canaries: int
    attack_auroc: float
    in_scores: tuple[float, ...]
    out_scores: tuple[float, ...]
    unit: str = "example"

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not pass."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.passed:
            return (
                f"passed: nothing in {self.steps} steps contradicts epsilon "
                f"{self.claimed_epsilon:.3g} a step"
            )
        return f"FAILED: {', '.join(self.failed)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the verdict with it."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}
