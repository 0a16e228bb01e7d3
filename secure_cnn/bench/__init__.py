"""What each protection costs, measured against plain training in the same run.

With `secure_cnn.recipe` the only room that knows models, attacks and privacy together.
"""

from secure_cnn.bench.step import (
    Protection,
    Workload,
    cost_rows,
    document,
    measure_steps,
    protections,
    subset,
    synthetic,
)
from secure_cnn.bench.timing import Estimate, estimate, interleave, ratios

__all__ = [
    "Estimate",
    "Protection",
    "Workload",
    "cost_rows",
    "document",
    "estimate",
    "interleave",
    "measure_steps",
    "protections",
    "ratios",
    "subset",
    "synthetic",
]
