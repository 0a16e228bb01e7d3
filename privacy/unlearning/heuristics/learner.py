"""A model while it is changed: its steps, counted, and the way back if anything goes wrong.

Deliberately not here: what a step is made of, which is each method's own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.errors import LeakageError, PrivacyError, UnlearningError
from privacy.leakage.signals import checked_logits
from privacy.trial import random_states_kept
from privacy.validate import check_module

__all__ = ["Change", "Learner", "learning", "logits_of"]


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """What a method did to a model: no guarantee, and no evidence that anything was forgotten.

    Attributes:
        weight_change: L2 norm of the difference of all trained weights, above 0 and finite.
        steps: How often the weights were written.

    Example:
        >>> Change(weight_change=0.5, steps=10).steps
        10
    """

    weight_change: float
    steps: int


class Learner:
    """A model whose trained parameters take steps; made by `learning`.

    Attributes:
        model: The model itself.
        parameters: Those that require a gradient, by name, each once.
        generator: What draws orders and labels, from the method's seed.
    """

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        self.model = model
        self.parameters = _trained(model)
        self.device = next(iter(self.parameters.values())).device
        self.generator = torch.Generator().manual_seed(seed)
        self._before = [each.detach().clone() for each in self.parameters.values()]
        # A mask of -inf, say, may stay what it is.
        self._finite = {name for name, each in model.named_buffers() if _is_finite(each)}
        self._optimizer: torch.optim.Optimizer | None = None
        self._masks: Sequence[Tensor] | None = None
        self._steps = 0

    def descend(
        self,
        *,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        """From here on each step is one of stochastic gradient descent, in training mode.

        Layers that have parameters of which none is trained stay in evaluation mode, lest a frozen
        normalisation take up new statistics. Where there are masks, bool in the order of the
        parameters, weights outside of them stay bit for bit what they are.
        """
        self._optimizer = torch.optim.SGD(
            list(self.parameters.values()),
            lr=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        self._masks = masks
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters())
            if own and not any(each.requires_grad for each in own):
                module.eval()

    def scale_rate(self, factor: float) -> None:
        """From here on steps are `factor` times as long."""
        for group in self._descent.param_groups:
            group["lr"] *= factor

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the model says, a row of logits for each label.

        Raises:
            UnlearningError: It cannot take the images, or says something else.
        """
        return logits_of(self.model, images.to(self.device), labels)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(images, labels), labels.to(self.device))

    def step(self, loss: Tensor, *, gradient_norm: float | None = None) -> None:
        """One step down a loss, its gradient clipped to an L2 norm where one is given.

        Raises:
            UnlearningError: The loss or its gradient is no finite number, or a constant.
        """
        if not loss.requires_grad:
            raise UnlearningError(
                "model: expected logits that depend on its trained parameters, got constants"
            )
        weights = list(self.parameters.values())
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        squares = [float(each.double().square().sum()) for each in gradients if each is not None]
        length = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
        if not math.isfinite(float(loss.detach())) or not math.isfinite(length):
            raise UnlearningError(
                f"model: expected a finite loss and gradient, got {float(loss.detach())} and a "
                f"gradient of length {length} in step {self._steps + 1}; choose a smaller "
                "learning_rate"
            )
        factor = 1.0
        if gradient_norm is not None and length > gradient_norm:
            factor = gradient_norm / length
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = None if gradient is None else gradient * factor
        self._descent.step()
        if self._masks is not None:
            self._hold(self._masks)
        self._steps += 1

    def write(self, values: Sequence[Tensor]) -> None:
        """New values of the trained parameters, in their order: one step."""
        with torch.no_grad():
            for weight, value in zip(self.parameters.values(), values, strict=True):
                weight.copy_(value)
        self._steps += 1

    def change(self) -> Change:
        """What was done so far.

        Raises:
            UnlearningError: A weight or a buffer is not finite, or no weight has moved.
        """
        for name, tensor in (*self.parameters.items(), *self.model.named_buffers()):
            if name in self._finite | self.parameters.keys() and not _is_finite(tensor):
                raise UnlearningError(
                    f"{name}: expected finite numbers afterwards, got some that are not; the "
                    "method diverged: choose a smaller learning_rate"
                )
        moved = [
            float((weight.detach().double() - before.double()).square().sum())
            for weight, before in zip(self.parameters.values(), self._before, strict=True)
        ]
        length = math.sqrt(math.fsum(moved))
        if not length > 0:
            raise UnlearningError(
                "model: expected weights that moved, got the same as before: nothing was "
                "forgotten; choose more steps or a larger learning_rate"
            )
        return Change(weight_change=length, steps=self._steps)

    @property
    def _descent(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None
        return self._optimizer

    def _hold(self, masks: Sequence[Tensor]) -> None:
        with torch.no_grad():
            weights = self.parameters.values()
            for weight, before, mask in zip(weights, self._before, masks, strict=True):
                weight.copy_(torch.where(mask, weight, before))


@contextmanager
def learning(model: nn.Module, *, seed: int) -> Iterator[Learner]:
    """Lends a model to a method; modes and `.grad` are put back at the end, on an error all of it.

    Torch's global random state, which dropout draws from, is lent too and put back.

    Raises:
        UnlearningError: It is no module, or none of its parameters is trained.
    """
    try:
        check_module(model)
    except PrivacyError as error:
        raise UnlearningError(str(error)) from None
    kept = _Kept(model)
    try:
        learner = Learner(model, seed=seed)
        with random_states_kept(learner.device):
            _lend(learner.device, seed)
            yield learner
    except BaseException:
        kept.put_back_numbers()
        raise
    finally:
        kept.put_back_modes()


def logits_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """A row of logits for each label.

    Raises:
        UnlearningError: The model cannot take the images, or says something else.
    """
    try:
        found = model(images)
    except Exception as error:
        raise UnlearningError(
            f"model: expected one that takes images {list(images.shape)} of {images.dtype}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        return checked_logits(found, labels)
    except LeakageError as error:
        raise UnlearningError(str(error)) from None


class _Kept:
    """A model's numbers, modes and gradients as they were."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._gradients = [(each, each.grad) for each in model.parameters()]
        self._weights = [(each, each.detach().clone()) for each in model.parameters()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def put_back_numbers(self) -> None:
        with torch.no_grad():
            for weight, before in self._weights:
                weight.copy_(before)
            for module, name, buffer, before in self._buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)

    def put_back_modes(self) -> None:
        for module, mode in self._modes:
            module.training = mode
        for weight, gradient in self._gradients:
            weight.grad = gradient


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not found:
        raise UnlearningError(
            "model: expected parameters that are trained, got none that require a gradient; "
            "unfreeze those that may change"
        )
    wrong = [name for name, each in found.items() if not each.is_floating_point()]
    if wrong:
        raise UnlearningError(f"{', '.join(wrong)}: expected real numbers, got others")
    broken = [name for name, each in found.items() if not _is_finite(each)]
    if broken:
        raise UnlearningError(
            f"{', '.join(broken)}: expected finite weights, got some that are not; what is left of "
            "a training that diverged cannot forget: train it anew"
        )
    return found


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _lend(device: torch.device, seed: int) -> None:
    """Sets torch's global state, which the caller puts back."""
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    if device.type == "cuda":
        own = torch.Generator(device=device).manual_seed(seed)
        torch.cuda.set_rng_state(own.get_state(), device)
