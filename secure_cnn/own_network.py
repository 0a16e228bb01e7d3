"""A network of one's own: whoever brings its function says its name, and both are checked.

No function is ever looked up by a name here. What a checkpoint says of such a network is text: it
is compared with what the person brings, and never called.
"""

import copy
import hashlib
import inspect
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secure_cnn.data import DataSpec
from secure_cnn.errors import ModelError
from secure_cnn.files import reading

__all__ = ["OwnNetwork", "are_options", "as_arguments", "is_own_name"]

_LONGEST_NAME = 256


def is_own_name(name: object) -> bool:
    """Whether a name can be that of a network of one's own: a text with a colon within.

    Example:
        >>> is_own_name("nets.py:small"), is_own_name("compact")
        (True, False)
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        return False
    where, _, function = name.rpartition(":")
    return bool(where and function)


def are_options(options: object) -> bool:
    """Whether these can be options: a dict of names to plain JSON values.

    Example:
        >>> are_options({"depth": 20, "wide": True}), are_options({"depth": float("nan")})
        (True, False)
    """
    if not isinstance(options, dict):
        return False
    try:
        same = json.loads(json.dumps(options, allow_nan=False)) == options
    except (TypeError, ValueError, RecursionError):
        return False
    return same and all(isinstance(name, str) and name.isidentifier() for name in options)


def as_arguments(name: str, options: Mapping[str, Any]) -> str:
    """What names the network on the command line.

    Example:
        >>> as_arguments("nets.py:small", {"depth": 20, "act": "relu"})
        '--model nets.py:small --model-option depth=20 --model-option act=relu'
    """
    words = ["--model", name]
    for option, value in options.items():
        plain = isinstance(value, str) and not _reads_as_json(value)
        words += ["--model-option", f"{option}={value if plain else json.dumps(value)}"]
    return shlex.join(words)


@final
@dataclass(frozen=True, kw_only=True)
class OwnNetwork:
    """A network that is not one of `MODELS`.

    Attributes:
        name: What it is called in records and checkpoints, as the command line would name it:
            `package.module:function` or `file.py:function`.
        make: Makes it on the CPU, with the options as keyword arguments. It gets the `DataSpec`
            first if it needs an argument that no option gives, and the number of classes where it
            has a parameter `num_classes`. What it makes takes float images `[n, *spec.shape]` in
            [0, 1] and returns logits `[n, classes]`.
        options: Plain JSON values.

    Raises:
        ModelError: The name has no colon, `make` is no function, or an option is no plain value.

    Example:
        >>> def small(spec, *, wide=1):
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(64 * wide, len(spec.classes)))
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("cat", "dog"))
        >>> network = OwnNetwork(name="nets.py:small", make=small)
        >>> network.build(spec)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 2])
    """

    name: str
    make: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not is_own_name(self.name):
            raise ModelError(
                "network: expected a name such as package.module:function or file.py:function, "
                f"got {self.name!r}"
            )
        if not callable(self.make):
            raise ModelError(
                f"{self.name}: expected a function or a class that makes a network, got "
                f"{type(self.make).__name__}"
            )
        if not are_options(self.options):
            raise ModelError(
                f"{self.name}: expected options as a dict of names and plain values (numbers, "
                "texts, true, false, lists)"
            )

    @property
    def source(self) -> str:
        """SHA-256, in hex, of the file in which the function or class is written, as it is now.

        Empty where there is none: it was typed in, or is written in C. What the file imports is not
        in it.
        """
        make = inspect.unwrap(self.make)
        # A class of a file that was loaded by its path does not know its file; its methods do.
        written = [make, *vars(make).values()] if isinstance(make, type) else [make]
        codes = (getattr(each, "__code__", None) for each in written)
        files = [Path(code.co_filename) for code in codes if code is not None]
        for file in files:
            try:
                with reading(file) as opened:
                    return hashlib.sha256(opened.read()).hexdigest()
            except (OSError, ValueError):
                continue
        return ""

    def build(self, spec: DataSpec, *, generator_seed: int = 0) -> nn.Module:
        """The network for data of this `spec`, new, in the mode in which it was made.

        Guarantee: it takes the data's images and gives a logit for each class, or is refused; where
        it draws its weights by torch on the CPU, the same seed gives the same ones, and the global
        random state is afterwards what it was.

        Raises:
            ModelError: What was made is no such network. What the function itself raises is not
                caught.
        """
        before = torch.get_rng_state()
        torch.set_rng_state(torch.Generator().manual_seed(generator_seed).get_state())
        try:
            made = self._made(spec)
            _check(made, self.name, spec)
        finally:
            torch.set_rng_state(before)
        return made

    def _made(self, spec: DataSpec) -> nn.Module:
        parameters = _parameters(self.make)
        options = dict(self.options)
        if "num_classes" in parameters:
            options.setdefault("num_classes", len(spec.classes))
        first = [spec] if _needs_argument(parameters, options) else []
        if parameters:
            _check_arguments(self.make, first, options, self.name)
        return self.make(*first, **options)


def _reads_as_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parameters(make: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except ValueError:  # a class of C says nothing
        return {}


def _check_arguments(
    make: Callable[..., object], first: Sequence[DataSpec], options: Mapping[str, object], name: str
) -> None:
    """Refuses a call that does not fit, so that whatever the function raises is its own."""
    try:
        inspect.signature(make).bind(*first, **options)
    except TypeError as error:
        raise ModelError(
            f"{name}: expected options that it takes, and all that it needs, got "
            f"{', '.join(options) or 'none'}: {error}; it is called with the spec of the data and "
            "with each --model-option NAME=VALUE (options in Python)"
        ) from error


def _needs_argument(
    parameters: Mapping[str, inspect.Parameter], options: Mapping[str, object]
) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(
        each.kind in kinds and each.default is each.empty and name not in options
        for name, each in parameters.items()
    )


def _check(made: object, name: str, spec: DataSpec) -> None:
    """Two images through a copy, which has not seen any afterwards."""
    if not isinstance(made, nn.Module):
        raise ModelError(f"{name}: expected it to make a torch module, got {type(made).__name__}")
    lazy = [each for each, tensor in made.named_parameters() if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{name}: expected a network whose parameters are there, got lazy ones: "
            f"{', '.join(lazy[:4])}; run one batch through it in the function that makes it"
        )
    if not any(True for _ in made.parameters()):
        raise ModelError(f"{name}: expected a network with parameters to train, got none")
    shape = "x".join(map(str, spec.shape))
    try:
        with torch.no_grad():
            found = copy.deepcopy(made).eval()(torch.zeros(2, *spec.shape))
    except RuntimeError as error:
        raise ModelError(
            f"{name}: expected a network for images of {shape}, got {error}"
        ) from error
    wanted = len(spec.classes)
    if not isinstance(found, Tensor) or found.shape != (2, wanted):
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(
            f"{name}: expected logits [n, {wanted}], one for each class, of {shape} images, got "
            f"{got}; take the number of classes from the spec that it is called with"
        )
