"""What one training step costs under each protection, against the plain step of the same network.

Every variant trains a copy of the same model on the same images with the same optimizer; the steps
are taken in turn within one run. Whole training runs are deliberately not here.
"""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import privacy
from secure_cnn.bench.protection import Protection, protections
from secure_cnn.bench.timing import cost_rows, interleave, measured_row
from secure_cnn.data import DataSpec, ImageData, ShuffledBatches, Split
from secure_cnn.engine import CrossEntropy, MeanUpdate, Objective, Update, on_device
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.record import PLAIN, Row

__all__ = [
    "CASES",
    "CopiedCrossEntropy",
    "StepExamples",
    "Workload",
    "attached",
    "check_batch",
    "check_plain",
    "copies_against",
    "copies_makers",
    "kernel_choices",
    "measure_steps",
    "noise_share",
    "step_costs",
    "stepper",
    "steppers",
    "synthetic",
    "workload",
]

NOISE_MULTIPLIER = 1.0
ENDLESS = 1_000_000
"""Epochs of a training that nobody takes to its end."""

_COST_BATCH, _COST_ROUNDS = 128, 9
_WARMUP = 2

CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "compact": ((1, 28, 28), 256),
    "vgg11": ((3, 32, 32), 64),
    "resnet20": ((3, 32, 32), 64),
    "resnet18": ((3, 64, 64), 32),
}
"""The published workloads, which anyone can measure again: image shape and batch by network."""


class StepExamples(Protocol):
    """What steps are timed on: a `Split`, or what frozen layers make of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...

    def batch(self, index: Tensor, /) -> tuple[Tensor, Tensor]:
        """Those at `index`, with their labels."""

    def first(self, count: int, /) -> "StepExamples":
        """So many of them."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network, of which only copies are trained, and one batch that each step sees whole."""

    case: str
    model: nn.Module
    split: StepExamples
    memory_format: torch.memory_format = torch.channels_last


def workload(name: str) -> Workload:
    """One of `CASES`, in the layout in which plain training is fastest."""
    if name not in CASES:
        raise RunError(f"case: expected one of {', '.join(CASES)}, got {name}")
    shape, batch = CASES[name]
    spec = DataSpec(shape=shape, classes=tuple("0123456789"))
    return Workload(case=name, model=build_model(name, spec), split=synthetic(spec, batch))


def synthetic(spec: DataSpec, samples: int) -> Split:
    """Random images and labels of the given shape: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, *spec.shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, len(spec.classes), (samples,), generator=generator)
    return Split(images=images, labels=labels)


def check_plain(variants: Collection[str]) -> None:
    """Refuses variants without the plain training, against which all are measured."""
    if PLAIN not in variants:
        raise RunError(f"protections: expected {PLAIN} among them, got {', '.join(variants)}")


def check_batch(data: ImageData, batch_size: int) -> None:
    """Refuses a batch larger than the data."""
    if batch_size > len(data.train):
        raise RunError(
            f"batch_size: expected at most {len(data.train)}, the training images of {data.name}, "
            f"got {batch_size}"
        )


def measure_steps(
    case: str,
    steps: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Times every variant's step in turn, `plain` among them; rows as `cost_rows` gives them."""
    seconds = interleave(steps, rounds=rounds, warmup=_WARMUP, clock=clock)
    return cost_rows(case, seconds, copies=copies)


def step_costs(
    case: str,
    model: nn.Module,
    split: StepExamples,
    objectives: Mapping[str, Objective],
    *,
    private: bool,
    before_step: Callable[[], None],
) -> list[Row]:
    """What a run's protections cost, each alone and together, on one batch of its images.

    `before_step` is called before every step; what it raises ends the measurement.
    """
    load = Workload(case=case, model=model, split=split.first(_COST_BATCH))
    timed = steppers(load, protections(objectives, private=private))
    steps = {name: partial(_after, before_step, step) for name, step in timed.items()}
    return measure_steps(case, steps, rounds=_COST_ROUNDS)


