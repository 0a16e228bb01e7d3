"""Per-example clipping without module hooks: a file per layer family, the tape that couples them.

Reading order: `gradients` (what the step needs of a parameter), `tape` (where layers write it),
`layers` (how a layer is recorded), then any rule, `tuner` (which of its kernels runs), and
`factors` (how much of each example's gradient is kept).
"""

from torch import nn

from privacy.clipping.convolution import ConvolutionRule
from privacy.clipping.factors import clip_factors
from privacy.clipping.fallback import FallbackRule
from privacy.clipping.gradients import PerExampleGradients
from privacy.clipping.layers import Installation, LayerRule, install
from privacy.clipping.linear import LinearRule
from privacy.clipping.normalisation import GroupNormRule, LayerNormRule
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Choice, Kernel, Tuner

__all__ = [
    "Choice",
    "Installation",
    "Kernel",
    "LayerRule",
    "PerExampleGradients",
    "Tape",
    "Tuner",
    "clip_factors",
    "install",
    "rule_of",
]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def rule_of(layer: nn.Module, name: str, tuner: Tuner | None = None) -> LayerRule:
    """The rule for `layer`: its family's own where its forward is the family's, else the slow one.

    Args:
        layer: A module that owns trainable parameters.
        name: Its dotted name, for messages.
        tuner: Chooses among the kernels of a layer that has several; a new one by default.

    Example:
        >>> type(rule_of(nn.Linear(2, 2), "fc")).__name__
        'LinearRule'
        >>> type(rule_of(nn.PReLU(), "act")).__name__
        'FallbackRule'
    """
    # A subclass may compute something else in its forward: only the exact types have rules.
    match layer:
        case nn.Linear() if type(layer) is nn.Linear:
            return LinearRule(layer)
        case nn.GroupNorm() if type(layer) is nn.GroupNorm:
            return GroupNormRule(layer)
        case nn.LayerNorm() if type(layer) is nn.LayerNorm:
            return LayerNormRule(layer)
        case _ if isinstance(layer, _CONVOLUTIONS) and type(layer) in _CONVOLUTIONS:
            return ConvolutionRule(layer, name, tuner or Tuner())
        case _:
            return FallbackRule(layer, name)
