"""Differential privacy for anyone's training loop: a plan, three lines, and a ledger.

Works alone: it knows neither `defenses` nor `secure_cnn`. The main modules, in reading order:
`plan` (what a training will do), `accounting` and `ledger` (what that costs, what was spent),
`sampling`, `clipping`, `differentiation`, `update` and `noise` (one step of it), `validate` and
`probe` (what is refused), `step` (all of these, once), then `training` and `attach`, or `opacus`.
"""

from privacy.accounting import GaussianSteps, epsilon_of, noise_multiplier_for
from privacy.attach import attach
from privacy.clipping import register
from privacy.clipping.factors import (
    AdaptiveClipping,
    AutomaticClipping,
    FlatClipping,
    PerLayerClipping,
)
from privacy.clipping.tuner import Choice, Tuner
from privacy.errors import (
    AccountingError,
    BudgetExceeded,
    LedgerError,
    PlanError,
    PrivacyError,
    StepError,
    UnsupportedLayer,
)
from privacy.group_privacy import group_epsilon
from privacy.ledger import Ledger
from privacy.noise import SecureGenerator
from privacy.plan import DPPlan
from privacy.replacement import fix
from privacy.sampling import PhysicalBatches
from privacy.training import PrivateTraining
from privacy.validate import check_layers, mixing_layers

__all__ = [
    "AccountingError",
    "AdaptiveClipping",
    "AutomaticClipping",
    "BudgetExceeded",
    "Choice",
    "DPPlan",
    "FlatClipping",
    "GaussianSteps",
    "Ledger",
    "LedgerError",
    "PerLayerClipping",
    "PhysicalBatches",
    "PlanError",
    "PrivacyError",
    "PrivateTraining",
    "SecureGenerator",
    "StepError",
    "Tuner",
    "UnsupportedLayer",
    "attach",
    "check_layers",
    "epsilon_of",
    "fix",
    "group_epsilon",
    "mixing_layers",
    "noise_multiplier_for",
    "register",
]
