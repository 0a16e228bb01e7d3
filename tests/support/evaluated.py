"""A data set and a threat model for evaluations."""

from types import SimpleNamespace

import torch

from defenses import (
    ThreatModel,
)

LINF = ThreatModel(norm="linf", eps=0.1)


def tensors(n=40, classes=4, seed=0):
    """Random uint8 images and labels, as two tensors."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return SimpleNamespace(images=images, labels=torch.randint(classes, (n,), generator=draw))
