"""Audits: is a private training what its plan says? Measured from outside, with canaries.

Reading order: `bounds` and `scores` (what numbers prove), `canaries` and `observer` (where they
come from), `checks` and `gate` (the verdict), `report`. Membership inference on finished models is
deliberately not here.
"""

from privacy.audit.bounds import gdp_delta, gdp_epsilon, one_run_p_value
from privacy.audit.checks import Check
from privacy.audit.gate import AuditSettings, PrivateTraining, audit
from privacy.audit.report import AuditReport, Bound
from privacy.audit.scores import CanaryScoreAuditor

__all__ = [
    "AuditReport",
    "AuditSettings",
    "Bound",
    "CanaryScoreAuditor",
    "Check",
    "PrivateTraining",
    "audit",
    "gdp_delta",
    "gdp_epsilon",
    "one_run_p_value",
]
