"""Which rule a layer gets: its family's own, a user's, or the slow one, exact for any layer."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from privacy.clipping.attention import AttentionRule
from privacy.clipping.convolution import ConvolutionRule
from privacy.clipping.gradients import Instantiated, Parts, Saved
from privacy.clipping.layers import Installation
from privacy.clipping.linear import EmbeddingRule, LinearRule, PReLURule
from privacy.clipping.normalisation import (
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)
from privacy.clipping.recurrent import RecurrentRule
from privacy.clipping.rules import Rule
from privacy.clipping.tuner import Choice, Tuner
from privacy.clipping.uses import UsesRule, vectorised
from privacy.errors import UnsupportedLayer

__all__ = ["FallbackRule", "describe", "register", "rule_of"]


class FallbackRule:
    """The rule of a layer that has none of its own: one more pass, vectorised over the examples.

    The layer must map one tensor to one tensor, examples in dimension 0 of both, and give the same
    output when it runs again: a Dropout inside it is refused.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer = layer
        self.name = name
        self.parameters = tuple(layer.parameters())
        self._plain_forward = layer.forward

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer itself."""
        output = self._plain_forward(inputs)
        if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            raise UnsupportedLayer(
                f"{self.name}: expected {type(self.layer).__name__} to map a batch to one tensor "
                "with the same number of rows; replace it, or freeze its parameters"
            )
        return output, ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """By running the layer again, on the whole batch."""
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._plain_forward(leaf), leaf, output_gradient)
        return gradient

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """By running the layer again, vectorised over the examples, each a batch of one."""
        plain = _Plain(self.layer, self._plain_forward)
        named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        values = {name: p.detach() for name, p in named.items()}

        def of_example(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
            def run(current: dict[str, Tensor]) -> Tensor:
                output: Tensor = torch.func.functional_call(plain, current, (x.unsqueeze(0),))
                return output.squeeze(0)

            pull_back = torch.func.vjp(run, values)[1]
            (gradients,) = pull_back(dy)
            return dict(gradients)

        try:
            gradients = vectorised(of_example, inputs, output_gradient)
        except RuntimeError as error:
            raise UnsupportedLayer(self._cannot(error)) from error
        return [(named[name], Instantiated([gradient])) for name, gradient in gradients.items()]

    def _cannot(self, error: RuntimeError) -> str:
        """Why it cannot, and the cure: mostly it need not be recorded whole."""
        why = "draws random numbers" if "random" in str(error) else "decides by its input's values"
        own = ", ".join(name for name, _ in self.layer.named_parameters(recurse=False))
        inside = any(True for _ in self.layer.children())
        whole = (
            f"; because it holds {own} itself, all that is inside of it is run with it: move {own} "
            "into a small module of its own, whose forward uses nothing else"
            if own and inside
            else "; move its parameters into layers of their own"
        )
        return (
            f"{self.name}: {type(self.layer).__name__} {why}, so it cannot run on one example at a "
            f"time{whole}, or freeze them: {error}"
        )


class _Plain(nn.Module):
    """The layer with its own forward, whatever its `forward` attribute says now."""

    def __init__(self, layer: nn.Module, plain_forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self._plain_forward = plain_forward

    def forward(self, inputs: Tensor) -> Any:
        return self._plain_forward(inputs)


# Exact types: a subclass may compute something else in its forward.
_OWN: dict[type[nn.Module], Callable[[Any, str, Tuner], Rule]] = {
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
    nn.MultiheadAttention: AttentionRule,
    nn.RNN: RecurrentRule,
    nn.LSTM: RecurrentRule,
    nn.GRU: RecurrentRule,
}
_ADDED: dict[type[nn.Module], Callable[[Any, str], Rule]] = {}


def register(
    layer_type: type[nn.Module], rule: Callable[[Any, str], Rule], *, replace: bool = False
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


def rule_of(
    layer: nn.Module, name: str, tuner: Tuner | None = None, whole: Collection[str] = ()
) -> Rule:
    """The rule for `layer`: a user's, else its family's own, else the slow one.

    The tuner chooses among the kernels of a layer that has several; it is a new one by default. A
    layer whose name is in `whole` runs again with all that is inside of it, where its parameters
    cannot be followed by themselves.
    """
    kind = type(layer)
    if kind in _ADDED:
        return _ADDED[kind](layer, name)
    if kind in _OWN:
        return _OWN[kind](layer, name, tuner or Tuner())
    if name in whole or is_parametrized(layer):
        return FallbackRule(layer, name)
    return UsesRule(layer, name)


def describe(installation: Installation) -> str:
    """One line a layer and input shape: name, type, kernel, and its milliseconds where timed.

    Before a backward pass no layer has seen a shape. Numbers of examples are left out: a Poisson
    sample's size is not covered by epsilon.
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


def _ways(name: str, rule: Rule) -> list[tuple[str, str, str]]:
    """Input, kernel and milliseconds of every shape that a layer has seen."""
    if isinstance(rule, UsesRule):
        return [("-", "SLOW PATH: what uses its parameters runs again for each example", "-")]
    if isinstance(rule, FallbackRule):
        return [("-", "SLOW PATH: torch.func runs it again for each example", "-")]
    tuner = getattr(rule, "tuner", None)
    seen = tuner.choices if isinstance(tuner, Tuner) else ()
    largest: dict[tuple[int, ...], Choice] = {}
    for choice in (choice for choice in seen if choice.layer == name):
        shape, examples = choice.inputs[1:], choice.inputs[0]
        if shape not in largest or examples > largest[shape].inputs[0]:
            largest[shape] = choice
    ways = []
    for shape, choice in largest.items():
        seconds = choice.seconds.get(choice.kernel)
        milliseconds = "not timed" if seconds is None else f"{1e3 * seconds:.2f}"
        ways.append(("x".join(map(str, shape)), choice.kernel, milliseconds))
    return ways or [("-", "the layer's own", "-")]
