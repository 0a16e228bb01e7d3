"""What one training step costs under each protection, against the plain step of the same network.

Every variant trains a copy of the same model on the same images with the same optimizer; the steps
are taken in turn within one run. Whole training runs are deliberately not here.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

import privacy
from secure_cnn.bench.rows import measured_row
from secure_cnn.bench.timing import interleave, ratios
from secure_cnn.data import DataSpec, ShuffledBatches, Split
from secure_cnn.engine import CrossEntropy, MeanUpdate, Objective, Update, on_device
from secure_cnn.record import Measurements, Row, hardware, versions

__all__ = [
    "Protection",
    "Workload",
    "cost_rows",
    "document",
    "kernel_choices",
    "measure_steps",
    "noise_share",
    "protections",
    "step_costs",
    "stepper",
    "steppers",
    "subset",
    "synthetic",
]

NOISE_MULTIPLIER = 1.0
_MANY = 1_000_000
_COST_BATCH, _COST_ROUNDS = 128, 9


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained: a network, images, and the layout in memory.

    Attributes:
        case: Name of the row in the results.
        model: The network; never trained itself, only its copies are.
        split: Exactly one batch of images; every step sees it whole.
        memory_format: Layout of the network and the images, the same for every variant.
    """

    case: str
    model: nn.Module
    split: Split
    memory_format: torch.memory_format = torch.channels_last


def synthetic(spec: DataSpec, samples: int) -> Split:
    """Random images and labels of the given shape: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, *spec.shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, len(spec.classes), (samples,), generator=generator)
    return Split(images=images, labels=labels)


def subset(split: Split, samples: int) -> Split:
    """The first `samples` examples of a split, or all where it has fewer."""
    return Split(images=split.images[:samples], labels=split.labels[:samples])


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One variant of a step: its objective, and whether DP-SGD makes the update."""

    objective: Objective
    private: bool


def protections(
    objectives: Mapping[str, Objective], *, private: bool = True
) -> dict[str, Protection]:
    """The plain step and every combination of the protections given that can be, by variant.

    Args:
        private: Whether to combine each with DP-SGD too, where each loss is one example's.
    """
    found: dict[str, Protection] = {}
    plain: Objective = CrossEntropy()
    for name, objective in [("", plain), *objectives.items()]:
        found[name or "plain"] = Protection(objective=objective, private=False)
        if private and objective.per_example:
            both = f"private+{name}" if name else "private"
            found[both] = Protection(objective=objective, private=True)
    return found


def measure_steps(
    case: str,
    steps: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Times every variant's step in turn.

    Args:
        case: Name of the workload.
        steps: Steps by variant, `plain` among them.
        rounds: Counted rounds, at least 1.
        clock: Seconds, ever rising.
        copies: As for `cost_rows`.

    Returns:
        For each variant its `time` and, round by round against `plain`, its `time_ratio`; the
        `copies_ratio` of those of `copies`.

    Example:
        >>> from secure_cnn.models import build_model
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("0", "1"))
        >>> model = build_model("compact", spec)
        >>> load = Workload(case="compact", model=model, split=synthetic(spec, 4))
        >>> rows = measure_steps("compact", steppers(load, protections({})), rounds=2)
        >>> sorted({row.metric for row in rows})
        ['time', 'time_ratio']
    """
    seconds = interleave(steps, rounds=rounds, warmup=2, clock=clock)
    return cost_rows(case, seconds, copies=copies)


def step_costs(
    case: str,
    model: nn.Module,
    split: Split,
    objectives: Mapping[str, Objective],
    *,
    private: bool,
    before_step: Callable[[], None],
) -> list[Row]:
    """What a run's protections cost, each alone and together, on one batch of its images.

    Args:
        objectives: The run's own, by method; none for a run without.
        private: Whether the run is.
        before_step: Called before every step; what it raises ends the measurement.
    """
    load = Workload(case=case, model=model, split=subset(split, _COST_BATCH))
    timed = steppers(load, protections(objectives, private=private))
    steps = {name: partial(_after, before_step, step) for name, step in timed.items()}
    return measure_steps(case, steps, rounds=_COST_ROUNDS)


def steppers(load: Workload, variants: Mapping[str, Protection]) -> dict[str, Callable[[], None]]:
    """A step for each variant, each on a copy of the model."""
    return {name: stepper(load, protection) for name, protection in variants.items()}


def noise_share(
    load: Workload,
    seconds_per_step: float,
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """What share of a private step goes into its noise, drawn and added, and into its sample.

    Args:
        rounds: Counted draws, at least 1.
    """
    generator = privacy.SecureGenerator()
    sums = [torch.zeros_like(p) for p in load.model.parameters() if p.requires_grad]

    def draw() -> None:
        generator.perturb(sums, deviation=1.0)
        generator.bernoulli(len(load.split), 0.5)

    seconds = interleave({"draw": draw}, rounds=rounds, warmup=2, clock=clock)["draw"]
    shares = [value / seconds_per_step for value in seconds]
    return measured_row(load.case, "private", "noise_share", shares, "1")


def cost_rows(
    case: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Rows of the time and of the ratio to `plain`, which must be among the variants."""
    rows = []
    for variant, own in seconds.items():
        rows.append(measured_row(case, variant, "time", own, "s"))
        against = ratios(own, seconds["plain"])
        rows.append(measured_row(case, variant, "time_ratio", against, "x"))
    for variant, plain_steps in copies.items():
        against = ratios(seconds[variant], seconds[plain_steps])
        rows.append(measured_row(case, variant, "copies_ratio", against, "x"))
    return rows


def document(
    rows: Iterable[Row], *, rivals: Mapping[str, str] = MappingProxyType({})
) -> Measurements:
    """Rows with when, where and with what they were measured.

    Args:
        rivals: Versions of those measured beside us that `versions` does not name, by name.
    """
    return Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        versions=versions() | dict(rivals),
        rows=tuple(rows),
    )


def kernel_choices(load: Workload) -> tuple[privacy.Choice, ...]:
    """Which clipping kernel the tuner picks for each layer of the workload."""
    tuner, samples = privacy.Tuner(), len(load.split)
    stepper(load, Protection(objective=CrossEntropy(), private=True), tuner=tuner)()
    return tuple(choice for choice in tuner.choices if choice.inputs[0] == samples)


def stepper(
    load: Workload, protection: Protection, *, tuner: privacy.Tuner | None = None
) -> Callable[[], None]:
    """One training step of a copy of the model, as a call."""
    model = copy.deepcopy(load.model).to(memory_format=load.memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    private = _attached(load, model, optimizer, tuner) if protection.private else None
    update: Update = MeanUpdate(optimizer) if private is None else private.step
    source = _endless(load) if private is None else private.batches
    device = next(model.parameters()).device
    batches = on_device(source, device, load.memory_format)

    def step() -> None:
        images, labels = next(batches)
        update(protection.objective(model, images, labels))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def _after(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    then()


def _attached(
    load: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tuner: privacy.Tuner | None,
) -> privacy.PrivateTraining:
    """DP-SGD at sampling rate 1: every step sees the same images as the plain one."""
    samples = len(load.split)
    plan = privacy.DPPlan(
        samples=samples, batch_size=samples, epochs=_MANY, noise_multiplier=NOISE_MULTIPLIER
    )
    cut = privacy.PhysicalBatches(size=samples, multiple=1)
    return privacy.attach(plan, model, optimizer, load.split, physical_batches=cut, tuner=tuner)


def _endless(load: Workload) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The whole split as one batch, reshuffled, again and again."""
    return iter(ShuffledBatches(load.split, batch_size=len(load.split), epochs=_MANY, seed=0))
