"""The user's module, and the cut between its outputs and the user's loss.

There the graph is cut, and the user's `backward()` leaves the gradient of the outputs; the private
step makes one loss an example of it. That is one only if row i of the loss depends on example i
alone, so the functions that the loss calls on the outputs are followed: a loss that averages with
weights, leaves labels out of its count, or sorts the batch is refused, for clipping bounds nothing
there. What it computes of labels alone (weights normalised over the batch) is not seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from privacy.batch import mapped, tensors
from privacy.errors import PlanError, StepError, UnsupportedLayer
from privacy.opacus.call import Call, Traced, leaves
from privacy.opacus.refusals import MODULE, as_opacus_raises, refusal
from privacy.opacus.traces import Mixed, Rows, Setting, Total, Trace
from privacy.step import Prepared

__all__ = ["FusedModule", "Outputs"]

_BACKWARD: Any = torch.Tensor.backward


class _Followed(Traced):
    """A traced tensor, whose results are traced too."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [value for value in leaves((args, kwargs)) if isinstance(value, Traced)]
        with torch._C.DisableTorchFunctionSubclass():
            if not operands:
                return func(*args, **kwargs)
            if func is _BACKWARD:
                loss: Any = operands[0]
                return loss.checked(loss.known, lambda: func(*args, **kwargs))
            call = Call(func, args, kwargs, operands)
            result = func(*args, **kwargs)
            if call.name == "setitem" and isinstance(args[0], Traced):
                args[0].known = Mixed("rows are written to in place")
            return _labelled(result, call)


def _with(tensor: Any, trace: Trace, checked: Any) -> Any:
    tensor.known, tensor.checked = trace, checked
    return tensor


def _labelled(result: Any, call: Call, part: int | None = None) -> Any:
    """The results, each with its trace; what is no tensor stays plain."""
    if isinstance(result, Tensor):
        new = result if isinstance(result, Traced) else result.as_subclass(_Followed)
        return _with(new, call.trace_of(result, part), call.operands[0].checked)
    if isinstance(result, tuple | list) and any(isinstance(r, Tensor) for r in result):
        return type(result)([_labelled(item, call, i) for i, item in enumerate(result)])
    return result


@dataclass(frozen=True)
class _Cut:
    """One forward pass: its outputs with their graph, and the leaf that the user's loss sees."""

    outputs: Tensor
    leaf: Tensor
    after: tuple[int, int]
    loss: Trace | None


class Outputs:
    """Where forward passes are cut from the user's loss; module and optimizer share it.

    A forward pass is remembered only when a backward pass has reached its outputs.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._reached: list[_Cut] = []
        self._loss: Trace | None = None
        self._settings: dict[tuple[str, ...], tuple[Setting, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module trains nobody privately: it is plain again."""

    def cut(self, outputs: Tensor) -> Tensor:
        """The outputs without their graph; a backward pass that reaches them is remembered."""
        leaf = outputs.detach().requires_grad_()
        after = (self._steps, len(self._reached))
        register: Any = leaf.register_post_accumulate_grad_hook
        register(lambda reached: self._reached.append(_Cut(outputs, reached, after, self._loss)))
        # A leaf would refuse in-place operations.
        free: Tensor = leaf.clone()
        # One row alone has no others to depend on.
        if len(outputs) > 1:
            free = _with(free.as_subclass(_Followed), Rows(len(outputs)), self._backward)
        return free

    def rows(self) -> int:
        """Rows of the one backward pass since the last step; none or several are refused."""
        if not self._reached:
            raise StepError(
                "no backward pass has reached the module since the last step or zero_grad(): call "
                "loss.backward() on a loss of its outputs, in training mode; inputs that require "
                "a gradient are taken for an attack's and do not count"
            )
        again = len({id(cut.leaf) for cut in self._reached}) < len(self._reached)
        if again or any(cut.after != (self._steps, 0) for cut in self._reached):
            raise StepError(
                "more than one backward pass since the last step: an example would count more "
                "than once; add the losses up and call backward() once, call "
                "optimizer.zero_grad() after a backward pass that is not to count, and take an "
                "attack's gradients with inputs that require a gradient, or in eval mode"
            )
        rows = sorted({len(cut.outputs) for cut in self._reached})
        if len(rows) > 1:
            raise StepError(
                f"the loss joins forward passes of {rows} rows; expected the same examples in each"
            )
        return rows[0]

    def losses(self, *, loss_reduction: str) -> Tensor:
        """One loss an example, whose gradient is that of the user's loss before its reduction.

        Refuses a loss that is not the mean or sum of its rows, or was not seen.
        """
        for cut in self._reached:
            if len(cut.outputs) > 1:
                self._check(cut.loss, loss_reduction)
        with torch.enable_grad():
            return torch.stack([_losses(cut, loss_reduction) for cut in self._reached]).sum(0)

    def _backward(self, loss: Trace, run: Callable[[], Any]) -> Any:
        """Runs the user's backward pass while the loss that it starts from is noted."""
        self._loss = loss
        try:
            return run()
        finally:
            self._loss = None

    def _check(self, loss: Trace | None, loss_reduction: str) -> None:
        """Refuses a loss by which examples depend on each other."""
        if loss is None:
            raise StepError(
                "the loss could not be followed from the module's outputs: compute it by functions "
                "of torch on them, neither compiled nor in NumPy, and call loss.backward()"
            )
        if not isinstance(loss, Total):
            reason = loss.reason if isinstance(loss, Mixed) else "it is one value a row, not joined"
            raise StepError(
                f"the loss is not the {loss_reduction} of one loss an example: {reason}. One "
                "example would move the others' gradients, and clipping would not bound it"
            )
        if loss.divided is (loss_reduction == "sum"):
            raise StepError(
                f"the loss is the {'mean' if loss.divided else 'sum'} over its rows, and "
                f"loss_reduction is {loss_reduction!r}: every gradient would be scaled by the "
                "number of examples in the sample; make them agree"
            )
        names = tuple(setting.name for setting in loss.settings)
        before = self._settings.get(names)
        changed = [
            new.name
            for new, old in zip(loss.settings, before or loss.settings, strict=True)
            if (new.doubtful if before is None else not new.stayed(old))
        ]
        if changed:
            raise StepError(
                f"the loss calls {', '.join(dict.fromkeys(changed))} with a value beside the rows "
                "that is not the one of the step before, or has a value an example: it can have "
                "been computed from the other examples of the batch; take the mean over the rows, "
                "or change the learning rate instead"
            )
        self._settings[names] = loss.settings

    def forget(self) -> None:
        """Drops the backward passes so far."""
        self._reached = []

    def step(self) -> None:
        """Drops the forward passes so far, too: the parameters are about to change."""
        self.forget()
        self._steps += 1


