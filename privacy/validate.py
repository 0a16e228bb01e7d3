"""Which layers mix examples, by dotted name, and what to put instead.

A per-example gradient exists only where each output row depends on its own input row, and a model
is private only where nothing but the noised step writes to it. Both are checked: by type, by a
probe that changes one example and looks at the others, and by a rehearsal of one backward pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from privacy.clipping.held import cure, kept, marks, plain_tensors, remade
from privacy.clipping.tape import Tape
from privacy.clipping.watch import Watch
from privacy.differentiation import differentiate
from privacy.errors import PrivacyError, StepError, UnsupportedLayer
from privacy.inputs import check_hooks, check_model, check_module, check_optimizer
from privacy.randomness import drawn_alike, draws, random_states_kept
from privacy.rows import check_rows, halves

__all__ = [
    "check_layers",
    "check_trainable",
    "mixing_layers",
    "probe",
    "rehearse",
    "trainable_parameters",
]

_PROBE_TOLERANCE = 1e-4
_ROWS = (2, 3, 5)


def mixing_layers(model: nn.Module) -> dict[str, str]:
    """Finds layers that, in their present mode, mix examples or keep statistics of them.

    Args:
        model: Any module.

    Returns:
        Dotted name to what is wrong and the cure, empty where nothing is.

    Raises:
        StepError: It is no module.

    Example:
        >>> sorted(mixing_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))))
        ['1']
        >>> mixing_layers(nn.BatchNorm2d(4).eval().requires_grad_(False))
        {}
    """
    found = {}
    for name, layer in check_module(model).named_modules():
        label = name or type(layer).__name__
        kind = type(layer).__name__
        if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
            found[label] = (
                f"{kind} mixes examples; put GroupNorm in its place with privacy.fix(model), "
                "or freeze it: layer.eval() before every step"
            )
        elif isinstance(layer, _InstanceNorm) and layer.track_running_stats and layer.training:
            found[label] = (
                f"{kind} keeps running statistics of the examples without noise; set "
                "track_running_stats=False"
            )
    return found


def check_layers(model: nn.Module) -> None:
    """Refuses a model with layers that mix examples.

    Raises:
        UnsupportedLayer: Names every such layer and its cure.
        StepError: It is no module.

    Example:
        >>> check_layers(nn.Linear(2, 2))
    """
    found = mixing_layers(model)
    if found:
        raise UnsupportedLayer("; ".join(f"{name}: {what}" for name, what in found.items()))


def trainable_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by dotted name, given that the optimizer steps all of them.

    Raises:
        StepError: There is none, the optimizer lacks some or holds others or cannot step on
            gradients alone, they lie on several devices or have hooks, or the model is not the
            module itself.
        UnsupportedLayer: A parameter has no values yet, or other ones than real numbers.
    """
    check_model(model)
    check_optimizer(optimizer)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise StepError("the model has no trainable parameter: there is nothing to train")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named.items() if id(p) not in held]
    strangers = len(held - {id(p) for p in model.parameters()})
    if missing or strangers:
        raise StepError(
            "optimizer: expected exactly the model's trainable parameters; it lacks "
            f"{', '.join(missing) or 'none'} and holds {strangers} that are not the model's; build "
            "it from model.parameters()"
        )
    check_hooks(named)
    return named


def check_trainable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses a model whose trainable parameters are no longer `parameters`.

    A parameter that became trainable later would be stepped by its raw gradient, without noise.

    Raises:
        StepError: Names the parameters that were added, replaced, frozen, unfrozen or hooked.
    """
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    changed = [n for n in {*now, *parameters} if now.get(n) is not parameters.get(n)]
    if changed:
        raise StepError(
            f"{', '.join(sorted(changed))}: trainable when the model was attached or now, but not "
            "both; freeze and unfreeze parameters before attach, or attach again"
        )
    check_hooks(parameters)


def probe(model: nn.Module, images: torch.Tensor) -> None:
    """Changes each example in turn and looks whether the others' outputs move, or the model itself.

    The model stays as it is, the random states too. What depends on other examples only in rare
    inputs can pass. A model that draws random numbers is asked in 96 passes more: a layer that
    mixes in one of 20 is seen with 99 percent. In the end the first images are asked about again:
    what they leave in the model, and their outputs, may not depend on what was seen before them.

    Args:
        images: Two examples or more, [n, ...]; with one example only the model itself is watched.

    Raises:
        UnsupportedLayer: Another example's output moved, a forward pass wrote to a buffer or a
            parameter or carries something to the next one, or the model does not map a batch to
            one tensor with a row an example.
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
    moved = [_moved(before, each, row) for row, each in after if len(images) > 1]
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


