"""What a model tells about the people in its data: who they are, and what a gradient shows of them.

A table of how sure models are of examples (`table`), which shadow models fill (`shadows`) by what
they are asked (`signals`, and `label_only` of models that say a class alone); attacks that are
functions of it (`attacks`), what their scores are worth (`metrics`), what was promised (`promise`),
and all of it for one target (`report`), with truths that must be found (`controls`); `membership`
does it for a training function of one's own (`measure`). Images from gradients that were shared
(`inversion`), and copies of a model from its answers (`extraction`).
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
from privacy.leakage.controls import Control, controls
from privacy.leakage.extraction import (
    AnswerMode,
    Copy,
    Labels,
    Learn,
    Probabilities,
    TopProbabilities,
    extract,
)
from privacy.leakage.inversion import (
    Inversion,
    Reconstruction,
    input_of_linear,
    invert,
    labels_of,
    shared_gradient,
    similarity,
)
from privacy.leakage.label_only import AugmentationVotes, NoiseVotes
from privacy.leakage.measure import membership
from privacy.leakage.metrics import (
    PointOnCurve,
    area,
    areas,
    oracle_threshold,
    point,
    resolved,
    shadow_thresholds,
)
from privacy.leakage.promise import Promise, allowed_tpr
from privacy.leakage.report import (
    MEMBERSHIP_ATTACKS,
    AttackFigures,
    Exposed,
    LeakageReport,
    membership_report,
)
from privacy.leakage.shadows import ShadowDesign, Train, copies, score_tables
from privacy.leakage.signals import Answer, Confidence, Question, Signal, confidence
from privacy.leakage.table import ScoreTable, balanced_halves

__all__ = [
    "MEMBERSHIP_ATTACKS",
    "Answer",
    "AnswerMode",
    "AttackFigures",
    "AugmentationVotes",
    "Confidence",
    "Control",
    "Copy",
    "Exposed",
    "Inversion",
    "Labels",
    "LeakageReport",
    "Learn",
    "NoiseVotes",
    "PointOnCurve",
    "Probabilities",
    "Promise",
    "Question",
    "Reconstruction",
    "ScoreTable",
    "ShadowDesign",
    "Signal",
    "TopProbabilities",
    "Train",
    "allowed_tpr",
    "area",
    "areas",
    "attack_p",
    "attack_r",
    "balanced_halves",
    "base",
    "bavaria",
    "confidence",
    "controls",
    "copies",
    "extract",
    "global_threshold",
    "input_of_linear",
    "invert",
    "labels_of",
    "lira",
    "membership",
    "membership_report",
    "oracle_threshold",
    "point",
    "resolved",
    "rmia",
    "score_tables",
    "shadow_thresholds",
    "shared_gradient",
    "similarity",
]
