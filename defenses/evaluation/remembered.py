"""What a state file says of a trial, checked before it is believed.

A file that names the right model, images and attacks may still hold outcomes that no evaluation
gives: images broken that were never attacked, or shown ones that are outside of the ball. What is
consistent is believed: who can write the file can write that every image survived.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from defenses.errors import EvaluationError
from defenses.threat import ThreatModel

__all__ = ["FOOLED", "SURVIVED", "UNTRIED", "Remembered"]

FOOLED = 0
SURVIVED = 1
UNTRIED = -1


@final
@dataclass(frozen=True, kw_only=True)
class Remembered:
    """Outcomes and example images of an interrupted trial.

    Attributes:
        outcomes: By attack, in order: `FOOLED`, `SURVIVED` or `UNTRIED`, int8, [n] each.
        shown: By position, an attacked image and the class seen in it.
    """

    outcomes: Mapping[str, Tensor]
    shown: Mapping[int, tuple[Tensor, int]]

    @classmethod
    def read(
        cls, content: Mapping[str, Any], *, names: Sequence[str], correct: Tensor, exhaustive: bool
    ) -> "Remembered":
        """What a state file holds.

        Args:
            content: As `Trial.content` gives it.
            correct: Which images are right at first, bool, [n].
            exhaustive: Whether attacks are tried on images too that another has fooled.

        Raises:
            EvaluationError: No evaluation with these attacks leaves such a state.
        """
        try:
            rows = dict(content["outcomes"])
            shown = {int(key): _image(each) for key, each in dict(content["shown"]).items()}
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise _forged(f"it cannot be read ({error!r})") from error
        if not all(0 <= position < len(correct) for position in shown):
            raise _forged(f"it shows images that are none of the {len(correct)}")
        if list(rows) != list(names)[: len(rows)]:
            raise _forged(f"it has outcomes of {list(rows)}, the attacks are {list(names)}")
        outcomes = {name: _row(name, row, len(correct)) for name, row in rows.items()}
        standing = correct.clone()
        for number, (name, row) in enumerate(outcomes.items()):
            if bool(((row != UNTRIED) & ~standing).any()):
                raise _forged(f"{name} is said to have attacked images that it is not tried on")
            if number < len(outcomes) - 1 and bool(((row == UNTRIED) & standing).any()):
                raise _forged(f"{name} is unfinished, and yet others came after it")
            standing = standing if exhaustive else standing & (row != FOOLED)
        return cls(outcomes=outcomes, shown=shown)

    def check_shown(self, clean: Tensor, *, classes: int, threat: ThreatModel) -> None:
        """Refuses example images that no attack on these images gives.

        Args:
            clean: The images that were attacked, in the order of `shown`, [k, c, h, w].

        Raises:
            EvaluationError: One is of another shape, outside of the ball, or seen as no class.
        """
        for image, (position, (found, prediction)) in zip(clean, self.shown.items(), strict=True):
            if found.shape != image.shape or not 0 <= prediction < classes:
                raise _forged(f"image {position} is shown in another shape, or as no class")
            if not bool(threat.contains(image[None], found[None].to(image.dtype)).all()):
                raise _forged(f"image {position} is shown outside of the ball")


def _row(name: str, row: object, count: int) -> Tensor:
    """The outcomes of one attack."""
    known = {FOOLED, SURVIVED, UNTRIED}
    if not isinstance(row, list) or len(row) != count:
        raise _forged(f"{name} has no outcome for each of {count} images")
    if not all(type(value) is int and value in known for value in row):
        raise _forged(f"{name} has outcomes that are none of {sorted(known)}")
    return torch.tensor(row, dtype=torch.int8)


def _image(entry: Sequence[Any]) -> tuple[Tensor, int]:
    """An image as it is written down, and the class seen in it."""
    shape, pixels, prediction = entry
    if type(prediction) is not int:
        raise TypeError(f"expected a class, got {prediction!r}")
    values = np.frombuffer(base64.b64decode(pixels, validate=True), np.float32).copy()
    return torch.from_numpy(values).reshape([int(size) for size in shape]), prediction


def _forged(reason: str) -> EvaluationError:
    """What is said of a state that no evaluation leaves."""
    return EvaluationError(
        f"state: no evaluation with these attacks leaves it: {reason}; give another path"
    )