def _moved_at_random(model: nn.Module, images: torch.Tensor) -> float:
    """How far other rows' outputs moved in some pass of a model that draws, or zero."""
    if len(images) < 2 or not draws(model, images):
        return 0.0
    others = 1 - images * 0.5 if images.is_floating_point() else images.roll(1, 0)
    pairs = drawn_alike(lambda rows: _run(model, rows, finite=False), images, others)
    with closing(pairs):
        return next((moved for pair in pairs if (moved := _difference(*pair))), 0.0)


def _carried(model: nn.Module, left: Mapping[str, torch.Tensor]) -> list[str]:
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


def _changed(images: torch.Tensor, row: int) -> Iterator[torch.Tensor]:
    """The images with one of them replaced: moderately, by nothing, by more than any other."""
    # Whole numbers may be indices: another example's are surely in range.
    others = [images[row - 1]]
    if images.is_floating_point():
        others = [1 - images[row] * 0.5, images[row] * 0, 2 * images[row] + images.abs().max()]
    for other in others:
        yield torch.cat([images[:row], other[None], images[row + 1 :]])


def _moved(before: torch.Tensor, after: torch.Tensor, row: int) -> float:
    """How far other rows' outputs moved beyond rounding, or zero."""
    others = torch.arange(len(before), device=before.device) != row
    return _difference(before, after, others)


def _difference(
    before: torch.Tensor, after: torch.Tensor, rows: torch.Tensor | None = None
) -> float:
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
    model: nn.Module, images: torch.Tensor, parameters: Mapping[str, nn.Parameter], tape: Tape
) -> None:
    """Runs one backward pass as training will, and throws its gradients away.

    Then whose rows are whose is asked with 2, 3 and 5 rows. From here on the tape's watch holds the
    model against what it is now.

    Args:
        model: A model whose layers write on `tape`.
        images: An example or more, [n, ...].

    Raises:
        UnsupportedLayer: A layer cannot be recorded, or sees rows that are not examples, or a
            trainable parameter is not used: it would be trained on noise alone.
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

    watch = Watch(
        model,
        refuse=lambda: check_layers(model),
        prove=prove,
        remade=remade(model, before),
    )
    tape.watched(watch)


def _check_rows(model: nn.Module, images: torch.Tensor, tape: Tape) -> None:
    """Asks with several numbers of rows: one of them may be that of a layer's tokens or channels.

    The outputs are weighted, for a sum of probabilities has no gradient.
    """
    for rows in _ROWS:
        repeated = images.nan_to_num()[torch.arange(rows, device=images.device) % len(images)]
        with torch.enable_grad():
            outputs = _run(model, repeated).reshape(rows, -1)
            weights = torch.linspace(0.5, 1.5, outputs.shape[1], device=outputs.device)
            losses = (outputs * weights).sum(1)
        for chosen in halves(rows):
            check_rows(losses, tape, chosen)


def _run(model: nn.Module, images: torch.Tensor, *, finite: bool = True) -> torch.Tensor:
    """One forward pass; each begins at the same random state, and leaves it as it was."""
    try:
        with random_states_kept(images.device):
            output = model(images)
    except PrivacyError:
        raise
    except Exception as error:
        raise UnsupportedLayer(
            f"the model cannot run on the data set's images, {list(images.shape)} {images.dtype}: "
            f"{type(error).__name__}: {error}{_of_other_numbers(model, images)}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape[:1] != images.shape[:1]:
        raise UnsupportedLayer(
            f"{type(model).__name__}: expected one tensor with {len(images)} rows, one an example, "
            f"got {_described(output)}; attach a model that maps images to logits"
        )
    if finite and not bool(output.isfinite().all()):
        raise UnsupportedLayer(
            f"{type(model).__name__}: its output is not finite on the first examples of the data "
            "set; look for NaN in its weights, and for images outside [0, 1]"
        )
    return output


def _of_other_numbers(model: nn.Module, images: torch.Tensor) -> str:
    """The cure where the model computes in other numbers than the images are; else nothing."""
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


def _described(output: object) -> str:
    """A model's output in a few words."""
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return type(output).__name__


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[list[str]]:
    """Restores parameters and buffers; afterwards the list names those that had been written."""
    before = {name: tensor.detach().clone() for name, tensor in _state(model)}
    written: list[str] = []
    try:
        yield written
    finally:
        for name, tensor in _state(model):
            if name in before and not _same(tensor, before[name]):
                tensor.detach().copy_(before[name])
                written.append(name)


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything in a model that a forward pass could write to."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether two tensors are equal, a NaN being equal to itself."""
    return torch.equal(now.nan_to_num(), before.nan_to_num())
