"""What types do not tell: a model is run on a few images, and asked whether its rows are examples.

`probe` changes one example and looks at the others; `rehearse` runs one backward pass as training
will. A layer that mixes examples in some passes only (MixStyle, say) is not seen in one: where a
model draws, many are looked at.
"""

import random
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from privacy.clipping.held import cure, kept, marks, plain_tensors, remade
from privacy.clipping.tape import Tape
from privacy.clipping.watch import Watch
from privacy.differentiation import check_rows, differentiate, halves
from privacy.errors import PrivacyError, UnsupportedLayer
from privacy.validate import check_layers

__all__ = ["probe", "random_states_kept", "rehearse"]

_PROBE_TOLERANCE = 1e-4
_ROWS = (2, 3, 5)
_PASSES = 96
"""What mixes in one of 20 passes is seen in one of these with a probability of 99 percent."""
_APART = 997
"""Numbers passed over between two passes: the next one begins elsewhere."""


def probe(model: nn.Module, images: Tensor) -> None:
    """Changes each example in turn and looks whether the others' outputs move, or the model itself.

    The model stays as it is, the random states too. What depends on other examples only in rare
    inputs can pass. A model that draws random numbers is asked in 96 passes more: a layer that
    mixes in one of 20 is seen with 99 percent. In the end the first images are asked about again:
    what they leave in the model, and their outputs, may not depend on what was seen before them. Of
    one example alone only the model itself is watched.
    """
    images, put_back = images.nan_to_num(), kept(model)
    with _state_kept(model) as written, torch.no_grad():
        before = _run(model, images)
        left = {name: tensor.clone() for name, tensor in plain_tensors(model).items()}
        after = [
            (row, _run(model, changed, finite=False))
            for row in range(len(images))
            for changed in _changed(images, row)
        ]
        at_random = _moved_at_random(model, images)
        again = _run(model, images)
        carried = _carried(model, left)
        put_back(carried)
    if written := [*written, *carried]:
        raise UnsupportedLayer(
            f"a forward pass in the present modes writes to {', '.join(written)}: statistics of "
            f"the examples may leave without noise; {cure(written)}"
        )
    rows = torch.arange(len(images), device=images.device)
    moved = [_difference(before, each, rows != row) for row, each in after if len(images) > 1]
    if most := max([*moved, at_random]):
        raise UnsupportedLayer(
            f"{type(model).__name__}: changing one example moved the output of the others by "
            f"{most:.3g}{'' if any(moved) else ' in some passes'}: a layer mixes examples, so no "
            "per-example gradient exists; look for statistics or products over dimension "
            "0, and for what refers to a certain row"
        )
    if difference := _difference(before, again):
        raise UnsupportedLayer(
            f"{type(model).__name__}: the same images gave outputs that differ by "
            f"{difference:.3g} after others had been seen: a forward pass keeps something of the "
            "examples for the next one, or draws from a generator of its own; use layers that "
            "keep nothing"
        )


def _moved_at_random(model: nn.Module, images: Tensor) -> float:
    """How far other rows' outputs moved in some pass of a model that draws numbers, or zero."""
    if len(images) < 2 or not _draws(model, images):
        return 0.0
    others = 1 - images * 0.5 if images.is_floating_point() else images.roll(1, 0)
    pairs = _drawn_alike(lambda rows: _run(model, rows, finite=False), images, others)
    with closing(pairs):
        return next((moved for pair in pairs if (moved := _difference(*pair))), 0.0)


def _carried(model: nn.Module, left: Mapping[str, Tensor]) -> list[str]:
    """Plain tensors that differ from what the same pass left before: they gather statistics."""
    return [
        name
        for name, tensor in plain_tensors(model).items()
        if name in left
        and (
            (tensor.shape, tensor.dtype, tensor.device)
            != (left[name].shape, left[name].dtype, left[name].device)
            or _difference(left[name], tensor) > 0
        )
    ]


def _changed(images: Tensor, row: int) -> Iterator[Tensor]:
    """The images with one of them replaced: moderately, by nothing, by more than any other."""
    # Whole numbers may be indices: another example's are surely in range.
    others = [images[row - 1]]
    if images.is_floating_point():
        others = [1 - images[row] * 0.5, images[row] * 0, 2 * images[row] + images.abs().max()]
    for other in others:
        yield torch.cat([images[:row], other[None], images[row + 1 :]])


def _difference(before: Tensor, after: Tensor, rows: Tensor | None = None) -> float:
    """How far two tensors, or some of their rows, differ beyond rounding, or zero."""
    if not before.numel():
        return 0.0
    if not (before.is_floating_point() or before.is_complex()):
        before, after = before.double(), after.double()
    # What is not finite may be meant: a mask of -inf.
    same = (before == after) | (before.isnan() & after.isnan())
    apart = (before - after).abs().masked_fill(same, 0).nan_to_num(nan=float("inf"))
    difference = (apart if rows is None else apart[rows]).amax().item()
    largest = before.abs().nan_to_num(0, 0, 0).amax().item()
    return difference if difference > _PROBE_TOLERANCE * max(1.0, largest) else 0.0


