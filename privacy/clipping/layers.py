"""How a layer is recorded: per-example gradients take the place of its weight gradient.

`install` replaces the `forward` of every layer that holds a trainable parameter by one that also
gives, in backward, the gradient of its input only: the weight gradient is never formed, so a plain
`backward()` leaves every `.grad` as it was. In-place operations after a layer stay allowed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from privacy.clipping.gradients import Parts, Saved, sum_copies
from privacy.clipping.rules import (
    AddsCopies,
    ComposedRule,
    InOnePass,
    LayerRule,
    Rule,
    Rules,
    SeveralInputs,
)
from privacy.clipping.tape import Tape
from privacy.errors import StepError, UnsupportedLayer

__all__ = ["Installation", "install", "own_parameters", "recorded_name"]


# By name: this module works where Opacus is not imported.
_RENAMING = "opacus.layers.param_rename"


class Installation:
    """The layers whose `forward` was replaced; `remove` puts every one back."""

    def __init__(self, layers: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> None:
        self._layers, self._rules = dict(layers), dict(rules)

    @property
    def rules(self) -> Mapping[str, Rule]:
        """The rule of every installed layer by dotted name, in the model's order."""
        return MappingProxyType(self._rules)

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The installed layers themselves, under the same names."""
        return MappingProxyType(self._layers)

    def remove(self) -> None:
        """Gives every layer its own forward back; calling it twice is harmless."""
        for layer in self._layers.values():
            vars(layer).pop("forward", None)
        self._layers, self._rules = {}, {}


def install(model: nn.Module, tape: Tape, rule_of: Rules) -> Installation:
    """Lets every layer of `model` that holds a trainable parameter write on `tape`.

    A deep copy of an installed model is plain again. Refused are a model that is installed already,
    and a layer that is used inside another one that is recorded as a whole, and outside of it too.
    """
    rules: dict[str, Rule] = {}
    layers = _owners(model, rules, rule_of)
    for name, layer in layers:
        _refuse_replaced(name, layer)
    _refuse_nested([pair for pair in layers if not _descends(rules[pair[0]])], layers)
    for name, layer in layers:
        vars(layer)["forward"] = _RecordedForward(layer, rules[name], tape, name)
    return Installation(dict(layers), rules)


def recorded_name(module: nn.Module) -> str | None:
    """The dotted name under which a layer is recorded; None if it is not."""
    forward = vars(module).get("forward")
    return forward.name if isinstance(forward, _RecordedForward) else None


def _refuse_replaced(name: str, layer: nn.Module) -> None:
    """Refuses a layer whose forward is not its class's own; a deep copy's is."""
    forward = vars(layer).get("forward")
    own = MethodType(type(layer).forward, layer)
    if forward is not None and forward != own:
        raise StepError(
            f"{name}: its forward is already replaced; detach the earlier private training first, "
            "or attach before other tools replace forward"
        )


def _refuse_nested(whole: list[tuple[str, nn.Module]], layers: list[tuple[str, nn.Module]]) -> None:
    """Refuses a layer that would be recorded twice: by itself and inside a layer around it."""
    for outer_name, outer in whole:
        inside = {id(module) for module in outer.modules()} - {id(outer)}
        for name, layer in layers:
            if id(layer) in inside:
                raise UnsupportedLayer(
                    f"{name}: it is used by itself and inside {outer_name}, whose parameters are "
                    "clipped together with it; use it in one place, or move the parameters of "
                    f"{outer_name} into a layer of their own"
                )


def _renames(module: nn.Module) -> bool:
    """Whether a layer of Opacus only gives other names to the parameters of those inside of it."""
    return any(kind.__module__ == _RENAMING for kind in type(module).__mro__)


_COLLECTIONS = (nn.ParameterList, nn.ParameterDict)
"""Modules that hold parameters for the one around them, and are never called."""


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a module uses itself: directly its own, and those in lists of it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, _COLLECTIONS):
            yield from own_parameters(child)


_UNITS = (nn.MultiheadAttention,)
"""Layers that use the parameters of those inside of them, and never call them."""


def _owners(
    model: nn.Module, rules: dict[str, Rule], rule_of: Rules
) -> list[tuple[str, nn.Module]]:
    """The modules that own a trainable parameter, with their dotted names; fills in their rules.

    What is inside of one is recorded with it, unless its rule descends.
    """
    found: dict[int, tuple[str, nn.Module]] = {}

    def visit(name: str, module: nn.Module) -> None:
        # One module under two names is one layer that is called twice.
        if id(module) in found:
            return
        inside = isinstance(module, _UNITS) or is_parametrized(module)
        own = module.parameters() if inside else own_parameters(module)
        if any(parameter.requires_grad for parameter in own) and not _renames(module):
            label = name or type(module).__name__
            found[id(module)] = label, module
            rules[label] = rule_of(module, label)
            if not _descends(rules[label]):
                return
        for child_name, child in module.named_children():
            if not isinstance(child, _COLLECTIONS):
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return list(found.values())


def _descends(rule: Rule) -> bool:
    """Whether what is inside of a layer with this rule is recorded by itself."""
    return getattr(rule, "descends", False) is True


class _RecordedForward:
    """The replacement for one layer's forward; a class because a copy writes nothing."""

    def __init__(self, layer: nn.Module, rule: Rule, tape: Tape, name: str) -> None:
        self._layer, self._rule, self._tape, self.name = layer, rule, tape, name
        self._plain_forward = layer.forward

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        trainable = [p for p in self._rule.parameters if p.requires_grad]
        if not trainable or not torch.is_grad_enabled():
            return self._plain_forward(*inputs, **settings)
        modes = self._tape.enter(self.name)
        if isinstance(self._rule, ComposedRule):
            return self._rule.compose(partial(self._record, modes), *inputs, **settings)
        if settings or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise UnsupportedLayer(
                f"{self.name}: expected {type(self._layer).__name__} to be called with one "
                f"tensor, got {len(inputs)} positional and {len(settings)} named arguments; only "
                "layers that map one tensor to one tensor can be clipped: replace it, or freeze "
                "its parameters"
            )
        return self._record(modes, self._rule, inputs[0])

    def _record(
        self, modes: tuple[bool, ...] | None, rule: LayerRule | SeveralInputs, *inputs: Tensor
    ) -> Tensor:
        """Runs the layer, or a piece of it, and lets its backward write on the tape."""
        trainable = [p for p in rule.parameters if p.requires_grad]
        if not trainable:
            return rule.forward(*inputs)[0]
        return _apply(rule, self._tape, self.name, modes, len(inputs), *inputs, *trainable)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return MethodType(type(self._layer).forward, copy.deepcopy(self._layer, memo))

    def __reduce_ex__(self, protocol: object) -> Any:
        raise StepError(
            f"{self.name}: the model cannot be pickled while it is attached; save "
            "model.state_dict(), copy.deepcopy(model), or the model after private.detach()"
        )


