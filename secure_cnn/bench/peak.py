"""Peak memory of a training: what the allocator handed out, and what the process held.

On the CPU the allocator's figure is exact (`bench.memory`); on CUDA it is torch's own count of the
device. The resident size is the whole process with its libraries and whatever its memory manager
kept, so it is to be read in absolute terms only.
"""

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from secure_cnn.bench.memory import peak_bytes
from secure_cnn.bench.rows import measured_row
from secure_cnn.bench.step import Workload
from secure_cnn.report import Row

__all__ = ["MakeStep", "cuda_peak_bytes", "peak_rows", "resident_peak_bytes"]

MakeStep = Callable[[], Callable[[], object]]
"""Makes a step with all that it keeps."""

_MIB = 2**20
_WARMUP = 2


def peak_rows(load: Workload, makers: Mapping[str, MakeStep]) -> list[Row]:
    """The peak of each variant's step, weights apart, and its ratio to `plain`.

    Args:
        load: The workload that the steps are on.
        makers: By variant, `plain` among them.

    Returns:
        `memory` in MiB and `memory_ratio`; and `resident` in MiB where the system tells.

    Example:
        >>> from secure_cnn.bench.step import synthetic
        >>> from secure_cnn.data import DataSpec
        >>> from torch import nn
        >>> images = synthetic(DataSpec(shape=(1, 8, 8), classes=("0", "1")), 4)
        >>> load = Workload(case="none", model=nn.Linear(1, 1), split=images)
        >>> rows = peak_rows(load, {"plain": lambda: lambda: torch.zeros(1000)})
        >>> [row.metric for row in rows][:2]
        ['memory', 'memory_ratio']
    """
    device = next(load.model.parameters()).device
    weights = sum(p.numel() * p.element_size() for p in load.model.parameters())
    peaks = {name: _device_peak(make, device) - weights for name, make in makers.items()}
    rows = []
    for name, make in makers.items():
        against = [peaks[name] / peaks["plain"]]
        rows.append(measured_row(load.case, name, "memory", [peaks[name] / _MIB], "MiB"))
        rows.append(measured_row(load.case, name, "memory_ratio", against, "x"))
        resident = resident_peak_bytes(make)
        if resident is not None:
            rows.append(measured_row(load.case, name, "resident", [resident / _MIB], "MiB"))
    return rows


def cuda_peak_bytes(make: MakeStep, device: torch.device) -> int:
    """Bytes that making a step and taking it have allocated on a CUDA device at most.

    Example:
        >>> cuda_peak_bytes.__name__
        'cuda_peak_bytes'
    """
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
    """The most bytes that this process had resident during a step; None where nobody tells.

    Example:
        >>> found = resident_peak_bytes(lambda: lambda: torch.zeros(1000))
        >>> found is None or found > 4000
        True
    """
    gc.collect()
    step = make()
    for _ in range(_WARMUP):
        step()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        step()
        lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _device_peak(make: MakeStep, device: torch.device) -> int:
    """The allocator's peak, whichever allocates."""

    def quiet() -> Callable[[], None]:
        step = make()

        def call() -> None:
            step()

        return call

    return cuda_peak_bytes(make, device) if device.type == "cuda" else peak_bytes(quiet)
