"""What a state of a private training must say before it is taken up again.

Its ledger is read by `ledger`, which knows what was spent here.
"""

import math
from collections.abc import Mapping
from typing import Any

from privacy.clipping.factors import LARGEST_NORM, SMALLEST_NORM, AdaptiveClipping
from privacy.errors import PlanError
from privacy.plan import DPPlan
from privacy.quantities import positive, shown

__all__ = ["clipping_norm"]


def clipping_norm(state: Mapping[str, Any], plan: DPPlan) -> float:
    """The clipping norm with which a state goes on, given that it is one of `plan`.

    Args:
        state: What `PrivateTraining.state_dict` gave; one that never changes may be missing in an
            old one.

    Raises:
        PlanError: It is no state, is of another plan, or has a norm that the plan did not come to.
    """
    if not isinstance(state, Mapping):
        raise PlanError(f"expected what state_dict gave, got {type(state).__name__}")
    own = DPPlan.from_dict(state.get("plan"))
    if own != plan:
        raise PlanError(
            f"plan: the checkpoint was trained under {own.to_dict()}, this training plans "
            f"{plan.to_dict()}; resume with the checkpoint's own settings"
        )
    adaptive = isinstance(plan.clipping, AdaptiveClipping)
    given = state.get("max_grad_norm", None if adaptive else plan.max_grad_norm)
    norm = _number(given)
    if adaptive and state.get("ledger"):
        valid = SMALLEST_NORM <= norm <= LARGEST_NORM
    else:
        valid = norm == plan.max_grad_norm
    if not valid:
        raise PlanError(
            "max_grad_norm: expected the clipping norm that the plan had come to, got "
            f"{shown(given)}"
        )
    return norm


def _number(value: object) -> float:
    """A positive number of exact type, as in JSON; NaN, which equals nothing, where it is none."""
    try:
        return positive("max_grad_norm", value) if type(value) in (int, float) else math.nan
    except PlanError:
        return math.nan
