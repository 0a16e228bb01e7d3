"""What is known of a value that came from the module's outputs, and how it goes on.

A value is rows, a sum over the examples, or mixed; a loss may be stepped on only if it is a sum.
"""

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Mixed",
    "Rows",
    "Setting",
    "Total",
    "Trace",
    "is_number",
    "joined",
    "scaled",
    "weighted",
]


@dataclass(frozen=True, eq=False)
class Setting:
    """What the function `name` was given beside the rows: the same at every step."""

    name: str
    value: Any
    # The tensor could as well hold a value an example.
    doubtful: bool = False

    def stayed(self, before: "Setting") -> bool:
        """Whether the value is that of the step before."""
        new, old = self.value, before.value
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            return new.shape == old.shape and torch.equal(new, old)
        return type(new) is type(old) and math.isclose(new, old, rel_tol=1e-6)


@dataclass(frozen=True)
class Rows:
    """A value whose dimension `dim` is the examples, in blocks of the same size."""

    examples: int
    dim: int = 0
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Total:
    """A sum over examples, or their mean where `divided`; None where every gradient is zero."""

    examples: int
    divided: bool | None
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Mixed:
    """A value that depends on several examples at once, and why."""

    reason: str


Trace = Rows | Total | Mixed


def joined(traces: list[Trace]) -> Trace:
    """What is known of several operands together."""
    settings: tuple[Setting, ...] = ()
    divided: set[bool] = set()
    for trace in traces:
        if isinstance(trace, Mixed):
            return trace
        settings += trace.settings
        if isinstance(trace, Total) and trace.divided is not None:
            divided.add(trace.divided)
    if len({trace.examples for trace in traces if not isinstance(trace, Mixed)}) > 1:
        return Mixed("outputs of different numbers of examples meet")
    if len(divided) > 1:
        return Mixed("a mean over the batch and a sum over it are joined")
    totals = [trace for trace in traces if isinstance(trace, Total)]
    if totals:
        return replace(totals[0], divided=next(iter(divided), None), settings=settings)
    assert isinstance(traces[0], Rows), "the other kinds were returned"
    return replace(traces[0], settings=settings)


def scaled(known: Total, factor: Any, *, divides: bool) -> Trace:
    """A total multiplied or divided by a number; the number of rows makes a mean of a sum."""
    plain = isinstance(factor, Tensor)
    if plain and (factor.dim() > 0 or factor.requires_grad):
        return Mixed("a sum over the batch is scaled by a tensor")
    if not (plain or is_number(factor)):
        return Mixed("a sum over the batch is scaled by what is no number")
    value = float(factor)
    scale = 1 / value if divides and value else value
    counted = value / known.examples if divides else 1 / (value * known.examples or math.nan)
    if known.divided is False and counted >= 1 and math.isclose(counted, round(counted)):
        rest = scale * known.examples
        return replace(known, divided=True, settings=(*known.settings, Setting("scale", rest)))
    if plain:
        return Mixed(
            f"a sum over the batch is scaled by a tensor, {value:g}, which can be the sum of other "
            "examples' weights; give a setting as a number, and take the mean over the rows"
        )
    return replace(known, settings=(*known.settings, Setting("scale", scale)))


def weighted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a criterion of torch's divides by other examples' labels; empty if it does not."""
    if func not in (functional.cross_entropy, functional.nll_loss):
        return ""
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("reduction", "mean") != "mean":
        return ""
    cure = 'take reduction="none" and then .mean(), which divides by the number of rows'
    if given.get("weight") is not None:
        return f"{func.__name__} with class weights divides by the weights of all labels; {cure}"
    target, ignored = given["target"], given.get("ignore_index", -100)
    if not target.is_floating_point() and bool((target == ignored).any()):
        return f"{func.__name__} divides by the labels other than {ignored} (ignore_index); {cure}"
    return ""


def is_number(value: Any) -> bool:
    """Whether a value is a number, which True is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
