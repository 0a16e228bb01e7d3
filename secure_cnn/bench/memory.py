"""Peak memory of a training step: tensors alive at once, weights and optimizer state apart.

What the tensor allocator handed out; on CUDA torch's own count of the device. It counts what a
variant holds between steps (its buffers) and what a step allocates at most; gradients that one step
leaves to the next are counted once, in the step that makes them. A block that was there before the
profiler started is not taken off when it ends: the profiler does not know its size.

The resident size is the whole process with its libraries and whatever its memory manager kept, so
it is to be read in absolute terms only.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from secure_cnn.bench.step import Workload
from secure_cnn.bench.timing import measured_row
from secure_cnn.record import PLAIN, Row

__all__ = [
    "MakeStep",
    "cuda_peak_bytes",
    "measure_memory",
    "peak_bytes",
    "peak_rows",
    "resident_growth",
    "resident_peak_bytes",
]

MakeStep = Callable[[], Callable[[], object]]
"""Makes a step with all that it keeps."""

_MIB = 2**20
_MEMORY = "[memory]"
_WARMUP = 2
"""Steps before the measured one: the tuner must have chosen, the optimizer have its state."""


def measure_memory(load: Workload, makers: Mapping[str, MakeStep]) -> list[Row]:
    """The peak of every variant's step in MiB, and its ratio to `plain`, which is among them."""
    device = next(load.model.parameters()).device
    weights = sum(p.numel() * p.element_size() for p in load.model.parameters())
    peaks = {
        name: (cuda_peak_bytes(make, device) if device.type == "cuda" else peak_bytes(make))
        - weights
        for name, make in makers.items()
    }
    rows = []
    for name, peak in peaks.items():
        rows.append(measured_row(load.case, name, "memory", [peak / _MIB], "MiB"))
        against = [peak / peaks[PLAIN]]
        rows.append(measured_row(load.case, name, "memory_ratio", against, "x"))
    return rows


def peak_rows(load: Workload, makers: Mapping[str, MakeStep]) -> list[Row]:
    """Rows as of `measure_memory`, and what the process had resident where the system tells."""
    rows = measure_memory(load, makers)
    for name, make in makers.items():
        resident = resident_peak_bytes(make)
        if resident is not None:
            rows.append(measured_row(load.case, name, "resident", [resident / _MIB], "MiB"))
    return rows


def peak_bytes(make: MakeStep) -> int:
    """Bytes that making a step leaves alive, and the most that the step itself allocates."""
    # What others left must not be freed meanwhile.
    gc.collect()
    with _profiled() as making:
        step = make()
    for _ in range(_WARMUP):
        step()
    with _profiled() as stepping:
        step()
    return sum(_changes(making)) + max(accumulate(_changes(stepping)), default=0)


def cuda_peak_bytes(make: MakeStep, device: torch.device) -> int:
    """Bytes that making a step and taking it have allocated on a CUDA device at most."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    step = make()
    for _ in range(_WARMUP):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak_bytes(make: MakeStep) -> int | None:
    """The most bytes that this process had resident during a step; None where nobody tells."""
    gc.collect()
    step = make()
    for _ in range(_WARMUP):
        step()
    _hand_back()
    peaks = _resident(step)
    return peaks and peaks[1]


def resident_growth(work: Callable[[], object]) -> int | None:
    """The most resident bytes during work beyond those before; None where nobody tells."""
    peaks = _resident(work)
    return peaks and max(0, peaks[1] - peaks[0])


def _resident(work: Callable[[], object]) -> tuple[int, int] | None:
    """Resident bytes before work, and the most during it, as Linux tells them of a process."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak before
        before = _status("VmRSS")
        kept = work()
        peak = _status("VmHWM")
    except (OSError, StopIteration):
        return None
    del kept
    return before, peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _hand_back() -> None:
    """Gives back memory that is free but resident: a step that takes it again would not show."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _profiled() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _changes(profiled: profile) -> list[int]:
    """What was allocated (and, of that, freed) in the order in which it happened.

    Blocks are followed by their addresses, since the profiler states a size of its own memory for a
    block that another profile saw at the same address.
    """
    alive: dict[int, int] = {}
    changes = []
    for _, address, size in sorted(_allocations(profiled), key=itemgetter(0, 2)):
        if size > 0:
            alive[address] = size
        changes.append(size if size > 0 else -alive.pop(address, 0))
    return changes


def _allocations(profiled: profile) -> Iterator[tuple[int, int, int]]:
    """Nanoseconds, address, and bytes (negative where freed) of each event of the allocator."""
    # torch gives these events no public type.
    results: Any = profiled.profiler
    events = list(results.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == _MEMORY:
            block = event.extra_fields
            yield event.start_time_ns, block.ptr, block.alloc_size
