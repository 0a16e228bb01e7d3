"""A network that the command line names: one of ours, or what the user's own code makes.

Naming a module or a file runs it, as Python would. Only the person at the command line can: nothing
that comes out of a checkpoint or a record ever gets here.
"""

import difflib
import importlib
import importlib.machinery
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias, cast

import typer
from torch import nn

import privacy
from secure_cnn.data import DataSpec
from secure_cnn.errors import ModelError
from secure_cnn.models import MODELS, Architecture
from secure_cnn.own_network import OwnNetwork, are_options
from secure_cnn.recipe.ranges import AUTO

__all__ = ["MODEL_HELP", "ModelName", "ModelOptions", "network", "own_network", "settings_of"]

MODEL_HELP = (
    f"One of {', '.join(MODELS)} (handcrafted is for private training, banded for robust training "
    "against changes of up to 0.1); or torchvision:NAME, package.module:function or "
    "file.py:function, which runs that code. +group-norm behind it replaces BatchNorm."
)

ModelName: TypeAlias = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
ModelOptions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option", help="NAME=VALUE for the function behind --model; may be repeated."
    ),
]

_FIX = "+group-norm"
_TORCHVISION = "torchvision.models"


def network(text: str, spec: DataSpec, options: Sequence[str] = ()) -> nn.Module:
    """The network of that name for data of this `spec`, in the name's own words.

    Guarantee: it takes the data's images and gives a logit for each class, or it is refused.
    """
    own = own_network(text, options)
    name = text if own is None else own.name
    architecture = Architecture.for_data(name, spec, options={} if own is None else own.options)
    made = architecture.build(network=own)
    cast(Any, made).name = name
    return made


def own_network(text: str, options: Sequence[str] = ()) -> OwnNetwork | None:
    """What is named: `module:callable` or `file.py:callable`; None for one of ours.

    The network's name says which file it was, and not where that is: records and figures are passed
    on.
    """
    where, colon, name = text.removesuffix(_FIX).rpartition(":")
    if not colon:
        if text not in (AUTO, *MODELS):
            raise ModelError(
                f"--model: expected one of {', '.join(MODELS)}, torchvision:NAME, module:callable "
                f"or file.py:callable, got {text}{_cure(text)}"
            )
        if options:
            raise ModelError(f"--model-option: {text} takes none, got {options[0]}; leave it out")
        return None
    where = _TORCHVISION if where == "torchvision" else where
    module = _module(where)
    make = getattr(module, name, None)
    if not callable(make):
        raise ModelError(
            f"{text}: expected a function or a class of that name in it, found none; "
            f"{_others(module, name)}"
        )
    if where.startswith(_TORCHVISION):
        make = _with_classes(make)
    fix = _FIX if text.endswith(_FIX) else ""
    return OwnNetwork(
        name=f"{Path(where).name if where.endswith('.py') else where}:{name}{fix}",
        make=_fixed(make) if fix else make,
        options=dict(map(_option, options)),
    )


def _cure(text: str) -> str:
    """What to type instead, where a name without a colon tells what is meant."""
    if text.endswith(".py"):
        return f"; name the function in it that makes the network, as {text}:FUNCTION"
    return f"; torchvision's, where it is installed, is torchvision:{text}"


def _others(module: ModuleType, name: str) -> str:
    """What a module has instead: the nearest names first."""
    names = [
        each for each in vars(module) if not each.startswith("_") and callable(vars(module)[each])
    ]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:4]
    return f"it has {', '.join(near)}" if near else "it has none at all: write one that returns it"


def settings_of(network: OwnNetwork | None) -> dict[str, Any]:
    """How a recipe names the network; nothing where it is one of ours."""
    return {} if network is None else {"model": network.name, "model_options": network.options}


def _module(where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        module = ModuleType(Path(where).stem)
        importlib.machinery.SourceFileLoader(module.__name__, where).exec_module(module)
    except FileNotFoundError as error:
        raise ModelError(
            f"{where}: expected a file with the function that makes the network, found no such "
            "file; give its path from here, as models/nets.py:small"
        ) from error
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise ModelError(
            f"{where}: expected a module or a file that can be imported, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return module


def _with_classes(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder of torchvision, which takes the number of classes and does not say so."""

    def made(*, num_classes: int, **options: Any) -> nn.Module:
        return make(num_classes=num_classes, **options)

    cast(Any, made).__signature__ = inspect.signature(made)  # this one's, and not
    cast(Any, made).__wrapped__ = make  # of what it calls, whose file counts
    return made


def _fixed(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same network with GroupNorm where it had BatchNorm, which mixes examples."""

    def made(*arguments: Any, **options: Any) -> nn.Module:
        return privacy.fix(make(*arguments, **options))

    cast(Any, made).__wrapped__ = make  # whose arguments it takes
    return made


def _option(text: str) -> tuple[str, Any]:
    """A name and its value: what JSON reads as a value, else the text itself."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise ModelError(f"--model-option: expected NAME=VALUE, got {text}")
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return name, value
    return name, read if are_options({name: read}) else value
