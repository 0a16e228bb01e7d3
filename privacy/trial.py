"""A trial: a model, a few examples, and how it is run on them; its outputs have their rows."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from privacy.batch import Forward, call_model, described, images_of, mapped, tensors
from privacy.errors import PlanError, PrivacyError, UnsupportedLayer

__all__ = ["Trial", "random_states_kept", "twin"]

_OUTPUTS = (
    "give privacy.attach(..., forward=lambda model, batch: ...) that returns those outputs alone "
    "of which the losses are made"
)
_CALL = (
    "; if your loop calls it otherwise, give privacy.attach(..., forward=lambda model, batch: ...) "
    "that does as the loop does"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model, a few examples of a batch's structure, and how it is run on such ones.

    The examples are tensors in any structure, dimension 0 the example; what is not finite in them
    counts as zero. A `forward` gives outputs of any structure, all with these rows.
    """

    model: nn.Module
    examples: Any
    forward: Forward = call_model
    rows: int = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", mapped(torch.nan_to_num, self.examples))
        first = next(iter(tensors(self.examples).values()))
        object.__setattr__(self, "rows", len(first))
        object.__setattr__(self, "device", first.device)

    def run(self, examples: Any, *, finite: bool = True) -> list[Tensor]:
        """One forward pass, every tensor of its outputs; the random states stay as they are."""
        try:
            with random_states_kept(self.device):
                outputs = self.forward(self.model, examples)
        except PrivacyError:
            raise
        except Exception as error:
            raise UnsupportedLayer(
                f"the model cannot run on the data set's examples, {described(examples)}: "
                f"{type(error).__name__}: {error}{_dtype_cure(self.model, examples)}"
            ) from error
        rows = len(next(iter(tensors(examples).values())))
        return self._checked(outputs, rows, finite=finite)

    def _checked(self, outputs: Any, rows: int, *, finite: bool) -> list[Tensor]:
        name = type(self.model).__name__
        try:
            found = tensors(outputs)
        except PlanError as error:
            raise UnsupportedLayer(f"{name}: outputs: {error}; {_OUTPUTS}") from error
        other = [
            f"{list(tensor.shape)}{place and f' at {place}'}"
            for place, tensor in found.items()
            if tensor.shape[:1] != (rows,)
        ]
        if other or not found:
            got = f"shape {other[0]}" if other else type(outputs).__name__
            raise UnsupportedLayer(
                f"{name}: expected outputs with {rows} rows, one an example, in every tensor, got "
                f"{got}; attach a model that maps images to logits, or {_OUTPUTS}"
            )
        if finite and not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            raise UnsupportedLayer(
                f"{name}: its output is not finite on the first examples of the data set; look for "
                "NaN in its weights, and for images outside [0, 1]"
            )
        return list(found.values())


def _dtype_cure(model: nn.Module, examples: Any) -> str:
    """The cure if the model's parameters and the images differ in type; else the way to call it."""
    images = next(iter(tensors(examples).values()))
    own = {p.dtype for p in model.parameters() if p.is_floating_point()} - {images.dtype}
    if not own:
        # As an (image, label) of tensors there is one way to give it to a model.
        return "" if isinstance(examples, Tensor) or images_of(examples) is not None else _CALL
    if not images.is_floating_point():
        return (
            "; if these whole numbers are pixels, let the data set's __getitem__ give "
            "image.float() / 255, or begin the model with a module that does: what the loop does "
            "to them is not seen here"
        )
    return (
        f"; the model's parameters are {', '.join(sorted(map(str, own)))}: convert the model, "
        f"model.to({images.dtype}), before the optimizer is made, or let the data set give images "
        "of the model's numbers"
    )


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Puts the global random states back afterwards; none is seeded."""
    python, mtrand = random.getstate(), np.random.mtrand
    numpy = mtrand.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        mtrand.set_state(numpy)


def twin(model: nn.Module) -> nn.Module:
    """A plain copy of a model, attached or not, without the graphs of activations that it keeps."""
    kept = {
        id(value): value.detach()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(model, kept)
