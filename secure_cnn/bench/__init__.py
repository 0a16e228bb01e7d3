"""What each protection costs, measured against plain training in the same run.

With `secure_cnn.recipe` the only room that knows models, attacks and privacy together.
"""

from secure_cnn.bench.cases import CASES, workload
from secure_cnn.bench.comparison import Comparison, compare
from secure_cnn.bench.copies import CopiedCrossEntropy, copies_against, copies_makers
from secure_cnn.bench.memory import measure_memory, peak_bytes
from secure_cnn.bench.overhead import OverheadSettings, overhead
from secure_cnn.bench.rivals import RIVALS, rival_step
from secure_cnn.bench.scaling import measure_scaling
from secure_cnn.bench.step import (
    Protection,
    Workload,
    cost_rows,
    document,
    kernel_choices,
    measure_steps,
    noise_share,
    protections,
    step_costs,
    stepper,
    steppers,
    subset,
    synthetic,
)
from secure_cnn.bench.timing import Estimate, estimate, interleave, ratios
from secure_cnn.bench.trained import TrainedSettings, measure_trained
from secure_cnn.bench.variant import Variant, combinations

__all__ = [
    "CASES",
    "RIVALS",
    "Comparison",
    "CopiedCrossEntropy",
    "Estimate",
    "OverheadSettings",
    "Protection",
    "TrainedSettings",
    "Variant",
    "Workload",
    "combinations",
    "compare",
    "copies_against",
    "copies_makers",
    "cost_rows",
    "document",
    "estimate",
    "interleave",
    "kernel_choices",
    "measure_memory",
    "measure_scaling",
    "measure_steps",
    "measure_trained",
    "noise_share",
    "overhead",
    "peak_bytes",
    "protections",
    "ratios",
    "rival_step",
    "step_costs",
    "stepper",
    "steppers",
    "subset",
    "synthetic",
    "workload",
]
