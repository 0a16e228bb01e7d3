"""Shuffled epochs cut into batches, and random changes of their images that keep the label.

The plain value of the batch seam. Not here: Poisson sampling, which differential privacy needs and
which knows no epochs; and mixing examples (mixup, cutmix), which bounds no example's contribution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secure_cnn.data.loading import Examples, check_examples, read_batches
from secure_cnn.data.split import Split
from secure_cnn.errors import DataError

__all__ = ["Augmentation", "ShuffledBatches"]

_ORDER, _AUGMENTATION, _READING, _FLIPS = 0, 1, 2, 3  # what a stream of random numbers is for


@final
class ShuffledBatches:
    """Every batch of all epochs, one after the other.

    Guarantee: each epoch holds every example exactly once; the last batch of an epoch may be
    smaller. The batch of step `k` depends on `(seed, k)` alone, so an iteration that starts at
    `start_step=k` gives bit for bit what the uninterrupted one gives from there on. The global
    random state is neither read nor moved. Each `iter()` starts at `start_step` again. What a data
    set of one's own draws while it is read is its own affair.

    Args:
        split: A split, or any map-style data set of (image, label).
        epochs: Passes over `split`, at least 0.
        start_step: The first step to give, at most all of them.
        augment: `(images, generator) -> images`, applied to whole batches, say `Augmentation`.
        alternate_flips: Mirror each image in every second epoch, half of them in the first (Jordan
            2024, arXiv 2404.00498), so that two epochs show each image both ways. Where left and
            right are one class; and in place of `Augmentation(flip=True)`, which draws a coin.
        workers: Processes that read the next batches of a data set of one's own while this one is
            trained on; 0 reads in this process. A split is in memory, and needs none.

    Raises:
        DataError: An argument is outside its range.

    Example:
        >>> split = Split(images=torch.zeros(5, 1, 8, 8, dtype=torch.uint8),
        ...               labels=torch.arange(5))
        >>> batches = ShuffledBatches(split, batch_size=2, epochs=2, seed=0)
        >>> batches.steps_per_epoch, len(batches), [len(labels) for _, labels in batches]
        (3, 6, [2, 2, 1, 2, 2, 1])
    """

    def __init__(
        self,
        split: Split | Examples,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        start_step: int = 0,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        alternate_flips: bool = False,
        workers: int = 0,
    ) -> None:
        check_examples(split, workers=workers)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("epochs", epochs, 0),
            ("seed", seed, 0),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise DataError(f"{name}: expected at least {least}, got {value}")
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._start_step = start_step
        self._augment = augment
        self._alternate_flips = alternate_flips
        self._workers = workers
        self.steps_per_epoch = -(-len(split) // batch_size)
        self._steps = self.steps_per_epoch * epochs
        if start_step > self._steps:
            raise DataError(
                f"start_step: expected at most {self._steps}, the steps of {epochs} epochs, "
                f"got {start_step}; is it another run's?"
            )

    def __len__(self) -> int:
        return self._steps - self._start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = self._generator(_READING, self._start_step).initial_seed()
        taken, known = tee(self._indices())
        first = torch.rand(len(self._split), generator=self._generator(_FLIPS, 0)) < 0.5
        batches = read_batches(self._split, taken, workers=self._workers, seed=seed)
        for step, (read, labels) in enumerate(batches, start=self._start_step):
            index = next(known)
            images = read
            if self._alternate_flips:
                turn = first[index] ^ bool(step // self.steps_per_epoch % 2)
                images = _mirrored_where(turn.to(read.device), read)
            if self._augment is not None:
                images = self._augment(images, self._generator(_AUGMENTATION, step))
            yield images, labels

    def _indices(self) -> Iterator[Tensor]:
        """The examples of each step that is left."""
        order, order_epoch = torch.empty(0, dtype=torch.int64), -1
        for step in range(self._start_step, self._steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = torch.randperm(len(self._split), generator=self._generator(_ORDER, epoch))
                order_epoch = epoch
            start = batch * self._batch_size
            yield order[start : start + self._batch_size]

    def _generator(self, purpose: int, index: int) -> torch.Generator:
        """A generator of its own for each use, so that no use depends on what came before it."""
        state = np.random.SeedSequence([self._seed, purpose, index]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))


@final
@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A horizontal flip and a shift, drawn anew for every example.

    Called as `augmentation(images, generator)` with float images `[b, channels, height, width]`;
    gives new images of the same shape. All randomness comes from `generator`. Each image depends on
    its own example only, so a private training may use them.

    Args:
        flip: Mirror an image left to right with probability 1/2.
        shift: Move an image by up to this many pixels along each axis, uniformly; what comes in at
            the border is 0. At least 0.

    Raises:
        DataError: `shift` is negative or, on a call, not smaller than the image.

    Example:
        >>> images = torch.rand(4, 1, 8, 8)
        >>> Augmentation(shift=2)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 8, 8])
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise DataError(f"shift: expected at least 0 pixels, got {self.shift}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """New images, each changed by draws of its own from `generator`."""
        if self.flip:
            images = _flipped(images, generator)
        return _shifted(images, self.shift, generator) if self.shift else images.clone()


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    coins = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return _mirrored_where(coins.to(images.device), images)


def _mirrored_where(chosen: Tensor, images: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    if shift >= min(height, width):
        raise DataError(f"shift: expected less than the image's {height}x{width}, got {shift}")
    corner = torch.randint(
        2 * shift + 1, (2, count, 1), generator=generator, device=generator.device
    ).to(images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    example = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (shift, shift, shift, shift))
    cut = padded[example, :, rows[:, :, None], columns[:, None, :]]  # [b, height, width, channels]
    return cut.permute(0, 3, 1, 2).contiguous()
