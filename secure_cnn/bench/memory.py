"""Peak memory of a step, each variant in a process of its own.

It reads the peak resident size that Linux keeps for a process; elsewhere nothing is measured.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from secure_cnn.bench.cases import workload
from secure_cnn.bench.rivals import RIVALS, rival_step
from secure_cnn.bench.step import Workload, protections, stepper, subset
from secure_cnn.errors import RunError
from secure_cnn.report import Row

__all__ = ["measure_memory", "print_peak"]

_PROCESS = Path("/proc/self")
_WARMUP, _STEPS = 2, 3
_TINY = 2


def measure_memory(case: str, variants: Iterable[str]) -> list[Row]:
    """Peak bytes of a step beyond the process before it, and the ratio to plain.

    Args:
        case: One of `CASES`.
        variants: `plain`, `private` and rivals; plain is measured in any event.

    Returns:
        `memory` in MiB and `memory_ratio` of each; nothing where the system keeps no peak.

    Raises:
        RunError: A measuring process failed.

    Example:
        >>> measure_memory("compact", []) if not _PROCESS.exists() else []
        []
    """
    if not (_PROCESS / "clear_refs").exists():
        return []
    found = {name: _in_process(case, name) for name in dict.fromkeys(["plain", *variants])}
    rows = []
    for name, size in found.items():
        rows.append(_row(case, name, "memory", size / 2**20, "MiB"))
        rows.append(_row(case, name, "memory_ratio", size / found["plain"], "x"))
    return rows


def print_peak(case: str, variant: str) -> None:
    """Prints the bytes that a step of this very process takes; for `measure_memory`.

    Example:
        >>> callable(print_peak)
        True
    """
    print(_peak(workload(case), variant))


def _in_process(case: str, variant: str) -> int:
    """Bytes that a fresh process measures."""
    code = "import sys; from secure_cnn.bench import memory; memory.print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, case, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RunError(f"memory of {case}, {variant}: the process failed: {' '.join(last)}")
    return int(done.stdout)


def _row(case: str, variant: str, metric: str, value: float, unit: str) -> Row:
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


def _step_of(load: Workload, variant: str) -> Callable[[], None]:
    """The step of a variant or a rival."""
    if variant in RIVALS:
        return rival_step(load, variant)
    return stepper(load, protections({})[variant])


def _peak(load: Workload, variant: str) -> int:
    """Bytes at the peak of a step beyond those before the first whole step."""
    _step_of(replace(load, split=subset(load.split, _TINY)), variant)()
    _trim()
    before = _status("VmRSS")
    step = _step_of(load, variant)
    for _ in range(_WARMUP):
        step()
    _trim()
    (_PROCESS / "clear_refs").write_text("5")
    for _ in range(_STEPS):
        step()
    return _status("VmHWM") - before


def _trim() -> None:
    """Gives free memory back to the system, where its C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """One of the process' sizes in bytes."""
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
