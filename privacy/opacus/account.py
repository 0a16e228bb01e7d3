"""The engine's account, one of Opacus' accountants whose history can only grow; loaded ledgers."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opacus.accountants import PRVAccountant, RDPAccountant
from torch import Tensor

from privacy._opacus import Event
from privacy.accounting import GaussianSteps, epsilon_of
from privacy.errors import PlanError
from privacy.ledger import Ledger
from privacy.plan import DPPlan

__all__ = ["ACCOUNTS", "Account", "PRVAccount", "RDPAccount", "checked_ledger"]

_Settings = tuple[float, float]
"""noise multiplier, sampling rate"""


class Account:
    """What an engine has spent: Opacus' interface, over a history that only grows.

    Guarantee: for each noise multiplier and rate, the steps in `history` never become fewer,
    whatever is assigned, loaded, or done to the list itself; the larger number is charged.
    """

    def __init__(self) -> None:
        self._history: list[Event] = []
        self._floor: dict[_Settings, int] = {}
        self._engine: list[_Settings] = []
        self._unfitted: list[Event] = []
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        if name != "history" and not name.startswith("_"):
            raise PlanError(
                f"accountant.{name}: nothing here follows it; write to `history`, or call step() "
                "and load_state_dict()"
            )
        super().__setattr__(name, value)

    @property
    def history(self) -> list[Event]:
        """(Noise multiplier, sampling rate, steps) of everything spent.

        It may be assigned or changed in place, and is checked again at the next look.
        """
        self._check_history()
        return self._history

    @history.setter
    def history(self, history: Iterable[Event]) -> None:
        before = self._history
        self._history = history if isinstance(history, list) else list(history)
        try:
            self._check_history()
        except PlanError:
            self._history = before
            raise

    @property
    def events(self) -> list[GaussianSteps]:
        """The history as events of `privacy.accounting`."""
        return [
            GaussianSteps(noise_multiplier=noise, sampling_rate=rate, steps=steps)
            for noise, rate, steps in self.history
        ]

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Writes one noised step down."""
        history = self.history
        new = _checked((noise_multiplier, sample_rate, 1))
        if history and history[-1][:2] == new[:2]:
            history[-1] = (*new[:2], history[-1][2] + 1)
        else:
            history.append(new)
        self._check_history()

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """As in Opacus; a step of an optimizer that this account belongs to is charged already."""

        def charge(optimizer: Any) -> None:
            if getattr(optimizer, "_account", None) is not self:
                self.step(
                    noise_multiplier=optimizer.noise_multiplier,
                    sample_rate=sample_rate * optimizer.accumulated_iterations,
                )

        return charge

    def cover(self, events: Iterable[GaussianSteps]) -> None:
        """Charges at least these steps, even if fewer are written down."""
        for event in events:
            key = (event.noise_multiplier, event.sampling_rate)
            self._floor[key] = max(self._floor.get(key, 0), event.steps)
        self._check_history()

    def expect(self, *, noise_multiplier: float, sampling_rate: float) -> None:
        """Notes with what the engine trains: any loaded history must fit one such pair."""
        self._engine.append((noise_multiplier, sampling_rate))
        try:
            self._check_fit(self._unfitted)
        except PlanError:
            self._engine.pop()
            raise
        self._unfitted = []

    def get_epsilon(self, delta: float, *args: Any, **settings: Any) -> float:
        """The tighter of the accountants' bounds at `delta`; it has no further settings."""
        if args or settings:
            raise PlanError(
                f"accountant.get_epsilon: {', '.join(settings) or 'a second argument'}: settings "
                "of one accountant, and the tighter of two is reported here; give delta only"
            )
        return epsilon_of(self.events, delta)

    def state_dict(self, destination: Any = None) -> Any:
        """History and mechanism, as Opacus writes them."""
        self._check_history()
        inherited: Any = super()
        return inherited.state_dict(destination)

    def load_state_dict(self, state_dict: Any) -> None:
        """Adopts a history; if it says less than was spent here, the larger is charged."""
        ours: Any = self
        mechanism = ours.mechanism()
        if not isinstance(state_dict, Mapping) or not {"history", "mechanism"} <= set(state_dict):
            raise PlanError(
                "accountant state: expected history and mechanism, as state_dict() gives them, got "
                f"{sorted(state_dict) if isinstance(state_dict, Mapping) else state_dict!r}"
            )
        if state_dict["mechanism"] != mechanism:
            raise PlanError(
                f"accountant state: expected mechanism {mechanism!r}, got "
                f"{state_dict['mechanism']!r}; make the engine with accountant="
                f"{state_dict['mechanism']!r}"
            )
        rows = _rows(state_dict["history"])
        if self._engine:
            self._check_fit(rows)
        else:
            self._unfitted = rows
        self.history = rows

    def _check_fit(self, rows: list[Event]) -> None:
        """Refuses steps that the trainings of this engine cannot have taken."""
        for noise, rate, steps in rows:
            if not any(
                math.isclose(rate, own_rate, rel_tol=1e-9) and noise <= own_noise * (1 + 1e-9)
                for own_noise, own_rate in self._engine
            ):
                own = ", ".join(f"noise {n:g} at rate {r:g}" for n, r in self._engine)
                raise PlanError(
                    f"accountant state: {steps} steps with noise {noise:g} at sampling rate "
                    f"{rate:g}, and this engine trains with {own}: a state that claims more noise "
                    "or another rate would be charged too little; resume with the settings of the "
                    "run that saved it (of a noise schedule the largest), and add what other runs "
                    "spent to accountant.history"
                )

    def _check_history(self) -> None:
        """Checks the list, and restores steps that have been in it before."""
        rows = _rows(self._history)
        totals: dict[_Settings, int] = {}
        for noise, rate, steps in rows:
            totals[noise, rate] = totals.get((noise, rate), 0) + steps
        for (noise, rate), steps in self._floor.items():
            missing = steps - totals.get((noise, rate), 0)
            if missing > 0:
                rows.append((noise, rate, missing))
                totals[noise, rate] = steps
        self._floor = totals
        if rows != self._history:
            self._history[:] = _joined(rows)


