"""The slow path: a module's own parameters, followed to each function that uses them with examples.

While such a module runs, every function that gets one of its parameters, or what was made of them
alone, together with examples is recorded as a layer of its own, and in the backward pass runs again
for each example. Whatever else is in the module, layers with rules, dropout, branches, runs once.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from privacy.clipping.gradients import Instantiated, Parts
from privacy.clipping.layers import own_parameters
from privacy.clipping.rules import Record
from privacy.errors import NotFollowed

__all__ = ["Several", "Use", "UsesRule", "vectorised"]

_SPREADING = {"expand", "expand_as", "repeat", "broadcast_to", "tile"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__"}

Values = dict[nn.Parameter, Tensor]


class UsesRule:
    """The rule of a module that owns parameters, and whose type has none of its own.

    What is inside of it is recorded by itself. Not followed, and so refused here, are a parameter
    that meets a tensor whose rows are not examples, and one that is written to.
    """

    descends = True

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        self.parameters = tuple(own_parameters(layer))
        self._plain_forward = layer.forward

    def compose(self, record: Record, *inputs: Any, **settings: Any) -> Any:
        """The module itself; what uses its parameters with examples goes through `record`."""
        own = tuple(parameter for parameter in self.parameters if parameter.requires_grad)
        given = [each for each in tree_leaves((inputs, settings)) if isinstance(each, Tensor)]
        rows = next((len(each) for each in given if each.dim()), None)
        if rows is None:
            raise NotFollowed(
                f"{self.name}: expected {type(self.layer).__name__} to be called with a tensor of "
                "examples, got none",
                layers=(self.name,),
            )
        with _Following(record, self.name, own, given, rows):
            return self._plain_forward(*inputs, **settings)


@dataclass(frozen=True, eq=False)
class _Call:
    """A function and its arguments, of which some are filled in: see `made`."""

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec

    def made(self, rows: Sequence[Tensor], values: Values) -> Any:
        """What it gives for these examples, and these values of the parameters."""

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, _Row):
                return rows[leaf.number]
            if isinstance(leaf, _Made):
                return tree_leaves(leaf.call.made((), values))[leaf.number]
            return values.get(leaf, leaf) if isinstance(leaf, nn.Parameter) else leaf

        args, kwargs = tree_unflatten([filled(leaf) for leaf in self.leaves], self.spec)
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class _Row:
    """The place of a tensor of examples among the arguments of a call."""

    number: int


@dataclass(frozen=True, eq=False)
class _Made:
    """One of the tensors that a call made of parameters alone."""

    call: _Call
    number: int


class Several(Exception):
    """A function gave several tensors; what it gave is the argument."""


class Use:
    """The rule of one call: a function of tensors of examples, [n, ...] each, and of parameters.

    It gives one tensor [n, ...]; of a function that gives several, the rule is one's, by its
    `number`. Where it has no tensor of examples, what it gives is the same for each: a parameter
    that was expanded.
    """

    def __init__(
        self, name: str, call: _Call, own: tuple[nn.Parameter, ...], number: int | None = None
    ) -> None:
        self.name, self.parameters = name, own
        self._call, self._number = call, number

    def forward(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The function's value.

        Raises:
            Several: It has several, and this is not the rule of one.
        """
        return self._output(inputs, self._values()), ()

    def _output(self, inputs: Sequence[Tensor], values: Values) -> Tensor:
        made = self._call.made(inputs, values)
        if self._number is None and not isinstance(made, Tensor):
            raise Several(made)
        output: Tensor = made if self._number is None else tree_leaves(made)[self._number]
        return output

    def input_gradients(
        self, inputs: Sequence[Tensor], output_gradient: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """By running it again, on the whole batch."""
        if not any(wanted):
            return [None] * len(wanted)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
            output = self._output(leaves, self._values())
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(output, asked, output_gradient, allow_unused=True))
        return [next(found) if w else None for w in wanted]

    def gradients_of_each(self, inputs: Sequence[Tensor], output_gradient: Tensor) -> Parts:
        """By running it again for each example: vectorised, or one after the other."""
        try:
            found = list(vectorised(self._of_example, tuple(inputs), output_gradient))
        except Exception as error:
            if "random" in str(error):
                raise NotFollowed(
                    f"{self.name}: a function that uses its parameters draws random numbers, so it "
                    f"cannot run on one example at a time: {error}",
                    layers=(self.name,),
                ) from error
            found = self._one_by_one(inputs, output_gradient)
        return [(p, Instantiated([found[number]])) for number, p in enumerate(self.parameters)]

    def _one_by_one(self, inputs: Sequence[Tensor], output_gradient: Tensor) -> list[Tensor]:
        """Where it cannot be vectorised: it decides by its input's values, say."""
        rows = range(len(output_gradient))
        try:
            each = [self._of_example([x[i] for x in inputs], output_gradient[i]) for i in rows]
        except Exception as error:
            raise NotFollowed(
                f"{self.name}: a function that uses its parameters cannot run on one example: "
                f"{type(error).__name__}: {error}",
                layers=(self.name,),
            ) from error
        return [torch.stack(of_parameter) for of_parameter in zip(*each, strict=True)]

    def _of_example(self, inputs: Sequence[Tensor], output_gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each parameter, of one example without its dimension."""
        values = {p: p.detach() for p in self.parameters}

        def run(*now: Tensor) -> Tensor:
            rows = [x.unsqueeze(0) for x in inputs]
            output = self._output(rows, dict(zip(self.parameters, now, strict=True)))
            if not rows:
                return output[0]
            if output.shape[:1] != (1,):
                raise ValueError(f"one example gave {list(output.shape)}, not one row")
            return output.squeeze(0)

        gradients: tuple[Tensor, ...] = torch.func.vjp(run, *values.values())[1](output_gradient)
        return gradients

    def _values(self) -> Values:
        return {parameter: parameter.detach() for parameter in self.parameters}


class _Following(TorchFunctionMode):
    """Follows parameters through one forward pass; a class because torch asks for one."""

    def __init__(
        self,
        record: Record,
        name: str,
        own: tuple[nn.Parameter, ...],
        given: Sequence[Tensor],
        rows: int,
    ) -> None:
        super().__init__()
        self._record, self._name, self._own, self._rows = record, name, own, rows
        self._made: Any = WeakTensorKeyDictionary()
        self._data: Any = WeakTensorKeyDictionary(dict.fromkeys(given, True))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(self._is_own(tensor) for tensor in tensors):
            output = function(*args, **(kwargs or {}))
            if any(self._is_data(tensor) for tensor in tensors):
                self._mark(output)
            return output
        data = [tensor for tensor in tensors if self._is_data(tensor)]
        name = getattr(function, "__name__", "")
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if "out" in (kwargs or {}) or (writes and self._is_own(args[0])):
            self._refuse(f"{name} writes to it")
        if data:
            return self._use(function, leaves, spec, args[0] if writes else None)
        return self._of_own(function, args, kwargs or {}, name)

    def _of_own(self, function: Any, args: Any, kwargs: Any, name: str) -> Any:
        """Makes something of parameters alone; spread over the rows it is one of each example's."""
        output = function(*args, **kwargs)
        call = self._call(function, *tree_flatten((args, kwargs)))[0]
        spread = name in _SPREADING and output.dim() > 0 and len(output) == self._rows
        if spread and (output.dim() > args[0].dim() or len(args[0]) == 1):
            output = self._record(Use(self._name, call, self._own))
            self._mark(output)
            return output
        for number, tensor in enumerate(tree_leaves(output)):
            if isinstance(tensor, Tensor) and not self._is_own(tensor):
                self._made[tensor] = _Made(call, number)
        return output

    def _use(self, function: Any, leaves: Any, spec: TreeSpec, written: Tensor | None) -> Any:
        """Records a function of examples and parameters."""
        call, rows = self._call(function if written is None else _on_copy(function), leaves, spec)
        wrong = [list(row.shape) for row in rows if row.shape[:1] != (self._rows,)]
        if wrong:
            self._refuse(f"it meets a tensor of shape {wrong[0]}, whose rows are not examples")
        if written is not None:
            # What is saved for the backward pass must not be what is written to.
            rows = [row.clone() if row is written else row for row in rows]
        try:
            output: Any = self._record(Use(self._name, call, self._own), *rows)
        except Several as several:
            made, structure = tree_flatten(several.args[0])
            uses = [Use(self._name, call, self._own, number) for number in range(len(made))]
            output = tree_unflatten([self._record(use, *rows) for use in uses], structure)
        if any(tensor.shape[:1] != (self._rows,) for tensor in tree_leaves(output)):
            self._refuse("what is made of it and of examples has other rows than they")
        self._mark(output)
        if written is None:
            return output
        written.copy_(output)
        return None if function.__name__ == "__setitem__" else written

    def _call(self, function: Any, leaves: Any, spec: TreeSpec) -> tuple[_Call, list[Tensor]]:
        """The call with places for examples and parameters, and the examples that fill them."""
        rows: list[Tensor] = []
        places: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf in self._made:
                places.append(self._made[leaf])
            elif isinstance(leaf, Tensor) and self._is_data(leaf):
                number = next((n for n, row in enumerate(rows) if row is leaf), len(rows))
                rows += [leaf] if number == len(rows) else []
                places.append(_Row(number))
            else:
                places.append(leaf)
        return _Call(function, tuple(places), spec), rows

    def _is_own(self, tensor: Tensor) -> bool:
        return any(tensor is parameter for parameter in self._own) or tensor in self._made

    def _is_data(self, tensor: Tensor) -> bool:
        """What came in or was computed from that; a graph that is not of these parameters, too."""
        return tensor in self._data or (tensor.requires_grad and not self._is_own(tensor))

    def _mark(self, outputs: Any) -> None:
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._data[tensor] = True

    def _refuse(self, why: str) -> None:
        raise NotFollowed(
            f"{self._name}: a parameter that it owns cannot be followed: {why}; keep the batch in "
            "dimension 0, or move the parameter into a layer of its own",
            layers=(self._name,),
        )


def vectorised(of_example: Callable[..., Any], *inputs: Any) -> Any:
    """Maps a function of one example over many, without torch's notes on what that costs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.func.vmap(of_example)(*inputs)


def _on_copy(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function that writes to its first argument as one that gives what it wrote."""

    def written(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied = target.clone()
        function(copied, *args, **kwargs)
        return copied

    return written
