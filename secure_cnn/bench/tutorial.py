"""The loop that a tutorial writes, against which plain training is held: it is slow on purpose.

Every image is taken from a `Dataset`, changed by itself and put into a batch by a `DataLoader`; the
optimizer is SGD with momentum and its rate falls along a half cosine. Nothing of it is badly set:
the network, the rate and the number of epochs are those that its rival has too, and an image is a
tensor from the beginning, which is faster than to make one of a picture object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from secure_cnn.bench.watch import Watch, check_settings
from secure_cnn.data import ImageData, Split

__all__ = ["TutorialLoop"]

_MOMENTUM = 0.9
_FLIPPED = 0.5


@final
@dataclass(frozen=True, kw_only=True)
class TutorialLoop:
    """The reference: `make` gives a new network by its seed; `flip` mirrors half of the images.

    Raises:
        RunError: A number is outside its range.
    """

    make: Callable[[int], nn.Module]
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    flip: bool = False

    def __post_init__(self) -> None:
        check_settings(self.epochs, self.batch_size, self.learning_rate, self.weight_decay)

    def __call__(self, data: ImageData, *, seed: int, watch: Watch) -> None:
        """Trains once on `data.train`, and has the model judged after each epoch."""
        draws = torch.Generator().manual_seed(seed)
        model = self.make(seed)
        loader = DataLoader(
            _OneByOne(data.train, draws if self.flip else None),
            batch_size=self.batch_size,
            shuffle=True,
            generator=draws,
        )
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=_MOMENTUM,
            weight_decay=self.weight_decay,
        )
        steps = self.epochs * len(loader)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            watch.judge(model)


class _OneByOne(Dataset[tuple[Tensor, int]]):
    """The images one by one, half of them mirrored if there is a generator to draw which."""

    def __init__(self, split: Split, draws: torch.Generator | None) -> None:
        self._split, self._draws = split, draws

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._split[index]
        if self._draws is not None and torch.rand((), generator=self._draws) < _FLIPPED:
            image = image.flip(-1)
        return image, label
