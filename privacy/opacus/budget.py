"""Whether one more step fits into a target epsilon, where steps are not those of the plan."""

from collections import Counter

from privacy.accounting import GaussianSteps, epsilon_of
from privacy.plan import DPPlan

__all__ = ["Budget"]

_Settings = tuple[float, float]
"""noise multiplier, sampling rate"""


class Budget:
    """The target epsilon of a plan, if it has one; a class because it remembers what fits.

    Accounting takes up to seconds, so it is asked for more steps than one: as many ahead as fitted
    last time, and twice as many the next time. Fewer steps cost no more.
    """

    def __init__(self, plan: DPPlan) -> None:
        self._plan = plan
        self._fits: Counter[_Settings] = Counter()
        self._ahead = 1

    def covers(self, *steps: GaussianSteps) -> bool:
        """Whether all these steps together cost at most the target."""
        asked: Counter[_Settings] = Counter()
        for event in steps:
            asked[_settings(event)] += event.steps
        if asked <= self._fits:
            return True
        last = steps[-1]
        while not self._affords(more := asked + Counter({_settings(last): self._ahead - 1})):
            if self._ahead == 1:
                return False
            self._ahead //= 2
        self._fits, self._ahead = more, 2 * self._ahead
        return True

    def _affords(self, steps: Counter[_Settings]) -> bool:
        target, plan = self._plan.target_epsilon, self._plan
        events = [
            GaussianSteps(noise_multiplier=noise, sampling_rate=rate, steps=number)
            for (noise, rate), number in steps.items()
        ]
        return target is None or epsilon_of(events, plan.delta_or_own(None)) <= target


def _settings(event: GaussianSteps) -> _Settings:
    return event.noise_multiplier, event.sampling_rate
