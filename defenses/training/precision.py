"""The precision of an attack's convolutions, where the rest of the model stays as it is.

Convolutions are most of an attack, and matrix units (AMX, tensor cores) do them several times as
fast in bfloat16; normalisation and pooling gain nothing from it, and lose precision. The attack's
images are used at full precision, and so are the losses on them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from defenses.errors import AttackError
from defenses.quantities import is_word, shown

__all__ = ["Precision", "check_precision", "convolutions_in"]

Precision = Literal["float32", "bfloat16"]


def check_precision(precision: object) -> None:
    """Refuses a precision that there is not.

    Raises:
        AttackError: Neither `"float32"` nor `"bfloat16"`.
    """
    if not is_word(precision, get_args(Precision)):
        known = " or ".join(get_args(Precision))
        raise AttackError(f"precision: expected {known}, got {shown(precision)}")


@contextmanager
def convolutions_in(precision: Precision) -> Iterator[None]:
    """Within it, two-dimensional convolutions of float32 images are computed in a precision.

    Their results are float32 again, and so are the gradients that come back. It holds in the
    calling thread; a model in another dtype is left alone.
    """
    if precision == "float32":
        yield
        return
    with _Bfloat16Convolutions():
        yield


class _Bfloat16Convolutions(TorchFunctionMode):
    """Turns what `conv2d` is given."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is not torch.conv2d:
            return func(*args, **given)
        everything = [*args, *given.values()]
        if any(isinstance(each, Tensor) and each.dtype != torch.float32 for each in everything):
            return func(*args, **given)
        short = [_short(each) for each in args]
        return func(*short, **{key: _short(each) for key, each in given.items()}).float()


def _short(value: Any) -> Any:
    """A tensor in bfloat16; anything else as it is."""
    return value.bfloat16() if isinstance(value, Tensor) else value