def rehearse(
    model: nn.Module, images: Tensor, parameters: Mapping[str, nn.Parameter], tape: Tape
) -> None:
    """Runs one backward pass as training will, then asks with 2, 3 and 5 rows whose rows are whose.

    A trainable parameter that is not used is refused: it would be trained on noise alone. From here
    on the tape's watch compares the model with what it is now.
    """
    before = marks(model)
    with torch.enable_grad():
        losses = _run(model, images.nan_to_num()).reshape(len(images), -1).sum(1)
        reached = differentiate(losses, parameters, tape, examples=len(images))
    _check_rows(model, images, tape)
    unused = [name for name, parameter in parameters.items() if parameter not in reached]
    if unused:
        raise UnsupportedLayer(
            f"{', '.join(unused)}: trainable, but not used in the model's forward through the "
            "layer that owns it; freeze it with requires_grad_(False), or call that layer"
        )

    def prove() -> None:
        check_layers(model)
        probe(model, images)
        _check_rows(model, images, tape)

    refuse = partial(check_layers, model)
    tape.watched(Watch(model, refuse=refuse, prove=prove, remade=remade(model, before)))


def _check_rows(model: nn.Module, images: Tensor, tape: Tape) -> None:
    """Tests several numbers of rows: one of them may be that of a layer's tokens or channels."""
    for rows in _ROWS:
        repeated = images.nan_to_num()[torch.arange(rows, device=images.device) % len(images)]
        with torch.enable_grad():
            outputs = _run(model, repeated).reshape(rows, -1)
            # A sum of probabilities has no gradient.
            weights = torch.linspace(0.5, 1.5, outputs.shape[1], device=outputs.device)
            losses = (outputs * weights).sum(1)
        for chosen in halves(rows):
            check_rows(losses, tape, chosen)


def _run(model: nn.Module, images: Tensor, *, finite: bool = True) -> Tensor:
    """One forward pass; each begins at the same random state, and leaves it as it was."""
    try:
        with random_states_kept(images.device):
            output = model(images)
    except PrivacyError:
        raise
    except Exception as error:
        raise UnsupportedLayer(
            f"the model cannot run on the data set's images, {list(images.shape)} {images.dtype}: "
            f"{type(error).__name__}: {error}{_dtype_cure(model, images)}"
        ) from error
    if not isinstance(output, Tensor) or output.shape[:1] != images.shape[:1]:
        tensor = isinstance(output, Tensor)
        got = f"a tensor of shape {list(output.shape)}" if tensor else type(output).__name__
        raise UnsupportedLayer(
            f"{type(model).__name__}: expected one tensor with {len(images)} rows, one an example, "
            f"got {got}; attach a model that maps images to logits"
        )
    if finite and not bool(output.isfinite().all()):
        raise UnsupportedLayer(
            f"{type(model).__name__}: its output is not finite on the first examples of the data "
            "set; look for NaN in its weights, and for images outside [0, 1]"
        )
    return output


def _dtype_cure(model: nn.Module, images: Tensor) -> str:
    """The cure if the model's parameters and the images differ in type; else nothing."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()} - {images.dtype}
    if not own:
        return ""
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
def _state_kept(model: nn.Module) -> Iterator[list[str]]:
    """Restores parameters and buffers; afterwards the list names those that had been written."""
    before = {name: tensor.detach().clone() for name, tensor in _state(model).items()}
    written: list[str] = []
    try:
        yield written
    finally:
        for name, tensor in _state(model).items():
            # A NaN is no change.
            if name in before and not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
                tensor.detach().copy_(before[name])
                written.append(name)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


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


def _draws(model: nn.Module, images: Tensor) -> bool:
    """Whether a forward pass takes numbers from a global generator; one of the model's is not seen.

    Torch's own dropout is not counted: each of its numbers is for one element.
    """
    own = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    plain = [m for m in own if type(m).__module__.startswith("torch.nn.")]
    try:
        for module in plain:
            vars(module)["training"] = False
        with random_states_kept(images.device), torch.no_grad():
            before = _states(images.device)
            model(images)
            return before != _states(images.device)
    finally:
        for module in plain:
            vars(module)["training"] = True


@torch.no_grad()
def _drawn_alike(
    run: Callable[[Tensor], Tensor], images: Tensor, others: Tensor
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Outputs of images in two passes that draw alike, in one with `others` in every second row."""
    rows = torch.stack([images, images], 1).flatten(0, 1)
    changed = torch.stack([images, others], 1).flatten(0, 1)
    with random_states_kept(images.device):
        for _ in range(_PASSES):
            yield run(rows)[::2], run(changed)[::2]
            torch.rand(_APART, device=images.device)
            torch.rand(_APART)
            np.random.mtrand.random_sample(_APART)
            for _ in range(_APART):
                random.random()  # noqa: S311 - it passes them over


def _states(device: torch.device) -> list[Any]:
    """The global random states as values that can be compared."""
    numpy = np.random.mtrand.get_state(legacy=False)["state"]
    torches = [torch.get_rng_state()]
    if device.type == "cuda":
        torches.append(torch.cuda.get_rng_state(device))
    return [
        random.getstate(),
        {name: np.asarray(value).tolist() for name, value in numpy.items()},
        *(state.tolist() for state in torches),
    ]