def noise_share(
    load: Workload,
    seconds_per_step: float,
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """What share of a private step goes into its noise, drawn and added, and into its sample."""
    generator = privacy.SecureGenerator()
    sums = [torch.zeros_like(p) for p in load.model.parameters() if p.requires_grad]

    def draw() -> None:
        generator.perturb(sums, deviation=1.0)
        generator.bernoulli(len(load.split), 0.5)

    seconds = interleave({"draw": draw}, rounds=rounds, warmup=_WARMUP, clock=clock)["draw"]
    shares = [value / seconds_per_step for value in seconds]
    return measured_row(load.case, "private", "noise_share", shares, "1")


def kernel_choices(load: Workload) -> tuple[privacy.Choice, ...]:
    """Which clipping kernel the tuner picks for each layer of the workload."""
    tuner, samples = privacy.Tuner(), len(load.split)
    stepper(load, Protection(objective=CrossEntropy(), private=True), tuner=tuner)()
    return tuple(choice for choice in tuner.choices if choice.inputs[0] == samples)


def steppers(load: Workload, variants: Mapping[str, Protection]) -> dict[str, Callable[[], None]]:
    """A step for each variant, each on a copy of the model."""
    return {name: stepper(load, protection) for name, protection in variants.items()}


def stepper(
    load: Workload, protection: Protection, *, tuner: privacy.Tuner | None = None
) -> Callable[[], None]:
    """One training step of a copy of the model, as a call; nothing is averaged or saved."""
    model = copy.deepcopy(load.model).to(memory_format=load.memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    samples = len(load.split)
    update: Update = MeanUpdate(optimizer)
    source: Iterable[tuple[Tensor, Tensor]] = ShuffledBatches(
        load.split, batch_size=samples, epochs=ENDLESS, seed=0
    )
    if protection.private:
        private = attached(load, model, optimizer, batch_size=samples, epochs=ENDLESS, tuner=tuner)
        update, source = private.step, private.batches
    device = next(model.parameters()).device
    batches = on_device(source, device, load.memory_format)

    def step() -> None:
        images, labels = next(batches)
        update(protection.objective(model, images, labels))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def attached(
    load: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    epochs: int,
    tuner: privacy.Tuner | None = None,
) -> privacy.PrivateTraining:
    """DP-SGD on the images of the workload; a batch of all of them is the same in every step."""
    samples = len(load.split)
    plan = privacy.DPPlan(
        samples=samples,
        batch_size=batch_size,
        epochs=epochs,
        noise_multiplier=NOISE_MULTIPLIER,
        delta=min(1e-5, 0.1 / samples),
    )
    # At sampling rate 1 the private step sees exactly the images of the plain one, in one piece.
    whole = privacy.PhysicalBatches(size=samples, multiple=1) if batch_size == samples else None
    return privacy.attach(plan, model, optimizer, load.split, physical_batches=whole, tuner=tuner)


@final
@dataclass(frozen=True, kw_only=True)
class CopiedCrossEntropy:
    """Cross-entropy of K >= 2 copies of each example, in the shape that `private.step` averages."""

    copies: int
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.copies < 2:
            raise RunError(f"copies: expected at least 2 of each example, got {self.copies}")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Losses [n, K] of one forward pass over n * K rows."""
        # An index keeps the layout of the images, which repeat_interleave does not.
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(self.copies)
        losses = F.cross_entropy(model(images[rows]), labels[rows], reduction="none")
        return losses.view(-1, self.copies)


def copies_against(copies: int | None) -> dict[str, str]:
    """The variant with K copies, and what it is held against; nothing where K is None."""
    return {} if copies is None else {f"private-{copies}-copies": f"plain-{copies}-steps"}


def copies_makers(
    load: Workload, copies: int | None
) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes one private step on K copies of each example, and what makes K plain steps.

    A plain training meets an example in K augmented forms in K epochs, a private one in a single
    step (De et al. 2022, arXiv 2204.13650). Augmenting is left out of both: both pay it alike.
    """
    if copies is None:
        return {}
    private = Protection(objective=CopiedCrossEntropy(copies=copies), private=True)
    ((name, plain_name),) = copies_against(copies).items()
    return {name: partial(stepper, load, private), plain_name: partial(_plain_steps, load, copies)}


def _plain_steps(load: Workload, count: int) -> Callable[[], None]:
    step = stepper(load, Protection(objective=CrossEntropy(), private=False))

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def _after(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    then()
