"""Whether reading keeps up: a private training on photographs in files, against the same in memory.

What the computation alone allows is the training on images that are decoded already. Decoding takes
processor time of its own: where the computation leaves too little of it, no loader reaches that,
and `bound` is what is left to reach.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import privacy
from secure_cnn.bench.step import ENDLESS, NOISE_MULTIPLIER
from secure_cnn.bench.timing import measured_row, ratios, take_turns
from secure_cnn.data import DataSpec, Split
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.record import Row

__all__ = ["MEMORY", "LoaderSettings", "Photographs", "measure_loader", "write_photographs"]

MEMORY = "memory"
_SIDE, _FILE_SIDE, _QUALITY, _CLASSES = 64, 256, 90, 10


@final
@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How much is read: `images` files, in physical batches of `batch`, `batches` of them a round.

    With each of `workers`, each of them reading as many batches ahead as each of `prefetch` says,
    and as many threads of the computation as `threads` says. So many batches are timed that those
    read ahead before are few among them.
    """

    images: int = 256
    batch: int = 32
    batches: int = 48
    workers: tuple[int, ...] = (0, 1, 2)
    prefetch: tuple[int, ...] = (2, 8)
    threads: int = 1
    rounds: int = 7

    def __post_init__(self) -> None:
        for name in ("images", "batch", "batches", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.images % self.batch:
            raise RunError(
                f"images: expected a multiple of the batch of {self.batch}, got {self.images}"
            )
        if not self.workers or min(self.workers) < 0:
            raise RunError(f"workers: expected at least one number >= 0, got {self.workers}")
        if not self.prefetch or min(self.prefetch) < 1:
            raise RunError(f"prefetch: expected at least one number >= 1, got {self.prefetch}")

    def readings(self) -> dict[str, tuple[int, int | None]]:
        """Workers and prefetch of each variant that reads files, by its name."""
        found: dict[str, tuple[int, int | None]] = {}
        for workers in self.workers:
            if not workers:
                found["workers-0"] = 0, None
                continue
            for prefetch in self.prefetch:
                found[f"workers-{workers}, prefetch-{prefetch}"] = workers, prefetch
        return found


class Photographs:
    """A folder of pictures as people write such a data set: opened, resized, made a tensor."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._files[index]) as image:
            pixels = np.array(image.convert("RGB").resize((_SIDE, _SIDE)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255), index % _CLASSES


def write_photographs(folder: Path, count: int) -> None:
    """Writes `count` JPEGs of 256 x 256, noise with the spectrum of photographs (1 / frequency)."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.fft.fftfreq(_FILE_SIDE), torch.fft.rfftfreq(_FILE_SIDE)
    falling = 1 / (rows[:, None].square() + columns.square()).sqrt().clamp(min=1 / _FILE_SIDE)
    for number in range(count):
        noise = torch.randn(3, _FILE_SIDE, _FILE_SIDE, generator=generator)
        values = torch.fft.irfft2(torch.fft.rfft2(noise) * falling, s=noise.shape[1:])
        pixels = (128 + 50 * values / values.std()).clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:06}.jpg", quality=_QUALITY)


class _Took(NamedTuple):
    """Of one image: seconds, and seconds of all processors of this process."""

    seconds: float
    processor: float


def measure_loader(
    case: str,
    folder: Path,
    *,
    settings: LoaderSettings,
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
) -> list[Row]:
    """Times private steps of a network on the photographs of a folder, in turn within one run.

    The variants are `memory`, the same images decoded before, `workers-0`, and `workers-N,
    prefetch-M` for each number of workers and of batches that one reads ahead. Of each the `time`
    of an image; the `rate_ratio`, its images a second against those from memory in the same round;
    and the `processor_ratio`, the processor time of the training's own process likewise, which
    other programs move little. Of `decoding` the processor's `time` of an image, and as `bound` the
    `rate_ratio` that this leaves possible.
    """
    photographs = Photographs(folder)
    if len(photographs) != settings.images:
        raise RunError(
            f"folder: expected {settings.images} photographs, *.jpg, got {len(photographs)}"
        )
    images, labels = zip(*map(photographs.__getitem__, range(settings.images)), strict=True)
    decoded = Split(images=torch.stack(images).mul(255).round().byte(), labels=torch.tensor(labels))
    spec = DataSpec(shape=(3, _SIDE, _SIDE), classes=tuple("0123456789"))
    model = build_model(case, spec).to(memory_format=torch.channels_last)
    clocks = clock, processor
    train = partial(_train, model, privacy.Tuner(), settings, clocks)
    calls: dict[str, Callable[[], _Took]] = {MEMORY: partial(train, decoded, (0, None))}
    calls |= {name: partial(train, photographs, how) for name, how in settings.readings().items()}
    calls["decoding"] = partial(_decode, photographs, settings.batch, clocks)
    with _threads(settings.threads):
        took = take_turns(calls, rounds=settings.rounds, warmup=1)
    name = f"{case}, threads: {settings.threads}"
    return _rows(name, took)


def _rows(case: str, took: dict[str, list[_Took]]) -> list[Row]:
    seconds = {name: [each.seconds for each in found] for name, found in took.items()}
    decoding = [each.processor for each in took.pop("decoding")]
    rows = []
    for name in took:
        rows.append(measured_row(case, name, "time", seconds[name], "s"))
        rate = ratios(seconds[MEMORY], seconds[name])
        rows.append(measured_row(case, name, "rate_ratio", rate, "x"))
        own, alone = ([each.processor for each in took[which]] for which in (name, MEMORY))
        rows.append(measured_row(case, name, "processor_ratio", ratios(own, alone), "x"))
    rows.append(measured_row(case, "decoding", "time", decoding, "s"))
    cores = len(os.sched_getaffinity(0))
    bound = [
        free.seconds / max(free.seconds, (free.processor + decoded) / cores)
        for free, decoded in zip(took[MEMORY], decoding, strict=True)
    ]
    rows.append(measured_row(case, "bound", "rate_ratio", bound, "x"))
    return rows


def _train(
    model: torch.nn.Module,
    tuner: privacy.Tuner,
    settings: LoaderSettings,
    clocks: Sequence[Callable[[], float]],
    data: Any,
    reading: tuple[int, int | None],
) -> _Took:
    """Trains until what was read ahead at the start is used up, then so many batches timed."""
    workers, prefetch = reading
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    plan = privacy.DPPlan(
        samples=settings.images,
        batch_size=settings.images,
        epochs=ENDLESS,
        noise_multiplier=NOISE_MULTIPLIER,
        delta=1e-5,
    )
    private = privacy.attach(
        plan,
        twin,
        optimizer,
        data,
        physical_batches=privacy.PhysicalBatches(size=settings.batch, multiple=1),
        tuner=tuner,
        workers=workers,
        prefetch=prefetch,
    )
    untimed = 2 + workers * (prefetch or 0)
    try:
        for number, (images, labels) in enumerate(private.batches):
            if number == untimed:
                start = [clock() for clock in clocks]
            if number == untimed + settings.batches:
                break
            ready = images.contiguous(memory_format=torch.channels_last)
            private.step(F.cross_entropy(twin(ready), labels, reduction="none"))
    finally:
        private.detach()
    total = settings.batch * settings.batches
    return _Took(*((clock() - begun) / total for clock, begun in zip(clocks, start, strict=True)))


def _decode(data: Photographs, count: int, clocks: Sequence[Callable[[], float]]) -> _Took:
    start = [clock() for clock in clocks]
    for index in range(count):
        data[index]
    return _Took(*((clock() - begun) / count for clock, begun in zip(clocks, start, strict=True)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
