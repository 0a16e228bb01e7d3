"""A measurement under way: which model is asked about which images, in which batches and draws.

Evaluations, their checks and certifications stand on this. What is found is theirs.
"""

import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from defenses.errors import EvaluationError, ThreatModelError
from defenses.measuring.images import ImageSource, ImageTensors, MapDataset, choose_images
from defenses.quantities import is_whole, shown
from defenses.scope import answer_to, check_logits, home_of
from defenses.threat import ThreatModel

__all__ = [
    "Measurement",
    "check_flag",
    "check_question",
    "checked_logits",
    "measured",
    "moved",
    "progress_bar",
    "versions",
]

_ROUNDING = 1e-4  # of an image's logits: far above what another order of sums does in float32
_COARSE = 1e-2  # on an accelerator, which may multiply in fewer bits (TF32)


def check_question(model: object, threat: object, *, batch_size: object, seed: object) -> None:
    """Refuses, before any work is done, what cannot be measured."""
    if not isinstance(model, nn.Module):
        raise EvaluationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(threat, ThreatModel):
        raise ThreatModelError(f"threat: expected a ThreatModel, got {type(threat).__name__}")
    if not is_whole(batch_size, least=1) or not is_whole(seed):
        raise EvaluationError(
            "expected batch_size >= 1 and a seed in [0, 2**63), got "
            f"{shown(batch_size)} and {shown(seed)}"
        )


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise EvaluationError(f"{name}: expected True or False, got {shown(value)}")


@final
@dataclass(frozen=True)
class Measurement:
    """A model, the images of a data set that it is measured on, and the ball around each."""

    model: nn.Module
    source: ImageSource
    indices: Tensor  # which images of the data set, int64, [n]
    threat: ThreatModel
    batch_size: int
    seed: int
    bar: Progress

    def seed_of(self, place: str) -> int:
        """The seed of everything random in one place, in [0, 2**63).

        Each place has its own, so that what ran before, or was resumed, changes nothing there.
        """
        digest = hashlib.sha256(f"{self.seed}/{place}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def at_home(self, images: Tensor) -> Tensor:
        """The images on the device of the model, and in its dtype."""
        device, dtype = home_of(self.model, images)
        return images.to(device=device, dtype=dtype)

    def batches(self, title: str, positions: Tensor) -> Iterator[Tensor]:
        """The positions in batches, counted off on the bar as they are done."""
        yield from _counted(self.bar, title, torch.split(positions, self.batch_size))


@contextmanager
def measured(
    model: nn.Module,
    data: MapDataset | ImageTensors,
    threat: ThreatModel,
    *,
    samples: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Iterator[Measurement]:
    """Chooses the images, all or `samples` drawn by the seed, and shows a bar while it lasts."""
    source = ImageSource(data, threat)
    indices = choose_images(len(source), samples, torch.Generator().manual_seed(seed))
    with progress_bar(shown=progress) as bar, _counted_passes(model, bar):
        yield Measurement(model, source, indices, threat, batch_size, seed, bar)


def progress_bar(*, shown: bool) -> Progress:
    """A bar on stderr that leaves nothing behind; silent when that is no terminal."""
    check_flag("progress", shown)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )


def checked_logits(model: nn.Module, images: Tensor, *, largest_label: int) -> Tensor:
    """The model's logits, checked, [n, classes]; it must leave the images as they are."""
    answer = answer_to(model, images, EvaluationError)
    return check_logits(
        answer, count=len(images), largest_label=largest_label, error=EvaluationError
    )


def moved(usual: Tensor, other: Tensor) -> Tensor:
    """Which of two answers to the same images differ by more than rounding, booleans [n]."""
    sizes = usual.abs().amax(dim=1).double()
    sizes = sizes.clamp_min(1e-3 * float(sizes.max()))  # where large numbers cancelled out
    rounding = max(_ROUNDING, 32 * torch.finfo(usual.dtype).eps)
    if usual.device.type != "cpu":
        rounding = max(rounding, _COARSE)
    return (other.double() - usual.double()).abs().amax(dim=1) > rounding * sizes


def versions(*packages: str) -> dict[str, str]:
    """The versions that figures depend on: of Python, of ours and of these packages."""
    try:
        ours = version("secure-cnn")
    except PackageNotFoundError:  # it lies on the path, and nothing says which version that is
        ours = "not installed"
    found = {"python": platform.python_version(), "secure-cnn": ours}
    return found | {name: version(name) for name in packages}


@contextmanager
def _counted_passes(model: nn.Module, bar: Progress) -> Iterator[None]:
    """Tells the model's passes too: a batch of a slow network takes long, and is seen to go on."""
    if bar.disable:
        yield
        return

    def tell(*_: object) -> None:
        if bar.tasks:
            task = bar.tasks[-1]
            passes = task.fields.get("passes", 0) + 1
            bar.update(task.id, passes=passes, speed=f"{task.fields['rate']} pass {passes}")

    watched = model.register_forward_pre_hook(tell)
    try:
        yield
    finally:
        watched.remove()


def _counted(bar: Progress, title: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches that are not empty, counted off on the bar when the next one is asked for."""
    batches = [part for part in parts if len(part)]
    task = bar.add_task(title, total=sum(map(len, batches)), speed="", rate="")
    for part in batches:
        yield part
        state = bar.tasks[bar.task_ids.index(task)]
        done, elapsed = state.completed + len(part), state.elapsed or 0.0
        rate = f"{done / elapsed:.3g} images/s" if elapsed > 0 else ""
        bar.update(task, completed=done, speed=rate, rate=rate)