class PRVAccount(Account, PRVAccountant):  # type: ignore[misc]
    """An account that Opacus' users know as a PRVAccountant."""


class RDPAccount(Account, RDPAccountant):  # type: ignore[misc]
    """An account that Opacus' users know as an RDPAccountant."""


ACCOUNTS: dict[str, type[Account]] = {"prv": PRVAccount, "rdp": RDPAccount}
"""Of the accountants that Opacus' engine names, those whose epsilon is a bound."""


def _rows(history: object) -> list[Event]:
    if not isinstance(history, list | tuple):
        raise PlanError(
            "accountant.history: expected a list of (noise multiplier, sampling rate, steps), got "
            f"{type(history).__name__}"
        )
    return [_checked(entry) for entry in history]


def _checked(entry: object) -> Event:
    try:
        values: Any = entry
        noise, rate, steps = values
        if isinstance(noise, str) or isinstance(rate, str):
            raise TypeError("text is no number")
        event = GaussianSteps(
            noise_multiplier=float(noise), sampling_rate=float(rate), steps=operator.index(steps)
        )
    except (TypeError, ValueError) as error:
        raise PlanError(
            "accountant.history: expected (noise multiplier >= 0, sampling rate in (0, 1], whole "
            f"number of steps) in each entry, got {entry!r}: {error}"
        ) from error
    return event.noise_multiplier, event.sampling_rate, event.steps


def _joined(rows: list[Event]) -> list[Event]:
    joined: list[Event] = []
    for noise, rate, steps in rows:
        if joined and joined[-1][:2] == (noise, rate):
            joined[-1] = (noise, rate, joined[-1][2] + steps)
        else:
            joined.append((noise, rate, steps))
    return joined


def checked_ledger(
    state: Mapping[str, Any], *, plan: DPPlan, noise_multiplier: float, spent: Ledger
) -> Ledger:
    """The ledger of an optimizer's state, given that it fits plan and noise.

    Refused are fewer steps than were `spent` here, or than the optimizer's own counters tell.
    """
    privacy = state.get("privacy")
    if not isinstance(privacy, Mapping) or privacy.get("plan") != plan.to_dict():
        raise PlanError(
            'optimizer state: expected the plan of this training under "privacy", got '
            f"{dict(privacy).get('plan') if isinstance(privacy, Mapping) else privacy}; resume "
            "from the state_dict() of this optimizer, with the settings it was made with"
        )
    ledger = Ledger.from_list(privacy.get("ledger", None))
    for event in ledger.events:
        if event.sampling_rate != plan.sampling_rate or (event.noise_multiplier > noise_multiplier):
            raise PlanError(
                f"ledger: {event.steps} steps with noise {event.noise_multiplier:g} at sampling "
                f"rate {event.sampling_rate:g}, expected at most {noise_multiplier:g} at "
                f"{plan.sampling_rate:g}: steps that claim more noise or another rate would be "
                "charged too little; of a noise schedule, set optimizer.noise_multiplier to its "
                "largest before loading"
            )
    for own, name in ((spent.steps, "were taken here"), (_counted(state), "its optimizer counts")):
        if ledger.steps < own:
            raise PlanError(
                f"ledger: {own} steps {name}, the state knows {ledger.steps}: epsilon never falls"
            )
    return ledger


def _counted(state: Mapping[str, Any]) -> int:
    """Steps according to the counters that some optimizers keep."""
    moments = state.get("state")
    counters = [
        float(moment["step"])
        for moment in (moments.values() if isinstance(moments, Mapping) else ())
        if isinstance(moment, Mapping) and isinstance(moment.get("step"), int | float | Tensor)
    ]
    return int(max(counters, default=0))
