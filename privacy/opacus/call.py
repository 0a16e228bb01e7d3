"""One function that the user's loss calls, called again with one example alone.

The example's rows, or its share of the gradient, must be what they are in the whole batch.
"""

import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from privacy.opacus.traces import (
    Mixed,
    Rows,
    Setting,
    Total,
    Trace,
    is_number,
    joined,
    scaled,
    weighted,
)

__all__ = ["Call", "Traced", "leaves"]

_LINEAR = frozenset(
    {
        *("neg", "negative", "positive", "sum", "mean", "stack", "clone", "contiguous"),
        *("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad"),
        *("squeeze", "unsqueeze", "view", "reshape", "flatten"),
    }
)
_SUMS = frozenset({"add", "sub", "subtract", "rsub"})
_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "truediv"})
_ARITHMETIC = _SUMS | _PRODUCTS | _QUOTIENTS | {"pow", "rpow", "rtruediv"}
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
_EXACT_ELEMENTS = 2**22
"""Up to so many values a gradient is compared in float64."""


class Traced(Tensor):
    """A tensor that knows how it came from the module's outputs."""

    known: Trace
    # Called with the trace and the backward pass that starts here.
    checked: Callable[[Trace, Callable[[], Any]], Any]


@dataclass(frozen=True, eq=False)
class _Alone:
    """What the function gives for some examples, each alone: its results by example."""

    answers: dict[int, Any]
    # The tensors that it was given whole.
    constants: list[Tensor]
    # The ids of the plain tensors of which it was given the example's rows only.
    cut: set[int]
    # A size that names the number of rows became one.
    counted: bool


