"""The one training loop, readable top to bottom; it knows neither privacy nor attacks.

A protection is a different value for one of three seams: the objective (one loss an example), the
batches, and the update. The plain run is not a branch here, it is the plain values: `CrossEntropy`,
shuffled epochs, `MeanUpdate`.
"""

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest

__all__ = [
    "CrossEntropy",
    "MeanUpdate",
    "Monitor",
    "Objective",
    "Schedule",
    "Update",
    "WeightAverage",
    "keep_freed_memory",
    "on_device",
    "train",
    "training_mode",
]


class Objective(Protocol):
    """The first seam: what to minimise."""

    @property
    def per_example(self) -> bool:
        """Whether each loss depends on its own example only."""

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Losses, float [n], of images in [0, 1], float [n, c, h, w], and labels, int64 [n]."""


class Update(Protocol):
    """The third seam: what to do with the losses of one batch."""

    def __call__(self, losses: torch.Tensor) -> bool:
        """Runs backward from losses [n]; True once the optimizer has stepped."""


class Monitor(Protocol):
    """Watches a training; called after every batch and after every epoch."""

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """After a batch whose losses were `losses` [n]; `step` optimizer steps are done.

        They are in the weights, and in their average.
        """

    def epoch(self, epoch: int, *, step: int) -> None:
        """After epoch number `epoch`, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy of each example, optionally with label smoothing (Szegedy et al. 2016).

    `label_smoothing` is the share of the target that is spread over all classes, in [0, 1).
    """

    label_smoothing: float = 0.0
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise RunError(f"label_smoothing: expected 0 up to 1, got {self.label_smoothing}")

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Losses [n] of one forward pass."""
        return F.cross_entropy(
            model(images), labels, reduction="none", label_smoothing=self.label_smoothing
        )


