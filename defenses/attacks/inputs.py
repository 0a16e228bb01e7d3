"""What an attack or an objective is given, checked before anything is computed with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from defenses.errors import AttackError
from defenses.quantities import is_real, is_whole, is_word, shown
from defenses.threat import Norm, ThreatModel

__all__ = [
    "OWN_WORD",
    "Setting",
    "check_batch",
    "check_classes",
    "check_one_each",
    "check_setting",
    "check_threat",
    "own_name",
]

Setting = bool | int | float | str

OWN_WORD = "own: "
"""How the name of something of the user's own begins among the settings of a report."""

# Far beyond what any setting means, and far within what float32 can compute with.
_LARGEST = 1e12


def own_name(brought: object) -> str:
    """What a report calls a loss or a surrogate of the user's own."""
    return f"{OWN_WORD}{getattr(brought, '__name__', type(brought).__name__)}"


def check_setting(where: str, value: object, kind: object) -> None:
    """Refuses a setting of another kind, or out of its range.

    Args:
        where: Whose setting it is, for the message.
        kind: `bool`; `int`, which is at least 1; `float`, from 0 to 1e12; or the words allowed.
    """
    if kind is bool:
        fits, expected = isinstance(value, bool), "True or False"
    elif kind is int:
        fits, expected = is_whole(value, least=1), "a whole number, at least 1"
    elif isinstance(kind, tuple):
        fits, expected = is_word(value, kind), " or ".join(map(repr, kind))
    else:
        fits = is_real(value) and 0 <= value <= _LARGEST
        expected = f"a finite number, at least 0 and at most {_LARGEST:g}"
    if not fits:
        raise AttackError(f"{where}: expected {expected}, got {shown(value)}")


def check_threat(threat: object, owner: str = "", *, norms: Sequence[Norm] = ()) -> None:
    """Refuses what is no threat model, or one in a norm that its owner does not search."""
    where = f"{owner}: expected a threat" if owner else "threat: expected a ThreatModel"
    if not isinstance(threat, ThreatModel):
        raise AttackError(f"{where}, got {shown(threat)}")
    if norms and threat.norm not in norms:
        raise AttackError(f"{where} in {' or '.join(norms)}, got {threat.norm}")


def check_batch(images: object, classes: object, what: str = "labels") -> None:
    """Refuses images that are not [n, c, h, w], and labels or targets that are not n classes.

    Classes are int64 and at least 0.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise AttackError(f"images: expected a floating-point tensor, got {got}")
    if images.ndim != 4:
        raise AttackError(
            f"images: expected [n, channels, height, width], got {list(images.shape)}"
        )
    classes = check_one_each(classes, images, what)
    if len(classes) and int(classes.min()) < 0:
        raise AttackError(f"{what}: expected 0 or more, got {int(classes.min())}")


def check_one_each(classes: object, images: Tensor, what: str = "labels") -> Tensor:
    """The classes, refused unless they are int64 and one for each image."""
    if not isinstance(classes, Tensor):
        raise AttackError(f"{what}: expected an int64 tensor, got {type(classes).__name__}")
    if classes.dtype != torch.int64 or classes.shape != images.shape[:1]:
        raise AttackError(
            f"{what}: expected int64 of shape [{len(images)}], one for each image, "
            f"got {classes.dtype} of shape {list(classes.shape)}"
        )
    return classes


def check_classes(logits: object, labels: Tensor) -> Tensor:
    """The logits, refused unless they are [n, classes] with a class for every label."""
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
