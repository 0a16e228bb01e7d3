"""A plain training put together from ordinary values of the seams, as `TutorialLoop`'s rival."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from secure_cnn.bench.watch import Watch, check_settings
from secure_cnn.data import Augmentation, ImageData, ShuffledBatches
from secure_cnn.engine import (
    CrossEntropy,
    MeanUpdate,
    Schedule,
    WeightAverage,
    on_device,
    train,
)
from secure_cnn.errors import RunError
from secure_cnn.initialization import start_as_identity, whiten_first_layer
from secure_cnn.optimizers import Muon
from secure_cnn.views import Views

__all__ = ["PlainTraining"]

_MOMENTUM = 0.9
_WHITENED = 2000
"""So many training images give the patches."""


@final
@dataclass(frozen=True, kw_only=True)
class PlainTraining:
    """One training; its defaults are `TutorialLoop`'s, with batches that are cut by index.

    Attributes:
        make: Gives a new network by its seed.
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: At its peak.
        weight_decay: Of the optimizer.
        warmup: Share of the steps in which the rate rises, in [0, 1).
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        average_decay: Of the moving average of the weights, in [0, 1); 0 switches it off.
        flip: Mirror images by a coin each.
        alternate_flips: Mirror each image in every second epoch instead.
        shift: Largest random shift, in pixels.
        memory_format: Of the network and the images.
        bfloat16: Compute products and convolutions in bfloat16.
        muon: Step filters by `Muon`.
        identity: Begin with `start_as_identity`.
        whitening: Begin with `whiten_first_layer`, on the first training images.
        mirror_views: Answer from an image and its mirror image.

    Raises:
        RunError: A number is outside its range.
    """

    make: Callable[[int], nn.Module]
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    warmup: float = 0.0
    label_smoothing: float = 0.0
    average_decay: float = 0.0
    flip: bool = False
    alternate_flips: bool = False
    shift: int = 0
    memory_format: torch.memory_format = field(default=torch.contiguous_format)
    bfloat16: bool = False
    muon: bool = False
    identity: bool = False
    whitening: bool = False
    mirror_views: bool = False

    def __post_init__(self) -> None:
        check_settings(self.epochs, self.batch_size, self.learning_rate, self.weight_decay)
        if not 0 <= self.warmup < 1:
            raise RunError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if self.flip and self.alternate_flips:
            raise RunError("flip: expected it off with alternate_flips, got both; choose one")
        CrossEntropy(label_smoothing=self.label_smoothing)
        Augmentation(shift=self.shift)

    def __call__(self, data: ImageData, *, seed: int, watch: Watch) -> None:
        """Trains once on `data.train`, and has the model judged after each epoch."""
        model = self._model(data, seed)
        optimizer = self._optimizer(model)
        batches = ShuffledBatches(
            data.train,
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=seed,
            augment=Augmentation(flip=self.flip, shift=self.shift),
            alternate_flips=self.alternate_flips,
        )
        steps = len(batches)
        average = WeightAverage(model, decay=self.average_decay) if self.average_decay else None
        train(
            model,
            _Objective(label_smoothing=self.label_smoothing, bfloat16=self.bfloat16),
            on_device(batches, next(model.parameters()).device, self.memory_format),
            MeanUpdate(optimizer),
            optimizer=optimizer,
            schedule=Schedule(
                peak=self.learning_rate,
                steps=steps,
                epochs=self.epochs,
                warmup=min(int(self.warmup * steps), steps - 1),
            ),
            monitor=_Judge(watch, model, average, mirror=self.mirror_views),
            average=average,
        )

    def _model(self, data: ImageData, seed: int) -> nn.Module:
        model = self.make(seed)
        if self.identity:
            start_as_identity(model)
        if self.whitening:
            images, _ = data.train.batch(torch.arange(min(_WHITENED, len(data.train))))
            whiten_first_layer(model, images, torch.Generator().manual_seed(seed))
        return model.to(memory_format=self.memory_format)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.muon:
            return Muon(
                model,
                lr=self.learning_rate,
                momentum=_MOMENTUM,
                weight_decay=self.weight_decay,
            )
        return torch.optim.SGD(
            [weight for weight in model.parameters() if weight.requires_grad],
            lr=self.learning_rate,
            momentum=_MOMENTUM,
            weight_decay=self.weight_decay,
        )


@final
class _Objective:
    """Cross-entropy, perhaps with products and convolutions in bfloat16."""

    per_example: ClassVar[bool] = True

    def __init__(self, *, label_smoothing: float, bfloat16: bool) -> None:
        self._plain = CrossEntropy(label_smoothing=label_smoothing)
        self._bfloat16 = bfloat16

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            return self._plain(model, images, labels)


@final
class _Judge:
    """Has the model judged as it would be kept."""

    def __init__(
        self, watch: Watch, model: nn.Module, average: WeightAverage | None, *, mirror: bool
    ) -> None:
        self._watch, self._model, self._average = watch, model, average
        self._answering: nn.Module = Views(model, mirror=True) if mirror else model

    def batch(self, losses: Tensor, *, step: int) -> None:
        """Nothing to do after a batch."""

    def epoch(self, epoch: int, *, step: int) -> None:
        """Judges."""
        kept: AbstractContextManager[object] = (
            nullcontext() if self._average is None else self._average.applied(self._model)
        )
        with kept:
            self._watch.judge(self._answering)
