"""What types do not tell: a model is run on a few examples, and asked whether its rows are they.

`probe` changes one example and looks at the others; `rehearse` runs one backward pass as training
will. A layer that mixes examples in some passes only (MixStyle, say) is not seen in one: where a
model draws, many are looked at.
"""

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from privacy.batch import cut_rows, mapped, tensors
from privacy.clipping.held import cure, kept, marks, plain_tensors, remade
from privacy.clipping.tape import Tape
from privacy.clipping.watch import Watch
from privacy.differentiation import check_rows, differentiate, halves
from privacy.errors import UnsupportedLayer
from privacy.trial import Trial, random_states_kept
from privacy.validate import check_layers

__all__ = ["probe", "rehearse"]

_PROBE_TOLERANCE = 1e-4
_ROWS = (2, 3, 5)
_PASSES = 96
"""What mixes in one of 20 passes is seen in one of these with a probability of 99 percent."""
_APART = 997
"""Numbers passed over between two passes: the next one begins elsewhere."""


def probe(trial: Trial) -> None:
    """Changes each example in turn and looks whether the others' outputs move, or the model itself.

    The model stays as it is, the random states too. What depends on other examples only in rare
    inputs can pass. A model that draws random numbers is asked in 96 passes more: a layer that
    mixes in one of 20 is seen with 99 percent. In the end the first images are asked about again:
    what they leave in the model, and their outputs, may not depend on what was seen before them. Of
    one example alone only the model itself is watched.
    """
    model, examples, put_back = trial.model, trial.examples, kept(trial.model)
    with _state_kept(model) as written, torch.no_grad():
        before = trial.run(examples)
        left = {name: tensor.clone() for name, tensor in plain_tensors(model).items()}
        after = [
            (row, trial.run(changed, finite=False))
            for row in range(trial.rows)
            for changed in _changed(examples, row)
        ]
        at_random = _moved_at_random(trial)
        again = trial.run(examples)
        carried = _carried(model, left)
        put_back(carried)
    if written := [*written, *carried]:
        raise UnsupportedLayer(
            f"a forward pass in the present modes writes to {', '.join(written)}: statistics of "
            f"the examples may leave without noise; {cure(written)}"
        )
    rows = torch.arange(trial.rows, device=trial.device)
    moved = [_apart(before, each, rows != row) for row, each in after if trial.rows > 1]
    if most := max([*moved, at_random]):
        raise UnsupportedLayer(
            f"{type(model).__name__}: changing one example moved the output of the others by "
            f"{most:.3g}{'' if any(moved) else ' in some passes'}: a layer mixes examples, so no "
            "per-example gradient exists; look for statistics or products over dimension "
            "0, and for what refers to a certain row"
        )
    if difference := _apart(before, again):
        raise UnsupportedLayer(
            f"{type(model).__name__}: the same images gave outputs that differ by "
            f"{difference:.3g} after others had been seen: a forward pass keeps something of the "
            "examples for the next one, or draws from a generator of its own; use layers that "
            "keep nothing"
        )


def _moved_at_random(trial: Trial) -> float:
    """How far other rows' outputs moved in some pass of a model that draws numbers, or zero."""
    if trial.rows < 2 or not _draws(trial):
        return 0.0
    pairs = _drawn_alike(trial)
    with closing(pairs):
        return next((moved for pair in pairs if (moved := _apart(*pair))), 0.0)


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


