"""The published workloads: networks, image sizes and batches that anyone can measure again."""

import torch

from secure_cnn.bench.step import Workload, synthetic
from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError
from secure_cnn.models import build_model

__all__ = ["CASES", "workload"]

CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "compact": ((1, 28, 28), 256),
    "vgg11": ((3, 32, 32), 64),
    "resnet20": ((3, 32, 32), 64),
    "resnet18": ((3, 64, 64), 32),
}
"""Image shape and batch size by network."""


def workload(name: str) -> Workload:
    """One of the published cases, in the layout in which plain training is fastest.

    Raises:
        RunError: There is no such case.
    """
    if name not in CASES:
        raise RunError(f"case: expected one of {', '.join(CASES)}, got {name}")
    shape, batch = CASES[name]
    spec = DataSpec(shape=shape, classes=tuple(str(digit) for digit in range(10)))
    return Workload(
        case=name,
        model=build_model(name, spec),
        split=synthetic(spec, batch),
        memory_format=torch.channels_last,
    )
