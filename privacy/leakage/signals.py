"""What a model is asked about an example, so that one can guess whether it was trained on it.

A signal is a number for each example, the higher the more a model seems to know it.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from privacy.errors import LeakageError
from privacy.statistics import Numbers

__all__ = ["Answer", "Confidence", "Question", "Signal", "confidence"]

_FEWEST_ROWS = 4


class Answer(Protocol):
    """A model, or what else gives logits `[n, classes]` for images `[n, ...]`."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """The logits."""


class Signal(Protocol):
    """What is asked: float64 `[n]` of images `[n, ...]` and their labels `[n]`.

    What it says of an example is of that example alone, whichever others are in the batch.
    """

    def __call__(self, answer: Answer, images: Tensor, labels: Tensor, /) -> Numbers:
        """A number for each image."""


def confidence(logits: Tensor, labels: Tensor) -> Numbers:
    """How sure of each example's own class: log p - log(1 - p), float64 `[n]`.

    Taken from logits, so that it neither saturates nor needs a small number added (Carlini et al.
    2022, arXiv 2112.03570, section IV).

    Args:
        logits: `[n, classes]`, of at least two classes.
        labels: `[n]`, in `[0, classes)`.

    Raises:
        LeakageError: Shapes or values do not fit.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        array([0., 2.])
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise LeakageError(
            "logits: expected one row of at least two classes for each label, got "
            f"{list(logits.shape)} for labels {list(labels.shape)}"
        )
    classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise LeakageError(
            f"labels: expected 0 to {classes - 1}, as the model has {classes} classes, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    wide, own = logits.detach().double().cpu(), labels.detach().long().cpu()[:, None]
    others = wide.scatter(1, own, -torch.inf).logsumexp(1)
    found: Numbers = (wide.gather(1, own)[:, 0] - others).numpy()
    return found


@final
@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Asks once how sure a model is of each example's own class, by `confidence`."""

    def __call__(self, answer: Answer, images: Tensor, labels: Tensor, /) -> Numbers:
        """The log odds of each image's own class."""
        return confidence(answer(images), labels)


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A signal, and of how many examples each model is asked for it.

    Attributes:
        signal: What is asked.
        queries: How often a model is asked about one example, at least 1; the answer's price.
        most: Rows of the table that are asked, at least 4: half of them members of the target, half
            of them others of the pool, the first of each in the design's order. None asks all, and
            the population.

    Raises:
        LeakageError: A number is out of its range.

    Example:
        >>> Question().queries
        1
    """

    signal: Signal = Confidence()
    queries: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise LeakageError(f"queries: expected at least 1, got {self.queries}")
        if self.most is not None and self.most < _FEWEST_ROWS:
            raise LeakageError(
                f"most: expected at least {_FEWEST_ROWS} rows, or None for all, got {self.most}"
            )