class Call:
    """One function as it was called.

    One example is tried before the call itself, for an in-place function changes its arguments.
    """

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Traced]
    ) -> None:
        self.func, self.args, self.kwargs, self.operands = func, args, kwargs, operands
        self.name = getattr(func, "__name__", str(func)).strip("_")
        if self.name in ("iadd", "isub", "imul", "itruediv", "idiv", "radd", "rmul"):
            self.name = self.name[1:]
        self.known = joined([operand.known for operand in operands])
        self._alone: list[_Alone] = []
        if isinstance(self.known, Rows):
            self._alone = list(self._each_alone(self.known))

    def trace_of(self, result: Tensor, part: int | None = None) -> Trace:
        """What is known of the result, or of one part of it."""
        if isinstance(self.known, Mixed):
            return self.known
        if "out" in self.kwargs or "alpha" in self.kwargs:
            return Mixed(f"{self.name} with out or alpha cannot be followed")
        if isinstance(self.known, Total):
            return self._of_totals(self.known)
        return self._of_rows(self.known, result, part)

    def _of_rows(self, known: Rows, result: Tensor, part: int | None) -> Trace:
        """Whether the result is rows again, or a sum or mean of them, or neither."""
        reason = weighted(self.func, self.args, self.kwargs)
        if reason:
            return Mixed(reason)
        for alone in self._alone:
            found = {
                _dimension(result, answer, part, example, known.examples)
                for example, answer in alone.answers.items()
            }
            dim = found.pop()
            if dim is not None and not found:
                return Rows(known.examples, dim, known.settings + self._settings(alone))
        for alone in self._alone if result.requires_grad and part is None else ():
            if all(getattr(a, "shape", None) == result.shape for a in alone.answers.values()):
                divided = self._share(known, alone)
                if divided is not ...:
                    return Total(known.examples, divided, known.settings + self._settings(alone))
        return Mixed(
            f"{self.name} of the whole batch is not what it is of one example alone, nor the sum "
            "or the mean of that"
        )

    def _of_totals(self, known: Total) -> Trace:
        """A sum over the batch, if the function is linear in it."""
        if any(isinstance(operand.known, Rows) for operand in self.operands):
            return Mixed(f"{self.name} joins a sum over the batch with rows of it")
        if self.name in _LINEAR | _SUMS:
            return known
        others = [v for v in leaves((self.args, self.kwargs)) if not isinstance(v, Traced)]
        alone = len(self.operands) == 1 and len(others) > 0
        if alone and self.name in _PRODUCTS:
            return scaled(known, others[0], divides=False)
        if alone and self.name in _QUOTIENTS and self.args[0] is self.operands[0]:
            return scaled(known, others[0], divides=True)
        return Mixed(f"{self.name} of a sum over the batch is no sum over the batch")

    def _settings(self, alone: _Alone) -> tuple[Setting, ...]:
        """The values that the function was given beside the rows."""
        found: list[Setting] = []
        if self.name in _ARITHMETIC:
            values = leaves((self.args, self.kwargs))
            found += [Setting(self.name, float(v)) for v in values if is_number(v)]
        examples = next(iter(o.known.examples for o in self.operands if isinstance(o.known, Rows)))
        for constant in alone.constants:
            doubtful = constant.dim() > 0 and len(constant) % examples == 0
            found.append(Setting(self.name, constant.clone(), doubtful))
        return tuple(found)

    def _each_alone(self, known: Rows) -> Iterator[_Alone]:
        """The function of one example, for each reading of its arguments that works."""
        # Two: the first row of a running sum, alone, is what it is in the batch.
        first = secrets.randbelow(known.examples)
        second = (first + 1 + secrets.randbelow(known.examples - 1)) % known.examples
        for cut in self._ways(known.examples):
            for counted in (False, True):
                constants: list[Tensor] = []
                answers: dict[int, Any] = {}
                try:
                    with torch.no_grad(), _quiet():
                        for example in (first, second):
                            constants = []
                            args, kwargs = self._one(example, cut, counted, torch.clone, constants)
                            answers[example] = self.func(*args, **kwargs)
                except Exception:  # noqa: S112  (whatever a function says to one row)
                    continue
                constants = [constant.detach() for constant in constants]
                yield _Alone(answers, constants, cut, counted)
                break

    def _ways(self, examples: int) -> list[set[int]]:
        """Which plain tensors may hold a row an example: all that could, none, or one of them."""
        plain = [
            id(value)
            for value in leaves((self.args, self.kwargs))
            if isinstance(value, Tensor) and not isinstance(value, Traced)
            if value.dim() > 0 and len(value) > 0 and len(value) % examples == 0
        ]
        ways = [set(plain)]
        for way in (set[int](), *({one} for one in plain)):
            if way not in ways:
                ways.append(way)
        return ways

    def _one(
        self,
        example: int,
        cut: set[int],
        counted: bool,
        convert: Callable[[Tensor], Tensor],
        constants: list[Tensor],
    ) -> Any:
        """The arguments with one example's rows; the tensors that stay whole are noted."""
        assert isinstance(self.known, Rows), "only rows are cut"
        examples = self.known.examples
        # The rows' own numbers, as an index before the labels; labels can look like them.
        counting = None
        if counted and self.name == "getitem":
            tensors = [value for value in leaves(self.args[1:]) if isinstance(value, Tensor)]
            counting = next((id(value) for value in tensors if _counts(value, examples)), None)

        def one(value: Any) -> Any:
            if isinstance(value, Traced) and isinstance(value.known, Rows):
                return convert(_block(_plain(value), value.known.dim, example, examples))
            if isinstance(value, Tensor) and id(value) == counting:
                return torch.arange(1, device=value.device)
            if isinstance(value, Tensor) and id(value) in cut:
                return convert(_block(value, 0, example, examples))
            if isinstance(value, Tensor):
                constants.append(value)
                return convert(value)
            if isinstance(value, range | list) and list(value) == list(range(examples)):
                return [0]
            return 1 if counted and type(value) is int and value == examples else value

        return _mapped(self.args, one), _mapped(self.kwargs, one)

    def _share(self, known: Rows, alone: _Alone) -> bool | EllipsisType | None:
        """Whether a reduction is a mean (True) or a sum (False) of rows, or neither (Ellipsis).

        Tested are rows that have a gradient, and one that has none: alone it must have none too.
        """
        whole = self._gradients(None, alone)
        if whole is None:
            return ...
        dims = [
            operand.known.dim
            for operand in self.operands
            if isinstance(operand.known, Rows) and operand.is_floating_point()
        ]
        marks = [
            g.movedim(dim, 0).reshape(known.examples, -1).ne(0).any(1)
            for g, dim in zip(whole, dims, strict=True)
        ]
        mark = torch.stack(marks).any(0).tolist()
        moved = [example for example, moves in enumerate(mark) if moves]
        still = [example for example, moves in enumerate(mark) if not moves]
        asked = [secrets.choice(moved), secrets.choice(moved)] if moved else []
        verdicts: set[bool] = set()
        for example in (*asked, *([secrets.choice(still)] if still else [])):
            own = self._gradients(example, alone)
            if own is None:
                return ...
            blocks = [
                _block(g, d, example, known.examples) for g, d in zip(whole, dims, strict=True)
            ]
            pairs = list(zip(blocks, own, strict=True))
            mean = all(_same(known.examples * block, g) for block, g in pairs)
            if not mean and not all(_same(block, g) for block, g in pairs):
                return ...
            if mark[example]:
                verdicts.add(mean)
        return ... if len(verdicts) > 1 else next(iter(verdicts), None)

    def _gradients(self, example: int | None, alone: _Alone) -> list[Tensor] | None:
        """Gradients at the rows, of one example alone or of the whole batch."""
        exact = sum(operand.numel() for operand in self.operands) <= _EXACT_ELEMENTS

        def copied(value: Tensor) -> Tensor:
            value = _plain(value).detach()
            return value.double() if exact and value.is_floating_point() else value.clone()

        def whole(value: Any) -> Any:
            return copied(value) if isinstance(value, Tensor) else value

        if example is None:
            args, kwargs = _mapped(self.args, whole), _mapped(self.kwargs, whole)
        else:
            args, kwargs = self._one(example, alone.cut, alone.counted, copied, [])
        pairs = zip(leaves((self.args, self.kwargs)), leaves((args, kwargs)), strict=True)
        rows = [
            value.requires_grad_()
            for old, value in pairs
            if isinstance(old, Traced) and old.is_floating_point()
        ]
        try:
            with torch.enable_grad(), _quiet():
                result = self.func(*args, **kwargs)
                found = torch.autograd.grad(result.sum(), rows, allow_unused=True)
        except Exception:
            return None
        return [torch.zeros_like(r) if g is None else g for g, r in zip(found, rows, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings: a function that is called again has given them already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dimension(
    result: Tensor, alone: Any, part: int | None, example: int, examples: int
) -> int | None:
    """The dimension of the result in which stands what the example gives alone, if any."""
    if part is not None:
        alone = alone[part] if part < len(alone) else None
    result = _plain(result).detach()
    if not isinstance(alone, Tensor):
        return None
    for dim in range(result.dim()):
        if result.shape[dim] == 0 or result.shape[dim] % examples:
            continue
        block = _block(result, dim, example, examples)
        if block.shape == alone.shape and _same(block, alone):
            return dim
        flat = dim == 0 and block.numel() == alone.numel()
        if flat and _same(block.reshape(-1), alone.reshape(-1)):
            return dim
    return None


def _block(tensor: Tensor, dim: int, example: int, examples: int) -> Tensor:
    size = tensor.shape[dim] // examples
    return tensor.narrow(dim, example * size, size)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if first.shape != second.shape:
        return False
    tolerance = _TOLERANCES.get(first.dtype, _HALF_TOLERANCE)
    first, second = first.detach().double(), second.detach().double()
    finite = first[first.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _counts(tensor: Tensor, examples: int) -> bool:
    """Whether a tensor counts the rows, as an index beside the labels does."""
    if tensor.dim() != 1 or tensor.is_floating_point() or len(tensor) != examples:
        return False
    return bool((tensor == torch.arange(examples, device=tensor.device)).all())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, Traced) else tensor


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dictionaries with every leaf changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and _holds_tensors(value)):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)


def _holds_tensors(value: list[Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a nest of tuples, lists and dictionaries."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple) or (isinstance(value, list) and _holds_tensors(value)):
        for item in value:
            yield from leaves(item)
    else:
        yield value
