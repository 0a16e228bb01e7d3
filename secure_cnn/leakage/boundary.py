"""How far an image is from where a model changes its mind, by labels alone: a signal of membership.

Images that a model was trained on lie deeper in their class than others (Choquette-Choo et al.
2021, arXiv 2007.14321, section 4.3). The search is `defenses`' Square, which needs nothing but
answers: told the class alone, it is one by random stripes and squares.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import ThreatModel
from defenses.attacks import Square
from privacy.leakage.signals import Answer
from privacy.statistics import Numbers
from secure_cnn.leakage import arguments

__all__ = ["BoundaryDistance"]


@final
@dataclass(frozen=True, kw_only=True)
class BoundaryDistance:
    """The least change of every pixel by which the class of an image was seen to change, in linf.

    Called as a `privacy.leakage.Signal`: float64 `[n]` of images in [0, 1] and their labels. 0
    where the model is wrong already, `farthest` where nothing changed it. The radius of the ball
    that is searched is halved up or down, round by round; then the way to the nearest image found
    is halved. What is said of an image is of that image alone: each is searched by itself, with the
    same random choices.

    Attributes:
        farthest: Largest distance, in (0, 1].
        rounds: Balls that are searched, at least 1.
        starts: Random starts in each ball, at least 1.
        squares: Changes of each start, at least 1.
        halvings: Of the way to what was found, at least 0.
        seed: Of the random choices.

    Raises:
        RunError: A value is out of range.

    Example:
        >>> BoundaryDistance().queries
        241
    """

    farthest: float = 0.5
    rounds: int = 5
    starts: int = 15
    squares: int = 2
    halvings: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.number(
            "farthest", self.farthest, "a distance in (0, 1]", lambda far: 0 < far <= 1
        )
        for name in ("rounds", "starts", "squares"):
            arguments.whole(name, getattr(self, name), least=1)
        for name in ("halvings", "seed"):
            arguments.whole(name, getattr(self, name), least=0)

    @property
    def queries(self) -> int:
        """How often a model is asked about one example, at most."""
        # In each ball about the image, about each start and its changes, and about what was found.
        ball = 2 + self.starts * (1 + self.squares)
        return 1 + self.rounds * ball + self.halvings

    def __call__(self, answer: Answer, images: Tensor, labels: Tensor, /) -> Numbers:
        """Distances, float64 `[n]`, in [0, farthest].

        Raises:
            ThreatModelError: The images are not in [0, 1].
            AttackError: They are no images, or the model does not answer with logits.
        """
        model = _ClassAlone(answer)
        right = _is_right(model, images, labels).tolist()
        found = [
            self._distance(model, images[i : i + 1], labels[i : i + 1]) if right[i] else 0.0
            for i in range(len(images))
        ]
        return np.array(found, dtype=np.float64)

    def _distance(self, model: nn.Module, image: Tensor, label: Tensor) -> float:
        near, far = 0.0, self.farthest
        beyond: Tensor | None = None
        for _ in range(self.rounds):
            radius = (near + far) / 2
            ball = ThreatModel(norm="linf", eps=radius)
            search = Square(ball, queries=self.squares, restarts=self.starts)
            found = search(model, image, label, seed=self.seed)
            if bool(_is_right(model, found, label)):
                near = radius
            else:
                far, beyond = min(radius, _apart(found, image)), found
        return far if beyond is None else self._along(model, image, beyond, label)

    def _along(self, model: nn.Module, image: Tensor, beyond: Tensor, label: Tensor) -> float:
        """Where on the way to an image of another class the class changes."""
        near, far = 0.0, 1.0
        for _ in range(self.halvings):
            middle = (near + far) / 2
            if bool(_is_right(model, image.lerp(beyond, middle), label)):
                near = middle
            else:
                far = middle
        return far * _apart(beyond, image)


@final
class _ClassAlone(nn.Module):
    """A model that says 1 for the class of its largest logit and 0 for all others."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, images: Tensor) -> Tensor:
        logits = self._answer(images)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(images.dtype)


def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == labels
    return right


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest change of a pixel."""
    return float((one - other).abs().max())
