"""Peak memory of a training step: tensors alive at once, weights and optimizer state apart.

What the tensor allocator handed out, so exact and repeatable, unlike a process' resident size. It
counts what a variant holds between steps (its buffers) and what a step allocates at most; gradients
that one step leaves to the next are counted once, in the step that makes them.
"""

import gc
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

from secure_cnn.bench.rows import measured_row
from secure_cnn.bench.step import Workload
from secure_cnn.report import Row

__all__ = ["measure_memory", "peak_bytes"]

_MEMORY = "[memory]"
_WARMUP = 2
"""Steps before the measured one: the tuner must have chosen, the optimizer have its state."""


def measure_memory(
    load: Workload, makers: Mapping[str, Callable[[], Callable[[], None]]]
) -> list[Row]:
    """The peak of every variant's step, and its ratio to plain.

    Args:
        load: The workload that the steps are on, on the CPU.
        makers: Calls that make a step with a copy of the model, by variant, `plain` among them.

    Returns:
        For each variant its `memory` in MiB and its `memory_ratio`.

    Example:
        >>> from secure_cnn.bench.step import protections, stepper, synthetic
        >>> from secure_cnn.data import DataSpec
        >>> from secure_cnn.models import build_model
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("0", "1"))
        >>> model = build_model("compact", spec)
        >>> load = Workload(case="compact", model=model, split=synthetic(spec, 4))
        >>> def plain(): return stepper(load, protections({})["plain"])
        >>> rows = measure_memory(load, {"plain": plain})
        >>> [(row.metric, row.median > 0) for row in rows]
        [('memory', True), ('memory_ratio', True)]
    """
    weights = sum(p.numel() * p.element_size() for p in load.model.parameters())
    peaks = {name: peak_bytes(make) - weights for name, make in makers.items()}
    rows = []
    for name, peak in peaks.items():
        rows.append(measured_row(load.case, name, "memory", [peak / 2**20], "MiB"))
        against = [peak / peaks["plain"]]
        rows.append(measured_row(load.case, name, "memory_ratio", against, "x"))
    return rows


def peak_bytes(make: Callable[[], Callable[[], None]]) -> int:
    """Bytes that making a step leaves alive, and the most that the step itself allocates.

    Args:
        make: Makes the step, with all that it keeps.

    Example:
        >>> import torch
        >>> def make():
        ...     kept = torch.zeros(1000)
        ...     return lambda: kept.clone()
        >>> peak_bytes(make)
        8000
    """
    # What others left must not be freed meanwhile.
    gc.collect()
    with _profiled() as making:
        step = make()
    for _ in range(_WARMUP):
        step()
    with _profiled() as stepping:
        step()
    return sum(_changes(making)) + max(accumulate(_changes(stepping), initial=0))


def _profiled() -> profile:
    """A profiler of the tensor allocator."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _changes(profiled: profile) -> list[int]:
    """What was allocated (and, of that, freed) in the order in which it happened."""
    # torch gives these events no public type.
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == _MEMORY]
    return [size for _, size in sorted((event.start_ns(), event.nbytes()) for event in events)]
