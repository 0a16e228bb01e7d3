"""The ledger: every noised step ever taken, append-only, in plain values for every checkpoint."""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from privacy._ledger_file import LedgerFile
from privacy.accounting import GaussianSteps, checked_events, checked_unit, epsilon_of
from privacy.errors import LedgerError, PlanError
from privacy.plan import DPPlan
from privacy.validate import shown, whole

__all__ = ["Ledger"]

_IN_FILE = "file-"
"""Begins the sessions of a ledger that is kept in a file."""


@dataclass(frozen=True)
class _Entry:
    """Consecutive steps of one session; entries of unbound ledgers have no session."""

    event: GaussianSteps
    session: str = ""

    @property
    def kind(self) -> tuple[str, GaussianSteps]:
        """Neighbours of equal kind are joined."""
        return self.session, replace(self.event, steps=1)


class Ledger:
    """What has been spent so far, as a class because it grows with training and never shrinks.

    A training binds its ledger to its plan: from then on every step must be the plan's. It counts
    its own steps under a session of its own, so that `resume` can tell a state from before (the
    larger count holds) from the state of a training that ran beside it (both counts add up).

    A ledger that is opened from a file is written, and on the disk, before each release: a training
    that is killed, or goes back to an earlier state, has spent what it had spent. Keep the file
    outside of the folder of the states, so that nobody puts both back together:

        ledger = privacy.Ledger.open("spent.jsonl")
        private = privacy.attach(plan, model, optimizer, data, ledger=ledger)
        private.load_state_dict(state)  # where the training goes on

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
        self._entries: list[_Entry] = []
        self._session = ""
        self._plan: DPPlan | None = None
        self._file: LedgerFile | None = None
        for event in checked_events(events):
            self.record(event)

    def __repr__(self) -> str:
        return f"Ledger(steps={self.steps})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._file is not None:
            raise LedgerError(
                f"{self.path}: a ledger in a file cannot be copied or pickled: two would spend "
                "from one file; share the ledger itself, or take what it says, ledger.to_list()"
            )
        return super().__reduce_ex__(protocol)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """A ledger kept in a file, which is made when a training binds it.

        Guarantee: a step is on the disk before `record` returns, and so before it is released. A
        last line that was cut off counts as a step. One training at a time has the file.
        """
        ledger = cls()
        ledger._file = file = LedgerFile(path)
        if file.terms is not None:
            try:
                ledger._entries = [
                    _entry({**file.terms, "steps": steps, "session": session})
                    for session, steps in file.sessions.items()
                ]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise LedgerError(f"{path}: its first line binds it to no plan: {error}") from error
        return ledger

    @property
    def path(self) -> Path | None:
        """The file in which it is kept; None if it is in memory only."""
        return None if self._file is None else self._file.path

    @property
    def locked(self) -> bool:
        """Whether its file is open here, so that no other training can have it."""
        return self._file is not None and self._file.locked

    @property
    def events(self) -> tuple[GaussianSteps, ...]:
        """Everything recorded, equal neighbours joined."""
        joined: list[_Entry] = []
        for entry in self._entries:
            _append(joined, replace(entry, session=""))
        return tuple(entry.event for entry in joined)

    @property
    def steps(self) -> int:
        """How many noised steps were taken."""
        return sum(entry.event.steps for entry in self._entries)

    def bind(self, plan: DPPlan) -> None:
        """Begins a session of `plan`: from now on every step must be the plan's.

        Refused is a ledger with steps of other noise, another rate or another unit, or a file of
        another norm.
        """
        if not isinstance(plan, DPPlan):
            raise PlanError(f"plan: expected a privacy.DPPlan, got {type(plan).__name__}")
        for entry in self._entries:
            _check_kind(entry.event, plan)
        step = plan.event(steps=1)
        terms = {
            "noise_multiplier": step.noise_multiplier,
            "sampling_rate": step.sampling_rate,
            "max_grad_norm": float(plan.max_grad_norm),
            **_unit_of(step),
        }
        if self._file is not None:
            self._file.bind(terms)
        self._session = (_IN_FILE if self._file is not None else "") + secrets.token_hex(8)
        self._plan = plan

    def record(self, event: GaussianSteps) -> None:
        """Appends what is about to be spent; to the file first, where there is one."""
        checked_events([event])
        if self._plan is not None:
            _check_kind(event, self._plan)
        if self._file is not None:
            if self._plan is None:
                raise LedgerError(f"{self.path}: expected bind(plan) before the first step")
            own = sum(e.event.steps for e in self._entries if e.session == self._session)
            self._file.append(self._session, own + event.steps)
        _append(self._entries, _Entry(event, self._session))

    def resume(self, rows: object, *, most: int | None = None) -> None:
        """Takes in what a state has spent, as its `to_list` said: of each session the larger count.

        Guarantee: where this raises, nothing changed; what was spent never falls. Refused are steps
        of another plan, more than `most` in all, fewer than were taken here where the ledger has no
        file, and a state whose own ledger was kept in a file of which this one knows less.
        """
        if self._plan is None:
            raise LedgerError("ledger: expected bind(plan) before resume")
        state = Ledger.from_list(rows)
        for event in state.events:
            _check_kind(event, self._plan)
        if self._file is None and state.steps < self.steps:
            raise PlanError(
                f"ledger: {self.steps} steps were taken here, the checkpoint knows {state.steps}: "
                "epsilon never falls"
            )
        mine, theirs = self._by_session(), state._by_session()
        self._check_file(mine, theirs)
        merged = {name: max(mine.get(name, 0), theirs.get(name, 0)) for name in {**theirs, **mine}}
        if most is not None and sum(merged.values()) > whole("most", most):
            raise PlanError(
                f"ledger: the checkpoint knows {state.steps} steps, {self.steps} were taken here, "
                f"together {sum(merged.values())}, and the plan has {most}; this is no state of it"
            )
        if self._file is not None:
            for name in theirs:
                if merged[name] > mine.get(name, 0):
                    self._file.append(name, merged[name])
        self._entries = [_Entry(self._plan.event(steps), name) for name, steps in merged.items()]

    def epsilon(self, delta: float) -> float:
        """What everything recorded costs together, at `delta`."""
        return epsilon_of(self.events, delta)

    def to_list(self) -> list[dict[str, Any]]:
        """The events as plain JSON values, for a checkpoint."""
        return [
            {
                "noise_multiplier": entry.event.noise_multiplier,
                "sampling_rate": entry.event.sampling_rate,
                "steps": entry.event.steps,
                **_unit_of(entry.event),
                **({"session": entry.session} if entry.session else {}),
            }
            for entry in self._entries
        ]

    @classmethod
    def from_list(cls, rows: object) -> "Ledger":
        """Reads back what `to_list` wrote; refuses all else, for nothing is assumed to be free."""
        ledger = cls()
        try:
            if not isinstance(rows, list | tuple):
                raise TypeError(f"got {type(rows).__name__} in the place of the rows")
            for row in rows:
                _append(ledger._entries, _entry(row))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(
                f"ledger: expected noise_multiplier, sampling_rate and steps in each row: {error}"
            ) from error
        return ledger

    def close(self) -> None:
        """Releases the file for another training; this one cannot spend any more."""
        if self._file is not None:
            self._file.close()

    def _check_file(self, mine: Mapping[str, int], theirs: Mapping[str, int]) -> None:
        """Refuses a file that knows less than the state: it is older, or another training's."""
        more = any(
            steps > mine.get(name, 0) for name, steps in theirs.items() if name.startswith(_IN_FILE)
        )
        if more:
            raise LedgerError(
                f"ledger: what the checkpoint has spent was kept in a file, and {self.path or 'no'}"
                f"{'' if self.path else ' file'} knows less of it; open that ledger's own file, as "
                "it was left, with Ledger.open"
            )

    def _by_session(self) -> dict[str, int]:
        """Steps by session, in the order in which they began."""
        steps: dict[str, int] = {}
        for entry in self._entries:
            steps[entry.session] = steps.get(entry.session, 0) + entry.event.steps
        return steps