def _changed(examples: Any, row: int) -> Iterator[Any]:
    """The examples with one of them replaced: moderately, by nothing, by more than any other."""

    def replaced(other: Callable[[Tensor], Tensor]) -> Any:
        return mapped(lambda t: torch.cat([t[:row], other(t)[None], t[row + 1 :]]), examples)

    def but_indices(other: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        # Whole numbers may be indices: another example's are surely in range.
        return lambda t: other(t) if t.is_floating_point() else t[row - 1]

    if not any(tensor.is_floating_point() for tensor in tensors(examples).values()):
        yield replaced(lambda t: t[row - 1])
        return
    yield replaced(but_indices(lambda t: 1 - t[row] * 0.5))
    yield replaced(but_indices(lambda t: t[row] * 0))
    yield replaced(but_indices(lambda t: 2 * t[row] + t.abs().max()))


def _apart(before: Sequence[Tensor], after: Sequence[Tensor], rows: Tensor | None = None) -> float:
    """How far some tensors of two outputs differ beyond rounding, at most, or zero."""
    shapes = [[tensor.shape for tensor in outputs] for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max(_difference(a, b, rows) for a, b in zip(before, after, strict=True))


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


def rehearse(trial: Trial, parameters: Mapping[str, nn.Parameter], tape: Tape) -> None:
    """Runs one backward pass as training will, then asks with 2, 3 and 5 rows whose rows are whose.

    A trainable parameter that is not used is refused: it would be trained on noise alone. From here
    on the tape's watch compares the model with what it is now.
    """
    model, before = trial.model, marks(trial.model)
    with torch.enable_grad():
        losses = _weighed(trial.run(trial.examples), trial.rows, weights=False)
        reached = differentiate(losses, parameters, tape, examples=trial.rows)
    _check_rows(trial, tape)
    unused = [name for name, parameter in parameters.items() if parameter not in reached]
    if unused:
        raise UnsupportedLayer(
            f"{', '.join(unused)}: trainable, but not used in the model's forward through the "
            "layer that owns it; freeze it with requires_grad_(False), or call that layer"
        )

    def prove() -> None:
        check_layers(model)
        probe(trial)
        _check_rows(trial, tape)

    refuse = partial(check_layers, model)
    tape.watched(Watch(model, refuse=refuse, prove=prove, remade=remade(model, before)))


def _check_rows(trial: Trial, tape: Tape) -> None:
    """Tests several numbers of rows: one of them may be that of a layer's tokens or channels."""
    for rows in _ROWS:
        repeated = torch.arange(rows, device=trial.device) % trial.rows
        with torch.enable_grad():
            losses = _weighed(trial.run(cut_rows(trial.examples, repeated)), rows)
        for chosen in halves(rows):
            check_rows(losses, tape, chosen)


def _weighed(outputs: Sequence[Tensor], rows: int, *, weights: bool = True) -> Tensor:
    """One loss a row, of all real outputs.

    With weights, for a sum of probabilities has no gradient.
    """
    real = [output.reshape(rows, -1) for output in outputs if output.is_floating_point()]
    if not real:
        raise UnsupportedLayer(
            f"expected real numbers in the model's outputs, got {outputs[0].dtype}: what has no "
            "gradient cannot be trained"
        )
    joined = torch.cat([output.to(real[0]) for output in real], 1)
    if weights:
        joined = joined * torch.linspace(0.5, 1.5, joined.shape[1], device=joined.device)
    return joined.sum(1)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[list[str]]:
    """Restores parameters and buffers; afterwards the list names those that had been written."""
    before = {name: tensor.detach().clone() for name, tensor in _state(model).items()}
    written: list[str] = []
    try:
        yield written
    finally:
        for name, tensor in _state(model).items():
            if name in before and tensor.shape != before[name].shape:
                tensor.data = before[name]
                written.append(name)
            # A NaN is no change.
            elif name in before and not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
                tensor.detach().copy_(before[name])
                written.append(name)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _draws(trial: Trial) -> bool:
    """Whether a forward pass takes numbers from a global generator; one of the model's is not seen.

    Torch's own dropout is not counted: each of its numbers is for one element.
    """
    own = [m for m in trial.model.modules() if isinstance(m, _DropoutNd) and m.training]
    plain = [m for m in own if type(m).__module__.startswith("torch.nn.")]
    try:
        for module in plain:
            vars(module)["training"] = False
        with random_states_kept(trial.device), torch.no_grad():
            before = _states(trial.device)
            trial.forward(trial.model, trial.examples)
            return before != _states(trial.device)
    finally:
        for module in plain:
            vars(module)["training"] = True


@torch.no_grad()
def _drawn_alike(trial: Trial) -> Generator[tuple[list[Tensor], list[Tensor]], None, None]:
    """Outputs in two passes that draw alike, in one with other examples in every second row."""

    def beside(other: Callable[[Tensor], Tensor]) -> Any:
        return mapped(lambda t: torch.stack([t, other(t)], 1).flatten(0, 1), trial.examples)

    def another(tensor: Tensor) -> Tensor:
        return 1 - tensor * 0.5 if tensor.is_floating_point() else tensor.roll(1, 0)

    batches = beside(lambda tensor: tensor), beside(another)
    with random_states_kept(trial.device):
        for _ in range(_PASSES):
            same, changed = (
                [output[::2] for output in trial.run(batch, finite=False)] for batch in batches
            )
            yield same, changed
            torch.rand(_APART, device=trial.device)
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
