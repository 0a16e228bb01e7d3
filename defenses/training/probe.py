"""A probe of what an objective declares: does each loss depend on its own example only?

A private update clips what each example contributes, and that bounds its influence only where an
example has no say in the losses of others. The probe changes an example and watches the others: in
this call and in the next one, for a perturbation may be carried over.

A probe can refute the claim, never prove it: what depends on others only now and then, or by less
than rounding, passes.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defenses.errors import ObjectiveError
from defenses.quantities import shown

__all__ = ["check_per_example"]

# Larger than what a kernel's other way of rounding does to a loss, far below what mixing does.
_TOLERANCE = 1e-3
# Without half of the batch a loss may change by its own random start, not by such a factor.
_SCALE = 1.5

_Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
_Seen = tuple[Tensor, Tensor]


def check_per_example(
    objective: _Objective, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """Refuses an objective whose losses or gradients depend on other examples.

    Works on a copy of the model, and puts objective and global random state back. Random images do
    as well as real ones: none needs to be private. Not to be called on a model with hooks that
    record gradients; check before a model is attached to a private training.

    Args:
        objective: `(model, images, labels) -> losses[n]`; where it has a `state_dict`, it is set
            back between the calls, so that chance does not look like a dependence.
        model: In the modes of the training.
        images: [n, channels, ...], n >= 4, in the objective's bounds, not all alike.
        labels: int64, [n], not all alike.

    Raises:
        ObjectiveError: It declares that its losses depend on others (with its reason), the losses
            are not [n], or changing an example moved the loss or the gradient of others.

    Example:
        >>> from defenses import AdversarialTraining, ThreatModel
        >>> objective = AdversarialTraining(ThreatModel(norm="linf", eps=0.1))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> check_per_example(objective, model, images, labels)
    """
    name = str(getattr(objective, "__name__", type(objective).__name__))
    if getattr(objective, "per_example", None) is not True:
        reason = getattr(objective, "reason", "") or "it has no per_example = True"
        raise ObjectiveError(f"{name}: expected one loss an example, but {reason}")
    for given, what in ((images, "images"), (labels, "labels")):
        if not isinstance(given, Tensor) or given.ndim == 0:
            raise ObjectiveError(f"probe: expected {what} as a tensor [n, ...], got {shown(given)}")
    if len(images) < 4 or len(torch.unique(labels)) < 2:
        raise ObjectiveError(
            f"probe: expected at least 4 images of 2 classes, got {len(images)} of "
            f"{len(torch.unique(labels))}; other examples cannot be watched with fewer"
        )
    trial = _Trial(objective, model)
    last = len(images) - 1
    for changed in (0, last):
        other = (changed + len(images) // 2) % len(images)
        mixed, relabelled = images.clone(), labels.clone()
        mixed[changed], relabelled[changed] = images[other], _another(labels, changed)
        rest = torch.tensor([row for row in range(len(images)) if row != changed])
        # Another example is in every place of the next batch, so there all of them are watched.
        following = images.flip(0), labels.flip(0), torch.arange(len(images))
        with trial as see:
            before = see(images, labels, rest), see(*following)
        with trial as see:
            after = see(mixed, relabelled, rest), see(*following)
        for call, (one, two) in enumerate(zip(before, after, strict=True)):
            _compare(name, "of the same batch" if call == 0 else "of the next batch", one, two)
    half = torch.arange(len(images) // 2)
    with trial as see:
        whole = see(images, labels, half)
    with trial as see:
        part = see(images[half], labels[half], half)
    _compare_scale(name, whole, part)


class _Trial:
    """Calls the objective from the same state each time; a class because it puts things back."""

    def __init__(self, objective: _Objective, model: nn.Module) -> None:
        self._objective, self._model = objective, model
        settable = hasattr(objective, "state_dict") and hasattr(objective, "load_state_dict")
        self._state_holder: Any = objective if settable else None

    def __enter__(self) -> Callable[[Tensor, Tensor, Tensor], _Seen]:
        self._random = torch.get_rng_state()
        self._state = (
            copy.deepcopy(self._state_holder.state_dict()) if self._state_holder is not None else {}
        )
        self._copy = copy.deepcopy(self._model)
        return self._see

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._random)
        if self._state_holder is not None:
            self._state_holder.load_state_dict(self._state)
        del self._copy

    def _see(self, images: Tensor, labels: Tensor, rows: Tensor) -> _Seen:
        """The losses of some rows, and the gradient of a fixed weighting of them."""
        losses = self._objective(self._copy, images, labels)
        if not isinstance(losses, Tensor) or losses.shape != (len(images),):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ObjectiveError(f"losses: expected one an example, [{len(images)}], got {got}")
        chosen = losses[rows.to(losses.device)]
        weights = torch.linspace(1.0, 2.0, len(rows), dtype=losses.dtype, device=losses.device)
        trainable = [each for each in self._copy.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(
            (weights * chosen).sum(), trainable, retain_graph=True, materialize_grads=True
        )
        # The whole batch goes backward, as in training: what the objective carries over moves.
        torch.autograd.backward(losses.sum())
        return chosen.detach(), torch.cat([each.flatten() for each in gradients])


def _another(labels: Tensor, row: int) -> Tensor:
    return labels[labels != labels[row]][0]


def _compare(name: str, where: str, before: _Seen, after: _Seen) -> None:
    for what, one, two in zip(("losses", "gradient"), before, after, strict=True):
        scale = float(one.abs().max()) if one.numel() else 0.0
        moved = float((one - two).abs().max()) if one.numel() else 0.0
        if not moved <= _TOLERANCE * max(scale, 1e-6):
            raise ObjectiveError(
                f"{name}: expected losses of their own example only, but changing one example "
                f"moved the {what} of others {where} by {moved:.2g} (of {scale:.2g}); neither the "
                "objective nor a layer of the model may mix examples or carry them over"
            )


def _compare_scale(name: str, whole: _Seen, part: _Seen) -> None:
    """Refuses losses that are divided by, or else follow, the number of examples."""
    ratio = float(part[0].mean() / whole[0].mean().clamp_min(1e-12))
    if not 1 / _SCALE <= ratio <= _SCALE:
        raise ObjectiveError(
            f"{name}: expected losses that do not know how many examples there are, but without "
            f"half of the batch the others' losses changed by a factor of {ratio:.3g}; give sums "
            "or means to the update, not to the objective"
        )
