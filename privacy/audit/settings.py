"""Settings of an audit: how much is looked at, and how sure the result is."""

from dataclasses import dataclass

from privacy.quantities import probability, whole

__all__ = ["AuditSettings"]


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