def _losses(cut: _Cut, loss_reduction: str) -> Tensor:
    """Outputs times their own gradient: linear, so its gradient at the outputs is the user's."""
    rows = len(cut.outputs)
    assert cut.leaf.grad is not None, "the hook runs after the gradient is there"
    gradient = cut.leaf.grad * rows if loss_reduction == "mean" else cut.leaf.grad
    return (cut.outputs * gradient).reshape(rows, -1).sum(1)


def _by_rows(outputs: Any) -> bool:
    """Whether all outputs are tensors of as many rows."""
    try:
        found = tensors(outputs).values()
    except PlanError:
        return False
    return len({tuple(each.shape[:1]) for each in found}) == 1 and all(each.dim() for each in found)


def _refused(name: str) -> Callable[..., NoReturn]:
    """A method of `nn.Module` that would work on the wrapper, and so on nothing."""

    def refuse(self: nn.Module, *_args: Any, **_settings: Any) -> NoReturn:
        """Refused, with the reason in the message."""
        raise refusal(self, name, MODULE)

    return refuse


class FusedModule(nn.Module):
    """The user's module, cut from the loss while it trains; `_module` is the module itself.

    In eval mode, under `torch.no_grad()`, and for inputs that require a gradient (an attack's) it
    is the module itself, and nothing counts. A deep copy is an ordinary module again.
    """

    def __init__(self, prepared: Prepared, outputs: Outputs) -> None:
        super().__init__()
        self._outputs: Outputs | None = outputs
        self._prepared: Prepared | None = prepared
        # Last: from here on a write is followed or refused.
        self._module = prepared.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = super().__getattr__("_module")
            if name in MODULE and not hasattr(module, name):
                raise refusal(self, name, MODULE) from None
            return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        module = vars(self).get("_modules", {}).get("_module")
        if module is None or name == "training" or (name.startswith("_") and name in vars(self)):
            super().__setattr__(name, value)
        elif hasattr(module, name) and not hasattr(nn.Module, name):
            setattr(module, name, value)
        else:
            raise refusal(self, name, MODULE)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    @as_opacus_raises()
    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """The module's outputs, which in training must be tensors with a row an example."""
        outputs = self._module(*inputs, **settings)
        attacked = any(
            isinstance(value, Tensor) and value.requires_grad
            for value in (*inputs, *settings.values())
        )
        cut = self._outputs
        if not self.training or not torch.is_grad_enabled() or attacked or cut is None:
            return outputs
        if not _by_rows(outputs):
            raise UnsupportedLayer(
                f"{type(self._module).__name__}: expected tensors with a row an example, alone or "
                f"in tuples, dictionaries and dataclasses, got {type(outputs).__name__}; make a "
                "module private that maps inputs to logits"
            )
        return mapped(lambda each: cut.cut(each) if each.requires_grad else each, outputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, and the backward pass that no step was taken on."""
        if self._outputs is not None:
            self._outputs.forget()
        super().zero_grad(set_to_none)

    def set_grad_sample_to_none(self) -> None:
        """As in Opacus; there is nothing to drop but the backward pass under way."""
        self.zero_grad()

    del_grad_sample = set_grad_sample_to_none

    def forbid_grad_accumulation(self) -> None:
        """Does nothing: accumulation is always forbidden."""

    def cleanup(self) -> None:
        """Ends the private training, as `to_standard_module`."""
        self.to_standard_module()

    add_module = _refused("add_module")
    register_module = _refused("register_module")
    register_parameter = _refused("register_parameter")
    register_buffer = _refused("register_buffer")
    compile = _refused("compile")

    def to_standard_module(self) -> nn.Module:
        """The module itself, plain again; the private training cannot go on."""
        if self._prepared is not None:
            self._prepared.undo()
        self._outputs = None
        return self._module
