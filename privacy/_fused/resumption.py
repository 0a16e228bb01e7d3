"""What a saved state of the drop-in's optimizer is believed."""

from collections.abc import Mapping
from typing import Any

import torch

from privacy.errors import PlanError
from privacy.ledger import Ledger
from privacy.plan import DPPlan

__all__ = ["checked_ledger"]


def checked_ledger(
    state: Mapping[str, Any], *, plan: DPPlan, noise_multiplier: float, spent: Ledger
) -> Ledger:
    """The ledger of an optimizer's state, given that it fits.

    Args:
        state: What `state_dict()` gave.

    Raises:
        PlanError: There is none; it is of another plan; it has fewer steps than were taken here, or
            than the optimizer's own counters; or steps of more noise or another rate than the
            plan's.
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
    """Steps by the counters that some optimizers keep."""
    moments = state.get("state")
    counters = [
        float(moment["step"])
        for moment in (moments.values() if isinstance(moments, Mapping) else ())
        if isinstance(moment, Mapping)
        and isinstance(moment.get("step"), int | float | torch.Tensor)
    ]
    return int(max(counters, default=0))
