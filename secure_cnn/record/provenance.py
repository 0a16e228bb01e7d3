"""Provenance: on what, and with which versions, a number came about.

Deliberately not here: host names, user names and paths. They say nothing about a number, and
records are handed on.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["hardware", "version", "versions"]

_DISTRIBUTIONS = ("torch", "opacus", "torchattacks", "cryptography", "safetensors", "secure-cnn")


def versions() -> dict[str, str]:
    """The versions of Python and of everything that a number may depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _DISTRIBUTIONS}


def version(distribution: str) -> str:
    """The installed version of one distribution; one that is missing says so."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What this process may use of the machine it runs on.

    Returns:
        `cpu` (model), `cores` (logical, usable by this process), `threads` (torch's), `memory`
        (bytes; None where the system does not tell) and `device` (a GPU by its model).
    """
    return {
        "cpu": _cpu(Path("/proc/cpuinfo")),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "device": _device(torch.device(device)),
    }


def _cpu(cpuinfo: Path) -> str:
    """The processor's own name, or at least its architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _cores() -> int:
    """Logical cores that this process is allowed to run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    """Physical memory in bytes."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device(device: torch.device) -> str:
    """A device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