_PLAIN = 5
"""Arguments of a recorded layer before its tensors."""


class _RecordedLayer(torch.autograd.Function):
    """A layer whose backward gives the input's gradient and writes the rest on the tape."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: LayerRule | SeveralInputs,
        tape: Tape,
        name: str,
        modes: tuple[bool, ...] | None,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = tensors[:count]
        output, saved = rule.forward(*inputs)
        output = _of_its_own(output, tensors)
        ctx.rule, ctx.tape, ctx.layer, ctx.trainable = rule, tape, name, len(tensors) - count
        ctx.modes, ctx.count = modes, count
        ctx.save_for_backward(*inputs, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            if hasattr(ctx.rule, "gradients_of_each"):
                gradients = _input_gradients_recorded(ctx, output_gradient)
            else:
                gradients = [_input_gradient_recorded(ctx, output_gradient)]
        # With create_graph; it would otherwise pass for a constant where the loss is linear.
        if torch.is_grad_enabled():
            marker = torch.zeros((), requires_grad=True)
            gradients = [g if g is None else _Once.apply(g, marker) for g in gradients]
        # The parameters are inputs only so that the output depends on them; their gradients go to
        # the tape.
        return (*[None] * _PLAIN, *gradients, *[None] * ctx.trainable)


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, marker: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedLayer(
            "losses: they contain a gradient of the model (a gradient penalty, say), and what an "
            "example contributes through it cannot be clipped; leave the penalty out, or compute "
            "it without create_graph=True, as a constant"
        )


def _of_its_own(output: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """An output that may be written to in place: no view, and of no memory of these."""
    memory = {each.untyped_storage().data_ptr() for each in tensors}
    if output.untyped_storage().data_ptr() in memory:
        return output.clone()
    if not output._is_view():
        return output
    # The rows of a linear layer are a view of what nobody else holds.
    free: Tensor = torch.ops.aten._unsafe_view(output.contiguous(), output.shape)
    return free


def _input_gradient_recorded(ctx: Any, output_gradient: Tensor) -> Tensor | None:
    """The gradient at a layer's input; the rest is written on the tape while it records."""
    inputs, *saved = ctx.saved_tensors
    rule: LayerRule = ctx.rule
    tape: Tape = ctx.tape
    if tape.tracing:
        tape.note(ctx.layer, inputs, output_gradient)
    elif tape.recording:
        tape.passed(ctx.modes)
        copies = tape.copies(rows=len(output_gradient), layer=ctx.layer)
        if ctx.needs_input_grad[_PLAIN] and _gives_both(type(rule)):
            gradient, parts = cast(InOnePass, rule).in_one_pass(inputs, saved, output_gradient)
            for parameter, part in _folded(parts, copies):
                tape.add(parameter, part)
            return gradient
        for parameter, part in _gradients(rule, inputs, saved, output_gradient, copies):
            tape.add(parameter, part)
    if not ctx.needs_input_grad[_PLAIN]:
        return None
    return rule.input_gradient(inputs, saved, output_gradient)