class MeanUpdate:
    """The plain update: mean of the losses, backward, step.

    `clip_grad_norm` is the largest norm of the mean gradient over all weights (Pascanu et al. 2013,
    arXiv 1211.5063): a longer one is shortened to it; 0 leaves every gradient as it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clip_grad_norm: float = 0.0) -> None:
        if not (math.isfinite(clip_grad_norm) and clip_grad_norm >= 0):
            raise RunError(f"clip_grad_norm: expected a finite number >= 0, got {clip_grad_norm}")
        self._optimizer, self._largest = optimizer, clip_grad_norm

    def __call__(self, losses: torch.Tensor) -> bool:
        """Steps on one batch; always True."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.mean())
        if self._largest:
            weights = [each for group in self._optimizer.param_groups for each in group["params"]]
            nn.utils.clip_grad_norm_(weights, self._largest)
        self._optimizer.step()
        return True


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate: linear warm-up, then a half cosine to zero (Loshchilov, Hutter 2017).

    Optimizer steps are divided into epochs as evenly as whole steps can be.
    """

    peak: float
    steps: int
    epochs: int
    warmup: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise RunError(f"learning_rate: expected a finite number > 0, got {self.peak}")
        if not 1 <= self.epochs <= self.steps or not 0 <= self.warmup < self.steps:
            raise RunError(
                "schedule: expected epochs in [1, steps] and warmup in [0, steps), got "
                f"steps={self.steps}, epochs={self.epochs}, warmup={self.warmup}"
            )

    def at(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))

    def epoch_ended(self, step: int) -> int | None:
        """The epoch, counted from 1, that is over once `step` steps are done; None within one."""
        epoch = round(step * self.epochs / self.steps)
        return epoch if epoch and round(epoch * self.steps / self.epochs) == step else None


class WeightAverage:
    """An exponential moving average of the weights: post-processing, so free under privacy.

    Early steps count more, so that the average forgets its start: the decay of step t is
    min(decay, (1 + t) / (10 + t)). A `decay` of 0 keeps the last weights only. Statistics that
    layers keep (BatchNorm) are averaged with the weights that they belong to; frozen parameters are
    left alone.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise RunError(f"average_decay: expected 0 up to 1, got {decay}")
        self._decay = decay
        self._updates = 0
        self._averages = {
            name: tensor.detach().clone(memory_format=torch.preserve_format)
            for name, tensor in _learned(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights into the average."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages, learned = list(self._averages.values()), _learned(model)
        torch._foreach_lerp_(averages, [learned[name] for name in self._averages], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Gives the model the averaged weights, and its own back afterwards."""
        self._exchange(model)
        try:
            yield model
        finally:
            self._exchange(model)

    def write_to(self, model: nn.Module) -> None:
        """Gives the model the averaged weights for good."""
        model.load_state_dict(self._averages, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they saw."""
        return {"averages": dict(self._averages), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        saved = {name: tuple(value.shape) for name, value in state["averages"].items()}
        own = {name: tuple(value.shape) for name, value in self._averages.items()}
        if saved != own:
            raise RunError("average: the checkpoint's weights are those of another model")
        updates = state["updates"]
        if type(updates) is not int or updates < 0:
            raise RunError(
                f"average: expected a number of updates from 0 on in the checkpoint, got "
                f"{updates!r}; this was not written by a run"
            )
        for name, value in state["averages"].items():
            self._averages[name].copy_(value)
        self._updates = updates

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, tensor in _learned(model).items():
            tensor.data, self._averages[name] = self._averages[name], tensor.data


def _learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a training changes: parameters that are not frozen, and statistics that layers keep."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = model.state_dict(keep_vars=True).keys()
    statistics = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in kept and buffer.is_floating_point()
    }
    return {**trained, **statistics}


def train(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    update: Update,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    monitor: Monitor,
    average: WeightAverage | None = None,
    stop: StopRequest | None = None,
    start_step: int = 0,
) -> int:
    """Trains until the batches or the schedule end, or a stop is requested; returns steps in all.

    `batches` are those of all steps from `start_step` on; several may make one step. A batch whose
    losses are all not finite is an error, and is not stepped on.
    """
    step = start_step
    training_mode(model)
    for images, labels in batches:
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        # bfloat16 where a GPU computes; the CPU computes in the model's own dtype.
        on_gpu = images.device.type == "cuda"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            losses = objective(model, images, labels)
        _check_finite(losses.detach(), step + 1)
        stepped = update(losses)
        step += stepped
        if stepped and average is not None:
            average.update(model)
        monitor.batch(losses.detach(), step=step)
        if not stepped:
            continue
        epoch = schedule.epoch_ended(step)
        if epoch is not None:
            monitor.epoch(epoch, step=step)
            training_mode(model)
        if step >= schedule.steps or (stop is not None and stop.requested):
            break
    return step


def training_mode(model: nn.Module) -> None:
    """Puts a model into training mode, but for layers that are frozen and keep statistics.

    Those (BatchNorm whose weights are frozen) stay in evaluation mode: their statistics are a part
    of what is frozen.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2).requires_grad_(False), nn.BatchNorm1d(2))
        >>> training_mode(model)
        >>> [layer.training for layer in model]
        [False, True]
    """
    model.train()
    for layer in model.modules():
        weights = list(layer.parameters(recurse=False))
        statistics = list(layer.buffers(recurse=False))
        if weights and statistics and not any(p.requires_grad for p in weights):
            layer.training = False


def on_device(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    memory_format: torch.memory_format,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Moves batches to the device, images in the layout that the model has.

    Features that are no images [n, c, h, w] have one layout only.
    """
    for images, labels in batches:
        layout = memory_format if images.dim() == 4 else torch.contiguous_format
        yield (
            images.to(device, non_blocking=True).contiguous(memory_format=layout),
            labels.to(device, non_blocking=True),
        )


def _check_finite(losses: torch.Tensor, step: int) -> None:
    if len(losses) and not bool(losses.isfinite().any()):
        raise RunError(
            f"step {step}: expected finite losses, got none: the training has diverged; lower the "
            "learning rate, or look at the images for values that are not numbers"
        )


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX, as <malloc.h> of the GNU C library numbers them."""


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, instead of giving it back to the system.

    Large tensors are otherwise new memory at every step, which the system clears page by page: a
    tenth of a private step of ResNet-20. The peak stays what it is; after it the process holds on
    to what it had. For the whole process, so a program decides it, once, and no library: the
    commands that train, attack or measure training do.

    Returns:
        Whether the C library can: that of GNU.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is None:
        return False
    return bool(options(_MMAP_MAX, 0)) and bool(options(_TRIM_THRESHOLD, 2**31 - 1))
