"""What a run leaves behind: its record as JSON, figures of it, and one page that shows them.

A record goes in, text comes out. Deliberately not here: training, attacks and accounting; this room
knows none of the others and only shows what it was told.
"""

from secure_cnn.report.curves import accuracy_curve, epsilon_curve, loss_curve
from secure_cnn.report.examples import Examples, example_figure
from secure_cnn.report.figures import class_recall, confusion_matrix, cost_bars, variant_colors
from secure_cnn.report.measurements import Measurements, Row
from secure_cnn.report.page import render_page, write_page
from secure_cnn.report.provenance import hardware, version, versions
from secure_cnn.report.record import (
    DataRecord,
    ModelRecord,
    PrivacyRecord,
    RunRecord,
    ThreatRecord,
)
from secure_cnn.report.results import EpochRecord, ResultRecord
from secure_cnn.report.table import summary_table

__all__ = [
    "DataRecord",
    "EpochRecord",
    "Examples",
    "Measurements",
    "ModelRecord",
    "PrivacyRecord",
    "ResultRecord",
    "Row",
    "RunRecord",
    "ThreatRecord",
    "accuracy_curve",
    "class_recall",
    "confusion_matrix",
    "cost_bars",
    "epsilon_curve",
    "example_figure",
    "hardware",
    "loss_curve",
    "render_page",
    "summary_table",
    "variant_colors",
    "version",
    "versions",
    "write_page",
]
