"""Audits: is a private training what its plan says? Measured from outside, with canaries.

Reading order: `bounds` and `scores` (what numbers prove), `canaries`, `observer`, `release` and
`watch` (where they come from), `laws`, `noise`, `sampling` and `contributions` (the battery beside
the canaries), `gate` (the verdict), `report` (what cannot be seen too). Membership inference on
finished models is deliberately not here.
"""

from privacy.audit.bounds import gdp_delta, gdp_epsilon, one_run_p_value
from privacy.audit.checks import Check
from privacy.audit.gate import audit
from privacy.audit.report import AuditReport, Bound
from privacy.audit.scores import CanaryScoreAuditor
from privacy.audit.settings import AuditSettings
from privacy.audit.watch import AuditedTraining

__all__ = [
    "AuditReport",
    "AuditSettings",
    "AuditedTraining",
    "Bound",
    "CanaryScoreAuditor",
    "Check",
    "audit",
    "gdp_delta",
    "gdp_epsilon",
    "one_run_p_value",
]
