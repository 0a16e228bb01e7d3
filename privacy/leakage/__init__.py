"""What a model tells about the people in its data: membership, measured with shadow models.

A table of how sure models are of examples (`table`), which shadow models fill (`shadows`); attacks
that are functions of it (`attacks`), and what their scores are worth (`metrics`).
"""

from privacy.leakage.attacks import (
    attack_p,
    attack_r,
    base,
    bavaria,
    global_threshold,
    lira,
    rmia,
)
from privacy.leakage.metrics import (
    PointOnCurve,
    area,
    oracle_threshold,
    point,
    resolved,
    shadow_threshold,
)
from privacy.leakage.shadows import Answer, ShadowDesign, Train, score_table
from privacy.leakage.table import ScoreTable, balanced_halves, confidence

__all__ = [
    "Answer",
    "PointOnCurve",
    "ScoreTable",
    "ShadowDesign",
    "Train",
    "area",
    "attack_p",
    "attack_r",
    "balanced_halves",
    "base",
    "bavaria",
    "confidence",
    "global_threshold",
    "lira",
    "oracle_threshold",
    "point",
    "resolved",
    "rmia",
    "score_table",
    "shadow_threshold",
]
