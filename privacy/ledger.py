"""The ledger: every noised step ever taken, append-only, in plain values for every checkpoint."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from privacy.accounting import GaussianSteps, epsilon_of
from privacy.errors import PlanError

__all__ = ["Ledger"]


class Ledger:
    """What has been spent so far, as a class because it grows with training and never shrinks.

    Args:
        events: What had been spent before, for a training that goes on.

    Example:
        >>> ledger = Ledger()
        >>> for _ in range(3):
        ...     ledger.record(GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=1))
        >>> ledger.steps, len(ledger.events)
        (3, 1)
        >>> Ledger.from_list(ledger.to_list()).events == ledger.events
        True
    """

    def __init__(self, events: Sequence[GaussianSteps] = ()) -> None:
        self._events: list[GaussianSteps] = []
        for event in events:
            self.record(event)

    @property
    def events(self) -> tuple[GaussianSteps, ...]:
        """Everything recorded, equal neighbours joined.

        Example:
            >>> Ledger().events
            ()
        """
        return tuple(self._events)

    @property
    def steps(self) -> int:
        """How many noised steps were taken.

        Example:
            >>> Ledger([GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=7)]).steps
            7
        """
        return sum(event.steps for event in self._events)

    def record(self, event: GaussianSteps) -> None:
        """Appends what was just spent.

        Example:
            >>> ledger = Ledger()
            >>> ledger.record(GaussianSteps(noise_multiplier=1.0, sampling_rate=0.1, steps=1))
            >>> ledger.steps
            1
        """
        last = self._events[-1] if self._events else None
        if last and (last.noise_multiplier, last.sampling_rate) == (
            event.noise_multiplier,
            event.sampling_rate,
        ):
            self._events[-1] = GaussianSteps(
                noise_multiplier=event.noise_multiplier,
                sampling_rate=event.sampling_rate,
                steps=last.steps + event.steps,
            )
        else:
            self._events.append(event)

    def epsilon(self, delta: float) -> float:
        """What everything recorded costs together, at `delta`.

        Example:
            >>> Ledger().epsilon(1e-5)
            0.0
        """
        return epsilon_of(self._events, delta)

    def to_list(self) -> list[dict[str, Any]]:
        """The events as plain JSON values.

        Example:
            >>> Ledger().to_list()
            []
        """
        return [
            {
                "noise_multiplier": e.noise_multiplier,
                "sampling_rate": e.sampling_rate,
                "steps": e.steps,
            }
            for e in self._events
        ]

    @classmethod
    def from_list(cls, rows: Sequence[Mapping[str, Any]]) -> "Ledger":
        """Reads back what `to_list` wrote.

        Raises:
            PlanError: A row is not a ledger's row; nothing is assumed to be free.

        Example:
            >>> row = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 2}
            >>> Ledger.from_list([row]).steps
            2
        """
        try:
            return cls(
                [
                    GaussianSteps(
                        noise_multiplier=float(row["noise_multiplier"]),
                        sampling_rate=float(row["sampling_rate"]),
                        steps=operator.index(row["steps"]),
                    )
                    for row in rows
                ]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"ledger: expected noise_multiplier, sampling_rate and steps in each row: {error}"
            ) from error
