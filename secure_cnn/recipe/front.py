"""The frozen front of a network: images go through it once, and not at every step.

What stands before the first trained layer gives the same features of an image in every epoch, where
nothing changes the image either. A head on them then trains as fast as a head alone. Computed are
they in float32, also where a training computes in bfloat16.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, TypeGuard, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secure_cnn.data import ImageData, Split
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.progress import count_progress
from secure_cnn.recipe.defaults import MOST_FEATURES

__all__ = ["Features", "FrozenFront"]

_ROWS = 512
"""Images at a time, as many as are evaluated at a time."""
_SHARED, _OTHERS = 3, 3
_OWN_WAYS = ("forward", "_forward_hooks", "_forward_pre_hooks")
"""Attributes by which a sequence does more than to call its layers one after the other."""


@final
class Features(Dataset[tuple[Tensor, int]]):
    """What a frozen front makes of a split: a map-style data set of (features, label).

    Guarantee: it gives the same before it is filled, when each reading runs the images through the
    front, and afterwards, when they are in memory. A class because filling it is remembered.

    Args:
        front: Frozen layers, with a parameter or a buffer, that keep examples apart.
        split: The images.
        memory_format: The layout in which the front gets them.

    Example:
        >>> split = Split(images=torch.zeros(5, 1, 8, 8, dtype=torch.uint8),
        ...               labels=torch.arange(5))
        >>> layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).requires_grad_(False)
        >>> features = Features(layers, split)
        >>> before, labels = features.batch(torch.tensor([4, 0]))
        >>> features.fill(lambda count: None)
        >>> after, _ = features.batch(torch.tensor([4, 0]))
        >>> torch.equal(before, after), before.shape, labels, len(features)
        (True, torch.Size([2, 3]), tensor([4, 0]), 5)
    """

    # What reads many examples may call `batch` with their indices.
    batch_by_indices: ClassVar[bool] = True

    def __init__(
        self,
        front: nn.Sequential,
        split: Split,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._front, self._split, self._memory_format = front, split, memory_format
        self._values: Tensor | None = None

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        features, labels = self.batch(torch.tensor([index]))
        return features[0], int(labels[0])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the features at `index`, int64 [b], float32 [b, ...], and int64 labels [b]."""
        if self._values is None:
            return self._read(index)
        return self._values[index], self._split.labels[index]

    def fill(self, before: Callable[[int], object]) -> None:
        """Computes the features of all images, in chunks, unless they are there.

        `before` is called before each chunk with the number of images that are done; what it raises
        ends this, and nothing is kept.
        """
        if self._values is not None:
            return
        values: Tensor | None = None
        for start in range(0, len(self), _ROWS):
            before(start)
            stop = min(start + _ROWS, len(self))
            found, _ = self._read(torch.arange(start, stop))
            if values is None:
                values = torch.empty(len(self), *found.shape[1:])
            values[start:stop] = found
        self._values = values

    def first(self, count: int) -> "Features":
        """Those of the first `count` images, or of all where it has fewer, in memory."""
        few = Features(self._front, self._split.first(count), memory_format=self._memory_format)
        few.fill(lambda _: None)
        return few

    def of_images(self, images: Tensor) -> Tensor:
        """What the front makes of any images, on the CPU: float32 [n, ...] of [n, c, h, w]."""
        device = next(chain(self._front.parameters(), self._front.buffers())).device
        with torch.no_grad():
            given = images.to(device).contiguous(memory_format=self._memory_format)
            found: Tensor = self._front(given)
        return found.cpu()

    def _read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self._split.batch(index)
        return self.of_images(images), labels


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenFront:
    """The front of all models of a run that begin alike, and the features that it gives.

    Attributes:
        layers: The front, in the mode of a training.
        train: Features of the training images.
        test: Features of the test images.
    """

    layers: nn.Sequential
    train: Features
    test: Features

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: ImageData,
        *,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> "FrozenFront | None":
        """The front of a model that is on the CPU, as it is trained; None where none is worth it.

        It is the longest beginning of an `nn.Sequential` whose layers have no trained parameter,
        give one float32 tensor, and are fixed: on random images (drawn from `seed`) they give bit
        for bit the same in training and in evaluation, whatever other images are in the batch, and
        draw no random number. So dropout, and a BatchNorm whose statistics move, are left in the
        rest. Without any parameter or buffer it costs nothing, and is no front; nor is one whose
        features of all images would take more than 4 GiB.
        """
        if not _is_plain_sequence(model):
            return None
        shared, *others = _random_images(data, seed)
        batches = [torch.cat([shared, each]) for each in others]
        length = 0
        for layer in model:
            found = _through(layer, batches)
            if found is None:
                break
            batches, length = found, length + 1
        layers = model[:length]
        held = chain(layers.parameters(), layers.buffers())
        size = batches[0][0].numel() * (len(data.train) + len(data.test))
        if next(held, None) is None or size > MOST_FEATURES:
            return None
        layers = layers.to(device).to(memory_format=memory_format)
        return cls(
            layers=layers,
            train=Features(layers, data.train, memory_format=memory_format),
            test=Features(layers, data.test, memory_format=memory_format),
        )

    def put_before(self, model: nn.Module) -> nn.Sequential:
        """Makes this very front that of a model which began alike; returns the rest of the model.

        The rest has its layers, under their names, in common with the model. So the model that is
        kept has the front from which the features came.
        """
        assert isinstance(model, nn.Sequential), "a model with a front is a sequence"
        length = len(self.layers)
        for index in range(length):
            model[index] = self.layers[index]
        return model[length:]

    def fill(self, stop: StopRequest) -> None:
        """Computes all features that are not there, with a bar; a stop is looked at in each chunk.

        Raises:
            Stopped: A stop was requested.
        """
        total = len(self.train) + len(self.test)
        with count_progress("images through the frozen layers", total) as advance:

            def before(done: int) -> None:
                stop_here(stop)
                advance(done)

            self.train.fill(before)
            self.test.fill(lambda done: before(len(self.train) + done))


def _is_plain_sequence(model: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a model does nothing but call its layers, one after the other."""
    own = any(vars(model).get(name) for name in _OWN_WAYS)
    return type(model) is nn.Sequential and not own and not list(model.parameters(recurse=False))


def _random_images(data: ImageData, seed: int) -> list[Tensor]:
    """Some images that two batches have in common, and the others of each."""
    generator = torch.Generator().manual_seed(seed)
    counts = (_SHARED, _OTHERS, _OTHERS)
    return [torch.rand(count, *data.spec.shape, generator=generator) for count in counts]


def _through(layer: nn.Module, batches: list[Tensor]) -> list[Tensor] | None:
    """What a layer makes of batches that have images in common; None where it is not fixed."""
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial, state = copy.deepcopy(layer), torch.get_rng_state()
            trained = [trial(each.clone()) for each in batches]
            drew = not torch.equal(state, torch.get_rng_state())
            evaluated = [trial.eval()(each.clone()) for each in batches]
    except Exception:
        return None  # What fails here fails in the training, which says so.
    if drew or not all(_is_feature(each, _SHARED + _OTHERS) for each in (*trained, *evaluated)):
        return None
    same = all(map(torch.equal, trained, evaluated))
    apart = torch.equal(*(each[:_SHARED] for each in trained))
    return trained if same and apart else None


def _is_feature(found: object, rows: int) -> bool:
    if not isinstance(found, Tensor) or found.dtype != torch.float32:
        return False
    return found.dim() > 1 and len(found) == rows
