"""What a model is asked about an example, so that one can guess whether it was trained on it.

A signal is a number for each example, the higher the more a model seems to know it.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.statistics import Numbers

__all__ = ["Answer", "Confidence", "Question", "Signal", "checked_logits", "confidence"]

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
    logits = checked_logits(logits, labels)
    if logits.shape[1] < 2:
        raise LeakageError(
            f"logits: expected at least two classes in a row, got {list(logits.shape)}"
        )
    wide, own = logits.detach().double().cpu(), labels.detach().long().cpu()[:, None]
    others = wide.scatter(1, own, -torch.inf).logsumexp(1)
    found: Numbers = (wide.gather(1, own)[:, 0] - others).numpy()
    return found


def checked_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model says, if it is a row of logits for each label, with the labels' classes.

    Raises:
        LeakageError: It is not.
    """
    arguments.labels(labels)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise LeakageError(
            "logits: expected a tensor of floats, got "
            f"{getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if logits.ndim != 2 or logits.shape[:1] != labels.shape:
        raise LeakageError(
            f"logits: expected one row for each of {len(labels)} labels, got {list(logits.shape)}"
        )
    classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise LeakageError(
            f"labels: expected 0 to {classes - 1}, as the model has {classes} classes, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return logits


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
        arguments.called("signal", self.signal, "what asks a model, as Confidence()", takes=3)
        arguments.whole("queries", self.queries, least=1)
        if self.most is not None:
            arguments.whole("most", self.most, least=_FEWEST_ROWS)
