"""Audits: is a private training what its plan says? Measured from outside, with canaries.

Reading order: `canaries`, `observer`, `release` and `watch` (where numbers come from),
`contributions` (what scores and sums prove), `noise` and `sampling` (the battery beside them),
`gate` (the verdict, and what cannot be seen), `report` (what was asked and answered). Membership
inference on finished models is deliberately not here.
"""

from privacy.audit.contributions import CanaryScoreAuditor
from privacy.audit.gate import audit
from privacy.audit.report import AuditReport, AuditSettings, Bound, Check
from privacy.audit.watch import AuditedTraining
from privacy.statistics import gdp_delta, gdp_epsilon, one_run_p_value

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
