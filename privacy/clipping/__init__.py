"""Per-example clipping without module hooks: what someone needs who registers a layer's rule.

Reading order: `gradients` (what the step needs of a parameter), `tape` (where layers write it),
`rules` (what a layer's rule is), `layers` (how it is recorded), then any rule, `registry` (which
layer gets which), `uses` (the slow path), `tuner` (which of a rule's kernels runs), and `factors`
(how much of each example's gradient is kept).
"""

from privacy.clipping.gradients import GhostNorm, Instantiated, PerExampleGradients
from privacy.clipping.registry import FallbackRule, register, rule_of
from privacy.clipping.rules import LayerRule

__all__ = [
    "FallbackRule",
    "GhostNorm",
    "Instantiated",
    "LayerRule",
    "PerExampleGradients",
    "register",
    "rule_of",
]
