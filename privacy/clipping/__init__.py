"""Per-example clipping without module hooks: a file per layer family, the tape that couples them.

Reading order: `gradients` (what the step needs of a parameter), `tape` (where layers write it),
`layers` (how a layer is recorded), then any rule, `registry` (which layer gets which), `tuner`
(which of a rule's kernels runs), `printout` (what was chosen), and `factors` (how much of each
example's gradient is kept).
"""

from privacy.clipping.factors import clip_factors
from privacy.clipping.fallback import FallbackRule
from privacy.clipping.gradients import Deferred, Instantiated, PerExampleGradients
from privacy.clipping.layers import Installation, LayerRule, install
from privacy.clipping.printout import describe
from privacy.clipping.registry import register, rule_of
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Choice, Kernel, Tuner

__all__ = [
    "Choice",
    "Deferred",
    "FallbackRule",
    "Installation",
    "Instantiated",
    "Kernel",
    "LayerRule",
    "PerExampleGradients",
    "Tape",
    "Tuner",
    "clip_factors",
    "describe",
    "install",
    "register",
    "rule_of",
]
