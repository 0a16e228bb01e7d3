"""What is written as JSON: runs, benchmarks, audits, evaluations, leakage, runs side by side.

Each document is a frozen dataclass whose fields are the schema, checked when it is made and when it
is read. Deliberately not here: training, attacks and accounting, of which this room knows nothing,
and whatever people look at.
"""

from secure_cnn.record.attacks import MEMBERSHIP_ATTACKS_IN_WORDS
from secure_cnn.record.comparison import Comparison, compare_runs
from secure_cnn.record.leakage import (
    ClassRecord,
    ControlRecord,
    ExposedRecord,
    ExtractionRecord,
    InversionRecord,
    LeakageRecord,
    MembershipAttackRecord,
    MembershipRecord,
    RateRecord,
)
from secure_cnn.record.measurements import (
    CONTROL,
    PLAIN,
    Measurements,
    NoiseCheck,
    Row,
    hardware,
    noise_checks,
    variant_name,
    version,
    versions,
)
from secure_cnn.record.run import (
    AuditRecord,
    ChosenRecord,
    DataRecord,
    EpochRecord,
    ModelRecord,
    PrivacyRecord,
    ResultRecord,
    RobustnessRecord,
    RunRecord,
    ThreatRecord,
)
from secure_cnn.record.saved import SavedRun
from secure_cnn.record.tradeoff import FRONT_RULE, Needs, TradeoffPoint, choose

__all__ = [
    "CONTROL",
    "FRONT_RULE",
    "MEMBERSHIP_ATTACKS_IN_WORDS",
    "PLAIN",
    "AuditRecord",
    "ChosenRecord",
    "ClassRecord",
    "Comparison",
    "ControlRecord",
    "DataRecord",
    "EpochRecord",
    "ExposedRecord",
    "ExtractionRecord",
    "InversionRecord",
    "LeakageRecord",
    "Measurements",
    "MembershipAttackRecord",
    "MembershipRecord",
    "ModelRecord",
    "Needs",
    "NoiseCheck",
    "PrivacyRecord",
    "RateRecord",
    "ResultRecord",
    "RobustnessRecord",
    "Row",
    "RunRecord",
    "SavedRun",
    "ThreatRecord",
    "TradeoffPoint",
    "choose",
    "compare_runs",
    "hardware",
    "noise_checks",
    "variant_name",
    "version",
    "versions",
]
