"""What people look at: pages of one design, the figures on them, and tables for a terminal.

A record goes in, text comes out; a page is one HTML file that loads nothing and runs no script.
Deliberately not here: any number that the record does not hold.
"""

from secure_cnn.pages.audit import render_audit, write_audit
from secure_cnn.pages.bench import SHOWN_PARTS, render_bench, write_bench
from secure_cnn.pages.canvas import variant_colors
from secure_cnn.pages.certificate import render_certificate, write_certificate_page
from secure_cnn.pages.classes import class_recall, confusion_matrix
from secure_cnn.pages.comparison import comparison_table, render_comparison, write_comparison
from secure_cnn.pages.figures import (
    Examples,
    accuracy_curve,
    cost_bars,
    epsilon_curve,
    example_figure,
    loss_curve,
)
from secure_cnn.pages.inversion import InversionPicture
from secure_cnn.pages.leakage import render_leakage, write_leakage
from secure_cnn.pages.robustness import certificate_curve, render_robustness, write_robustness
from secure_cnn.pages.run import render_page, summary_table, write_page

__all__ = [
    "SHOWN_PARTS",
    "Examples",
    "InversionPicture",
    "accuracy_curve",
    "certificate_curve",
    "class_recall",
    "comparison_table",
    "confusion_matrix",
    "cost_bars",
    "epsilon_curve",
    "example_figure",
    "loss_curve",
    "render_audit",
    "render_bench",
    "render_certificate",
    "render_comparison",
    "render_leakage",
    "render_page",
    "render_robustness",
    "summary_table",
    "variant_colors",
    "write_audit",
    "write_bench",
    "write_certificate_page",
    "write_comparison",
    "write_leakage",
    "write_page",
    "write_robustness",
]