def _append(entries: list[_Entry], entry: _Entry) -> None:
    """Adds an entry, joined with the last one where both are of one kind."""
    if entries and entries[-1].kind == entry.kind:
        steps = entries[-1].event.steps + entry.event.steps
        entries[-1] = replace(entry, event=replace(entry.event, steps=steps))
    else:
        entries.append(entry)


def _entry(row: Mapping[str, Any]) -> _Entry:
    """A row of `to_list`; exact types, since True is no step and "1" no noise."""
    numbers = row["noise_multiplier"], row["sampling_rate"]
    steps, session = row["steps"], row.get("session", "")
    if type(steps) is not int or any(type(number) not in (int, float) for number in numbers):
        raise TypeError(f"got {shown(dict(row))}")
    if not isinstance(session, str):
        raise TypeError(f"got the session {shown(session)}")
    noise, rate = map(float, numbers)
    unit = checked_unit(row.get("unit", "example"))
    event = GaussianSteps(noise_multiplier=noise, sampling_rate=rate, steps=steps, unit=unit)
    return _Entry(event, session)


def _unit_of(event: GaussianSteps) -> dict[str, str]:
    """The unit of a row or a file; without one it is of examples, as before there were others."""
    return {} if event.unit == "example" else {"unit": event.unit}


def _check_kind(event: GaussianSteps, plan: DPPlan) -> None:
    """Refuses steps that the plan does not take."""
    own = plan.event(steps=1)
    if event.unit != own.unit:
        raise PlanError(
            f"ledger: expected steps that protect one {own.unit}, as the plan's, got steps that "
            f"protect one {event.unit}: there is no epsilon of both; give each unit its own ledger"
        )
    if (event.noise_multiplier, event.sampling_rate) != (own.noise_multiplier, own.sampling_rate):
        raise PlanError(
            f"ledger: expected steps of noise multiplier {own.noise_multiplier!r} and sampling "
            f"rate {own.sampling_rate!r}, the plan's, got {event.noise_multiplier!r} and "
            f"{event.sampling_rate!r}: what such steps cost is not what this plan's did"
        )
