"""Follows the user's loss from the module's outputs: does row i of it depend on example i only?

A loss that averages with weights, leaves labels out of its count, or sorts the batch gives every
example a gradient that depends on the others, and clipping one bounds nothing. The loss is the
user's code; what is seen of it are the functions that it calls on the outputs. What it computes
of labels alone (weights that were normalised over the batch) is not seen.
"""

from collections.abc import Callable
from typing import Any

import torch

from privacy._fused.call import Call, Traced, leaves
from privacy._fused.traces import Mixed, Rows, Trace

__all__ = ["traced"]

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


def traced(
    outputs: torch.Tensor, checked: Callable[[Trace, Callable[[], Any]], Any]
) -> torch.Tensor:
    """The outputs, with a row an example.

    Args:
        outputs: Two rows or more.
    """
    followed: torch.Tensor = _with(outputs.as_subclass(_Followed), Rows(len(outputs)), checked)
    return followed


def _with(tensor: Any, trace: Trace, checked: Any) -> Any:
    """The tensor, with what is known of it."""
    tensor.known, tensor.checked = trace, checked
    return tensor


def _labelled(result: Any, call: Call, part: int | None = None) -> Any:
    """The results, each with its trace; what is no tensor stays plain."""
    if isinstance(result, torch.Tensor):
        new = result if isinstance(result, Traced) else result.as_subclass(_Followed)
        return _with(new, call.trace_of(result, part), call.operands[0].checked)
    if isinstance(result, tuple | list) and any(isinstance(r, torch.Tensor) for r in result):
        return type(result)([_labelled(item, call, i) for i, item in enumerate(result)])
    return result
