"""What every protection costs: whole steps and their parts, memory and disk, in one run.

The variants take turns; each turn is a stretch of steps with one save, so that a checkpoint every
so many steps is paid for by the steps that it is shared out to. The plain training is there twice:
what it differs from itself is the noise of the machine.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from secure_cnn.bench.memory import MakeStep, peak_rows
from secure_cnn.bench.protection import Protection, bytes_in
from secure_cnn.bench.step import Workload, check_batch, check_plain
from secure_cnn.bench.timed_training import TimedTraining
from secure_cnn.bench.timing import (
    PARTS,
    Marks,
    Stopwatch,
    document,
    marks_for,
    measured_row,
    ratios,
    take_turns,
)
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.record import CONTROL, PLAIN, Measurements, Row, hardware

__all__ = ["OverheadSettings", "on_this_machine", "overhead", "overhead_workload"]

# Trains on for so many steps, and tells the seconds of each part.
_Stretch = Callable[[], dict[str, float]]
_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class OverheadSettings:
    """How the cost is measured: so many counted rounds of stretches of so many steps.

    `steps` are also those between two checkpoints; every step of every variant sees the same
    images.
    """

    batch_size: int = 64
    steps: int = 5
    rounds: int = 15
    memory: bool = True
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "rounds"):
            value = getattr(self, name)
            if value < 1:
                raise RunError(f"{name}: expected at least 1, got {value}")


_DEFAULT = OverheadSettings()


def overhead(
    model: nn.Module,
    data: ImageData,
    protections: Mapping[str, Protection],
    *,
    settings: OverheadSettings = _DEFAULT,
    rivals: Mapping[str, MakeStep] | None = None,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurements:
    """Measures what each protection costs, on any module and any images.

    Guarantee: only copies of the model are trained; all variants, the rivals too, are timed in
    turn, and each ratio is against the plain stretch of the same round.

    Args:
        model: Takes float images [n, channels, height, width] in [0, 1], gives logits
            [n, classes]; on the device where it is to be measured. BatchNorm is replaced in the
            private variants (`privacy.fix`), not in the others.
        data: Whose first training images are trained on, in uint8.
        protections: By variant, as `combinations` or `protections` make them; `plain` among them.
        settings: How to measure.
        rivals: What makes others' steps on the same workload, such as a partial `rival_step`.
        folder: Where checkpoints go; its file system is measured too. By default a temporary one.
        clock: A monotonic clock, in seconds; not used on CUDA, where events tell the time.

    Returns:
        For each variant `time` (a step), `time_ratio`, `images_per_second`, and `time_` with the
        name of each part (`secure_cnn.bench.timing.PARTS`); `memory` and `memory_ratio` where
        asked for; `disk` where it saves. `plain-again` is the control.
    """
    check_plain(protections)
    load = overhead_workload(model, data, settings)
    marks = marks_for(next(model.parameters()).device, clock)
    variants = {**protections, CONTROL: protections[PLAIN]}
    with ExitStack() as held:
        place = Path(held.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        stretches: dict[str, _Stretch] = {}
        for name, protection in variants.items():
            training = TimedTraining(
                load, protection, place / name, marks, batch_size=len(load.split)
            )
            held.callback(training.close)
            stretches[name] = partial(training.stretch, settings.steps)
        for name, make in (rivals or {}).items():
            stretches[name] = _stretch_of(make(), settings.steps, marks)
        # The stretches time themselves: on a GPU no clock of ours could.
        seconds = take_turns(stretches, rounds=settings.rounds, warmup=_WARMUP)
        rows = _time_rows(load.case, seconds, settings)
        rows += [
            measured_row(load.case, name, "disk", [float(bytes_in(place / name))], "B")
            for name, protection in variants.items()
            if protection.saver is not None
        ]
    if settings.memory:
        rows += _memory_rows(load, protections, rivals or {}, marks, folder)
    return on_this_machine(rows, model)


def overhead_workload(model: nn.Module, data: ImageData, settings: OverheadSettings) -> Workload:
    """The workload that `overhead` measures on, for rivals to be made on too.

    Its case names model, data, batch and steps: figures of other settings are of another case.
    """
    check_batch(data, settings.batch_size)
    name = getattr(model, "name", None)
    return Workload(
        case=f"{name if isinstance(name, str) else type(model).__name__}, {data.name}, "
        f"batch {settings.batch_size}, save every {settings.steps}",
        model=model,
        split=data.train.first(settings.batch_size),
        memory_format=settings.memory_format,
    )


def on_this_machine(
    rows: Iterable[Row], model: nn.Module, *, rivals: Mapping[str, str] = MappingProxyType({})
) -> Measurements:
    """A document of the rows with the device of the model, the cores and the threads."""
    device = next(model.parameters()).device
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    told = {"affinity": affinity, "interop_threads": torch.get_num_interop_threads()}
    return replace(document(rows, rivals=rivals), hardware=hardware(device) | told)


def _stretch_of(step: Callable[[], object], steps: int, marks: Marks) -> _Stretch:
    """Somebody else's steps, of which we know no parts."""
    watch = Stopwatch(marks)

    def stretch() -> dict[str, float]:
        with watch.part("other"):
            for _ in range(steps):
                step()
        return watch.take()

    return stretch


def _time_rows(
    case: str, seconds: Mapping[str, list[dict[str, float]]], settings: OverheadSettings
) -> list[Row]:
    rows = []
    totals = {name: [sum(each.values()) for each in own] for name, own in seconds.items()}
    for name, own in totals.items():
        each = [total / settings.steps for total in own]
        speeds = [settings.batch_size / value for value in each]
        rows.append(measured_row(case, name, "time", each, "s"))
        rows.append(measured_row(case, name, "time_ratio", ratios(own, totals[PLAIN]), "x"))
        rows.append(measured_row(case, name, "images_per_second", speeds, "images/s"))
        for part in PARTS:
            shares = [turn.get(part, 0.0) / settings.steps for turn in seconds[name]]
            if any(shares):
                rows.append(measured_row(case, name, f"time_{part}", shares, "s"))
    return rows


def _memory_rows(
    load: Workload,
    protections: Mapping[str, Protection],
    rivals: Mapping[str, MakeStep],
    marks: Marks,
    folder: Path | None,
) -> list[Row]:
    def make(protection: Protection) -> Callable[[], object]:
        # A folder of its own each time: a store that is still open would lock another out.
        own = Path(tempfile.mkdtemp(dir=place))
        training = TimedTraining(load, protection, own, marks, batch_size=len(load.split))

        def step() -> None:
            training.stretch(1)
            # What the step before left would else be freed in this one, unseen when it came.
            training.model.zero_grad(set_to_none=True)

        return step

    with tempfile.TemporaryDirectory(dir=folder) as place:
        makers = {name: partial(make, each) for name, each in protections.items()}
        return peak_rows(load, makers | dict(rivals))
