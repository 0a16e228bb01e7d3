"""Students: models that are trained on what another model answers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secure_cnn.engine import MeanUpdate, Schedule, train
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.leakage import arguments
from secure_cnn.optimizers import Muon

__all__ = ["StudentTraining"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StudentTraining:
    """How a student is trained on distributions over classes: a `privacy.leakage.Learn`.

    Attributes:
        build: Gives a new network by its seed.
        steps: Of each training, at least 1; as many for few images as for many.
        batch_size: Images of a step, at most.
        learning_rate: At its peak.
        stop: Looked at after every step.

    Raises:
        RunError: A number is out of range.
    """

    build: Callable[[int], nn.Module]
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 0.05
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        arguments.called("build", self.build, "a function of a seed that gives a network")
        arguments.whole("steps", self.steps, least=1)
        arguments.whole("batch_size", self.batch_size, least=1)
        rate = self.learning_rate
        arguments.number("learning_rate", rate, "a number > 0", lambda x: 0 < x < math.inf)
        arguments.instance("stop", self.stop, StopRequest)

    def __call__(self, images: Tensor, targets: Tensor, /, *, seed: int) -> nn.Module:
        """A finished student, in evaluation mode.

        Raises:
            Stopped: A stop was requested.
        """
        stop_here(self.stop)
        model = self.build(seed)
        optimizer = Muon(model, lr=self.learning_rate)
        train(
            model,
            _SoftTargets(),
            self._batches(images, targets, seed),
            MeanUpdate(optimizer),
            optimizer=optimizer,
            schedule=Schedule(peak=self.learning_rate, steps=self.steps, epochs=1),
            monitor=_Silent(),
            stop=self.stop,
        )
        stop_here(self.stop)
        return model.eval()

    def _batches(
        self, images: Tensor, targets: Tensor, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.split(torch.randperm(len(images), generator=random), self.batch_size):
                yield images[rows], targets[rows]


@final
class _SoftTargets:
    """Cross-entropy against a distribution over classes."""

    per_example: ClassVar[bool] = True

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, reduction="none")


@final
class _Silent:
    """Watches nothing."""

    def batch(self, losses: Tensor, *, step: int) -> None: ...

    def epoch(self, epoch: int, *, step: int) -> None: ...
