"""Peak memory of a step: what the tensor allocator handed out at most while it ran.

Exact and repeatable, unlike a process' resident size, which also counts what the C library keeps
back. Weights, and whatever else was there before the step, are not in it.
"""

from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from secure_cnn.bench.step import Workload
from secure_cnn.report import Row

__all__ = ["measure_memory", "peak_bytes"]

_BOUNDARY = "secure_cnn.bench: the measured step begins"
_WARMUP = 2
"""Steps before the measured one: the tuner must have chosen, the optimizer have its state."""


def measure_memory(load: Workload, steps: Mapping[str, Callable[[], None]]) -> list[Row]:
    """The peak of every variant's step, and its ratio to plain.

    Args:
        load: The workload that the steps are on.
        steps: Steps by variant, `plain` among them.

    Returns:
        For each variant its `memory` in MiB and its `memory_ratio`.

    Example:
        >>> from secure_cnn.bench.step import protections, stepper, synthetic
        >>> from secure_cnn.data import DataSpec
        >>> from secure_cnn.models import build_model
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("0", "1"))
        >>> model = build_model("compact", spec)
        >>> load = Workload(case="compact", model=model, split=synthetic(spec, 4))
        >>> rows = measure_memory(load, {"plain": stepper(load, protections({})["plain"])})
        >>> [(row.metric, row.median > 0) for row in rows]
        [('memory', True), ('memory_ratio', True)]
    """
    device = next(load.model.parameters()).device
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    rows = []
    for name, peak in peaks.items():
        rows.append(_row(load.case, name, "memory", peak / 2**20, "MiB"))
        rows.append(_row(load.case, name, "memory_ratio", peak / peaks["plain"], "x"))
    return rows


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors alive at once during `step` beyond those alive before it.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu"))
        4000
    """
    for _ in range(_WARMUP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        # Only what was made under the profiler is seen to be freed: a step before the measured one
        # makes what the measured one replaces, gradients above all.
        step()
        with record_function(_BOUNDARY):
            pass
        step()
    assert profiled.profiler is not None, "the profiler ran"
    events = profiled.profiler.kineto_results.events()
    boundary = next(event.start_ns() for event in events if event.name() == _BOUNDARY)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = sum(change for when, change in changes if when < boundary)
    before = peak = alive
    for when, change in changes:
        if when >= boundary:
            alive += change
            peak = max(peak, alive)
    return int(peak - before)


def _row(case: str, variant: str, metric: str, value: float, unit: str) -> Row:
    """One exact figure."""
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        median=value,
        low=value,
        high=value,
        unit=unit,
        n=1,
    )
