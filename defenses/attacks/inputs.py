"""What an attack or an objective is given, looked at before anything is computed with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from defenses.errors import AttackError
from defenses.quantities import shown
from defenses.threat import Norm, ThreatModel

__all__ = ["check_batch", "check_classes", "check_threat"]


def check_threat(threat: object, owner: str = "", *, norms: Sequence[Norm] = ()) -> None:
    """Refuses what is no threat model, or one in a norm that its owner does not search.

    Raises:
        AttackError: Saying what came instead.
    """
    where = f"{owner}: expected a threat" if owner else "threat: expected a ThreatModel"
    if not isinstance(threat, ThreatModel):
        raise AttackError(f"{where}, got {shown(threat)}")
    if norms and threat.norm not in norms:
        raise AttackError(f"{where} in {' or '.join(norms)}, got {threat.norm}")


def check_batch(images: object, classes: object, what: str = "labels") -> None:
    """Refuses images that are not [n, c, h, w], and labels or targets that are not n classes.

    Args:
        classes: To be int64, 0 or more.

    Raises:
        AttackError: Saying what came instead.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise AttackError(f"images: expected a floating-point tensor, got {got}")
    if images.ndim != 4:
        raise AttackError(
            f"images: expected [n, channels, height, width], got {list(images.shape)}"
        )
    if not isinstance(classes, Tensor):
        raise AttackError(f"{what}: expected an int64 tensor, got {type(classes).__name__}")
    if classes.dtype != torch.int64 or classes.shape != images.shape[:1]:
        raise AttackError(
            f"{what}: expected int64 of shape [{len(images)}], "
            f"got {classes.dtype} of shape {list(classes.shape)}"
        )
    if len(classes) and int(classes.min()) < 0:
        raise AttackError(f"{what}: expected 0 or more, got {int(classes.min())}")


def check_classes(logits: object, labels: Tensor) -> Tensor:
    """The logits of a batch, where they tell all of its labels apart.

    Args:
        labels: int64, [n].

    Raises:
        AttackError: They are not [n, classes], or a label is none of the classes.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AttackError(f"model: expected logits of shape [{len(labels)}, classes], got {got}")
    classes = logits.shape[1]
    if len(labels) and int(labels.max()) >= classes:
        raise AttackError(
            f"labels: expected 0 to {classes - 1} for a model of {classes} classes, "
            f"got {int(labels.max())}"
        )
    return logits
