"""What each protection costs, measured against plain training in the same run.

With `secure_cnn.recipe` the only room that knows models, attacks and privacy together. Here is what
a program of one's own needs; the commands of `secure-cnn bench` reach further, into `step`,
`memory`, `scaling`, `trained`, `archive` and `robustness`, and for others' code into `rivals`.
"""

from secure_cnn.bench.comparison import BenchmarkComparison, compare
from secure_cnn.bench.overhead import OverheadSettings, overhead
from secure_cnn.bench.protection import Protection, combinations, protections
from secure_cnn.bench.step import step_costs

__all__ = [
    "BenchmarkComparison",
    "OverheadSettings",
    "Protection",
    "combinations",
    "compare",
    "overhead",
    "protections",
    "step_costs",
]
