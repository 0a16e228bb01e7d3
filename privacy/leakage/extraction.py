"""Copies of a model made of its answers alone: how good they are for how many questions.

A copy is worth something only beside what its maker could train without asking: the baseline, a
student of the pool's own labels, or of as many as are known, is part of every result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.signals import Answer
from privacy.validate import shown

__all__ = [
    "AnswerMode",
    "Copy",
    "Labels",
    "Learn",
    "Probabilities",
    "TopProbabilities",
    "extract",
]

_BATCH = 500


class AnswerMode(Protocol):
    """What of its logits a victim shows."""

    def __call__(self, logits: Tensor, /) -> Tensor:
        """Rows `[n, classes]` that sum to 1: what a copy is taught."""


class Learn(Protocol):
    """Trains a student on images and, for each, a distribution over classes."""

    def __call__(self, images: Tensor, targets: Tensor, /, *, seed: int) -> Answer:
        """A finished student."""


@final
@dataclass(frozen=True, kw_only=True)
class Probabilities:
    """All probabilities, as they are.

    Example:
        >>> Probabilities()(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __call__(self, logits: Tensor, /) -> Tensor:
        """The softmax."""
        return logits.softmax(1)


@final
@dataclass(frozen=True, kw_only=True)
class TopProbabilities:
    """The largest few, rounded; what is missing from 1 is spread over all other classes.

    Attributes:
        count: How many, at least 1.
        digits: Decimals that are shown, at least 0.

    Raises:
        LeakageError: A value is out of range.

    Example:
        >>> TopProbabilities(count=1, digits=1)(torch.tensor([[2.0, 0.0, 0.0]]).log_softmax(1))
        tensor([[0.8000, 0.1000, 0.1000]])
    """

    count: int = 3
    digits: int = 2

    def __post_init__(self) -> None:
        arguments.whole("count", self.count, least=1)
        arguments.whole("digits", self.digits, least=0)

    def __call__(self, logits: Tensor, /) -> Tensor:
        """Few and rounded."""
        probabilities = logits.softmax(1)
        count = min(self.count, logits.shape[1])
        values, classes = probabilities.topk(count, dim=1)
        values = (values * 10**self.digits).round() / 10**self.digits
        left = (1 - values.sum(1, keepdim=True)).clamp_min(0)
        others = max(1, logits.shape[1] - count)
        shown = (left / others).expand_as(probabilities).clone().scatter(1, classes, values)
        whole: Tensor = shown / shown.sum(1, keepdim=True)
        return whole


@final
@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class alone.

    Example:
        >>> Labels()(torch.tensor([[0.0, 2.0]]))
        tensor([[0., 1.]])
    """

    def __call__(self, logits: Tensor, /) -> Tensor:
        """One-hot."""
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """What a student of so many answers is worth.

    Attributes:
        queries: Questions that were asked.
        accuracy: Share of the test images whose class it says.
        fidelity: Share of the test images of which it says what the victim says.
        baseline: `accuracy` of a student that never asked: of the pool's own labels, as many; None
            where none are known.
        baseline_fidelity: `fidelity` of that student; None where there is none.
        student: The copy.
    """

    queries: int
    accuracy: float
    fidelity: float
    baseline: float | None
    baseline_fidelity: float | None
    student: Answer


def extract(
    victim: Answer,
    pool: Tensor,
    learn: Learn,
    *,
    test: tuple[Tensor, Tensor],
    budgets: Sequence[int],
    mode: AnswerMode | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> list[Copy]:
    """Makes a copy of a victim for each budget, and a student that never asked beside it.

    Args:
        victim: Answers with logits; nothing else of it is used.
        pool: Images `[n, ...]` that its copier has; the first ones are asked about.
        learn: Trains a student, the copies and the baselines alike.
        test: Images and labels on which copies are judged; none of them is asked about.
        budgets: Questions, each at least 1 and at most the size of the pool.
        mode: What of its logits the victim shows; all probabilities by default.
        labels: `[n]`, the pool's own, where its copier has them.
        seed: Of the students.

    Returns:
        A copy for each budget, in their order.

    Raises:
        LeakageError: A budget is out of range, or labels are not of the pool.
    """
    mode = Probabilities() if mode is None else mode
    _check_callers(victim, learn, mode, seed)
    if not arguments.instance("pool", pool, Tensor).ndim > 1:
        raise LeakageError(f"pool: expected images [n, ...], got {list(pool.shape)}")
    for budget in arguments.sequence("budgets", budgets, "numbers of questions"):
        if not arguments.whole("budgets", budget, least=1) <= len(pool):
            raise LeakageError(f"budgets: expected 1 to {len(pool)} questions, got {budget}")
    if labels is not None:
        labels = arguments.labels(labels)
        if labels.shape != pool.shape[:1]:
            raise LeakageError(
                f"labels: expected one for each of {len(pool)} images of the pool, got "
                f"{list(labels.shape)}"
            )
    test = _checked_test(test)
    said = _answers(victim, test[0])
    copies = []
    for budget in budgets:
        asked = pool[:budget]
        shown_to = arguments.floats("mode", mode(_answers(victim, asked)), 2)
        student = _student(learn, asked, shown_to, seed)
        alone = None
        if labels is not None:
            own = torch.nn.functional.one_hot(labels[:budget], said.shape[1]).to(said.dtype)
            alone = _student(learn, asked, own, seed)
        accuracy, fidelity = _judged(student, test, said)
        baseline = (None, None) if alone is None else _judged(alone, test, said)
        copies.append(
            Copy(
                queries=budget,
                accuracy=accuracy,
                fidelity=fidelity,
                baseline=baseline[0],
                baseline_fidelity=baseline[1],
                student=student,
            )
        )
    return copies


def _check_callers(victim: Answer, learn: Learn, mode: AnswerMode, seed: int) -> None:
    arguments.called("victim", victim, "a model, or what else gives logits of images", takes=1)
    told = "a function that trains a student, learn(images, targets, *, seed)"
    arguments.called("learn", learn, told, takes=2, seed=True)
    arguments.called("mode", mode, "what a victim shows of its logits, as Labels()", takes=1)
    arguments.whole("seed", seed, least=0)


def _checked_test(test: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Images and as many labels, of one example or more."""
    if not isinstance(test, (tuple, list)) or len(test) != 2:
        raise LeakageError(f"test: expected images and their labels, got {shown(test)}")
    images = arguments.instance("test", test[0], Tensor)
    labels = arguments.labels(test[1])
    if images.shape[:1] != labels.shape or not len(labels):
        raise LeakageError(
            "test: expected images with a label each, at least one, got "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    return images, labels


def _answers(answer: Answer, images: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [answer(part) for part in torch.split(images, _BATCH)]
    for part in parts:
        if not bool(arguments.floats("answer", part, 2).isfinite().all()):
            raise LeakageError("answer: expected finite logits [n, classes], got others")
    found = torch.cat(parts)
    if len(found) != len(images):
        raise LeakageError(
            f"answer: expected a row for each of {len(images)} images, got {len(found)}"
        )
    return found


def _student(learn: Learn, images: Tensor, targets: Tensor, seed: int) -> Answer:
    student: Answer = arguments.called("learn", learn(images, targets, seed=seed), "a student")
    return student


def _judged(student: Answer, test: tuple[Tensor, Tensor], said: Tensor) -> tuple[float, float]:
    found = _answers(student, test[0]).argmax(1)
    right, same = found == test[1], found == said.argmax(1)
    return float(right.double().mean()), float(same.double().mean())
