"""Which rule a layer gets (its family's own, a user's, or the fallback's), and what was chosen."""

from collections.abc import Callable
from typing import Any

from torch import nn

from privacy.clipping.convolution import ConvolutionRule
from privacy.clipping.fallback import FallbackRule
from privacy.clipping.layers import Installation, LayerRule
from privacy.clipping.linear import EmbeddingRule, LinearRule, PReLURule
from privacy.clipping.normalisation import (
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)
from privacy.clipping.tuner import Choice, Tuner
from privacy.errors import UnsupportedLayer

__all__ = ["describe", "register", "rule_of"]

# Exact types: a subclass may compute something else in its forward.
_OWN: dict[type[nn.Module], Callable[[Any, str, Tuner], LayerRule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvolutionRule,
    nn.Conv2d: ConvolutionRule,
    nn.Conv3d: ConvolutionRule,
    nn.ConvTranspose1d: ConvolutionRule,
    nn.ConvTranspose2d: ConvolutionRule,
    nn.ConvTranspose3d: ConvolutionRule,
    nn.GroupNorm: lambda layer, name, tuner: GroupNormRule(layer),
    nn.InstanceNorm1d: lambda layer, name, tuner: InstanceNormRule(layer, name),
    nn.InstanceNorm2d: lambda layer, name, tuner: InstanceNormRule(layer, name),
    nn.InstanceNorm3d: lambda layer, name, tuner: InstanceNormRule(layer, name),
    nn.LayerNorm: lambda layer, name, tuner: LayerNormRule(layer),
    nn.RMSNorm: lambda layer, name, tuner: RMSNormRule(layer),
    nn.Embedding: lambda layer, name, tuner: EmbeddingRule(layer, name),
    nn.PReLU: lambda layer, name, tuner: PReLURule(layer),
}
_ADDED: dict[type[nn.Module], Callable[[Any, str], LayerRule]] = {}


def register(
    layer_type: type[nn.Module], rule: Callable[[Any, str], LayerRule], *, replace: bool = False
) -> None:
    """Gives a layer type a rule of its own, in the whole process and from the next `attach` on.

    The guarantee then rests on the rule: a gradient that it leaves out is neither clipped nor
    noised. Compare it with `FallbackRule`, as in the example, which is exact for any layer.

    Args:
        layer_type: The type of a layer that owns its parameters directly and maps one tensor to
            one tensor, the batch in dimension 0 of both; its subclasses are not meant.
        rule: Makes the rule of a layer from the layer and its dotted name.
        replace: Whether the rule may take the place of another one.

    Raises:
        UnsupportedLayer: The type is not a layer's, or has a rule and `replace` was not given.

    Example:
        >>> import torch
        >>> from privacy.clipping import FallbackRule, Instantiated
        >>> class Scale(nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(features))
        ...     def forward(self, inputs):
        ...         return inputs * self.factor
        >>> class ScaleRule:
        ...     def __init__(self, layer, name):
        ...         self.layer, self.parameters = layer, (layer.factor,)
        ...     def forward(self, inputs):
        ...         return inputs * self.layer.factor, ()
        ...     def input_gradient(self, inputs, saved, output_gradient):
        ...         return output_gradient * self.layer.factor
        ...     def per_example_gradients(self, inputs, saved, output_gradient):
        ...         return [(self.layer.factor, Instantiated([output_gradient * inputs]))]
        >>> register(Scale, ScaleRule)
        >>> layer, x, dy = Scale(3), torch.rand(4, 3), torch.rand(4, 3)
        >>> rules = rule_of(layer, "scale"), FallbackRule(layer, "scale")
        >>> ours, exact = (rule.per_example_gradients(x, (), dy)[0][1] for rule in rules)
        >>> torch.equal(ours.instantiate(), exact.instantiate())
        True
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise UnsupportedLayer(
            f"layer_type: expected a subclass of torch.nn.Module, got {layer_type!r}; give the "
            "layer's type, not a layer"
        )
    if not replace and (layer_type in _OWN or layer_type in _ADDED):
        raise UnsupportedLayer(
            f"{layer_type.__name__}: expected a type without a rule, but it has one; give "
            "replace=True to put yours in its place"
        )
    _ADDED[layer_type] = rule


def rule_of(layer: nn.Module, name: str, tuner: Tuner | None = None) -> LayerRule:
    """The rule for `layer`: a user's, else its family's own, else the slow one.

    The tuner chooses among the kernels of a layer that has several; it is a new one by default.
    """
    kind = type(layer)
    if kind in _ADDED:
        return _ADDED[kind](layer, name)
    if kind in _OWN:
        return _OWN[kind](layer, name, tuner or Tuner())
    return FallbackRule(layer, name)


def describe(installation: Installation) -> str:
    """One line a layer and input shape: name, type, kernel, and its milliseconds where timed.

    Complete after a backward pass at the real size; before one, no layer has seen a shape. Numbers
    of examples are left out: a Poisson sample's size is not covered by epsilon.
    """
    table = [("layer", "type", "input", "kernel", "ms")]
    for name, rule in installation.rules.items():
        kind = type(installation.layers[name]).__name__
        table += [(name, kind, *cells) for cells in _ways(name, rule)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for *cells, milliseconds in table:
        left = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append("  ".join([*left, milliseconds.rjust(widths[-1])]))
    return "\n".join(lines)


def _ways(name: str, rule: LayerRule) -> list[tuple[str, str, str]]:
    """Input, kernel and milliseconds of every shape that a layer has seen."""
    if isinstance(rule, FallbackRule):
        return [("-", "SLOW PATH: torch.func runs it again for each example", "-")]
    tuner = getattr(rule, "tuner", None)
    seen = tuner.choices if isinstance(tuner, Tuner) else ()
    largest: dict[tuple[int, ...], Choice] = {}
    for choice in (choice for choice in seen if choice.layer == name):
        shape, examples = choice.inputs[1:], choice.inputs[0]
        if shape not in largest or examples > largest[shape].inputs[0]:
            largest[shape] = choice
    if not largest:
        return [("-", "the layer's own", "-")]
    return [_way(choice) for choice in largest.values()]


def _way(choice: Choice) -> tuple[str, str, str]:
    """One choice's input without its examples, kernel and milliseconds."""
    seconds = choice.seconds.get(choice.kernel)
    milliseconds = "not timed" if seconds is None else f"{1e3 * seconds:.2f}"
    return "x".join(map(str, choice.inputs[1:])), choice.kernel, milliseconds