def _input_gradients_recorded(ctx: Any, output_gradient: Tensor) -> list[Tensor | None]:
    """The same of a piece with several inputs."""
    inputs, tape, wanted = ctx.saved_tensors, ctx.tape, ctx.needs_input_grad[_PLAIN:]
    rule: SeveralInputs = ctx.rule
    if tape.tracing:
        tape.note(ctx.layer, inputs[0] if inputs else output_gradient, output_gradient)
    elif tape.recording:
        tape.passed(ctx.modes)
        copies = tape.copies(rows=len(output_gradient), layer=ctx.layer)
        for parameter, part in _folded(rule.gradients_of_each(inputs, output_gradient), copies):
            tape.add(parameter, part)
    return rule.input_gradients(inputs, output_gradient, wanted[: ctx.count])


@cache
def _gives_both(kind: type[LayerRule]) -> bool:
    """Whether rules of this kind are `InOnePass`; remembered, for `issubclass` is slow."""
    return issubclass(kind, InOnePass)


def _gradients(
    rule: LayerRule, inputs: Tensor, saved: Saved, output_gradient: Tensor, copies: int
) -> Parts:
    """Each example's gradients, those of its copies added up by the rule or after it."""
    if copies > 1 and isinstance(rule, AddsCopies):
        return rule.gradients_of_copies(inputs, saved, output_gradient, copies=copies)
    return _folded(rule.per_example_gradients(inputs, saved, output_gradient), copies)


def _folded(parts: Parts, copies: int) -> Parts:
    return [
        (parameter, sum_copies(part, copies, size=parameter.numel())) for parameter, part in parts
    ]


_apply: Callable[..., Tensor] = _RecordedLayer.apply
