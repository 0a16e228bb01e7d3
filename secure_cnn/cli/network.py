"""A network that the command line names: one of ours, or what the user's own code makes.

Naming a module or a file runs it, as Python would. Only the person at the command line can: nothing
that comes out of a checkpoint ever gets here.
"""

import copy
import importlib
import importlib.machinery
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError
from secure_cnn.models import MODELS, build_model

__all__ = ["network"]


def network(text: str, spec: DataSpec) -> nn.Module:
    """The network of that name, `module:callable` or `file.py:callable`, in the name's own words.

    The callable is called with the shape and classes of the data where it needs an argument.

    Guarantee: it takes the data's images and gives a logit for each class at least, or it is
    refused.
    """
    where, colon, name = text.rpartition(":")
    if not colon:
        if text not in MODELS:
            raise RunError(
                f"--model: expected one of {', '.join(MODELS)}, module:callable or "
                f"file.py:callable, got {text}"
            )
        return _named(build_model(text, spec), text)
    make = getattr(_module(where), name, None)
    if not callable(make):
        raise RunError(f"{text}: expected a function or a class of that name in it, found none")
    made = make(spec) if _needs_argument(make) else make()
    if not isinstance(made, nn.Module):
        raise RunError(f"{text}: expected it to make a torch module, got {type(made).__name__}")
    _check(made, text, spec)
    # Figures are passed on: they name the file, not the folders of one machine.
    return _named(made, f"{Path(where).stem if where.endswith('.py') else where}:{name}")


def _module(where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        module = ModuleType(Path(where).stem)
        importlib.machinery.SourceFileLoader(module.__name__, where).exec_module(module)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise RunError(
            f"{where}: expected a module or a file that can be imported, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return module


def _needs_argument(make: Callable[..., object]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(make).parameters.values()
    return any(each.kind in kinds and each.default is each.empty for each in parameters)


def _check(made: nn.Module, text: str, spec: DataSpec) -> None:
    """Two images through a copy, which has not seen any afterwards."""
    shape = "x".join(map(str, spec.shape))
    try:
        with torch.no_grad():
            found = copy.deepcopy(made).eval()(torch.zeros(2, *spec.shape))
    except RuntimeError as error:
        raise RunError(f"{text}: expected a network for images of {shape}, got {error}") from error
    wanted = len(spec.classes)
    fits = isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] >= wanted
    if not fits:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RunError(
            f"{text}: expected logits [n, {wanted} or more] of {shape} images, got {got}"
        )


def _named(made: nn.Module, name: str) -> nn.Module:
    cast(Any, made).name = name
    return made
