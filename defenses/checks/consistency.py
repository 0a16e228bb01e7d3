"""Checks that an answer is a function of its image alone: asked again, in other company, otherwise.

An attack searches the model that it asks; a judge and a user ask it in their own way. Where answers
follow the batch, or whether a gradient is asked for, these are different models, and the figure is
that of none of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from defenses.checks.soundness import Finding
from defenses.checks.subject import Subject
from defenses.evaluation.counting import exceeds
from defenses.evaluation.repeated import moved
from defenses.quantities import described

__all__ = ["asking_for_gradients_changes_nothing", "is_deterministic", "neighbours_change_nothing"]

_FEW = 32  # images that are asked about one by one
_HARDLY = 0.01  # of the images: what rounding may turn in a model that rounds inside

# A way of asking: which images were asked about, [k], and the answers, [k, classes].
_Way = Callable[[Subject], tuple[Tensor, Tensor]]


def is_deterministic(subject: Subject) -> Finding:
    """Fails where an image gets another answer the second time."""
    share = float(moved(subject.logits, subject.again).double().mean())
    if share > 0:
        return Finding(
            outcome="fail",
            figure=share,
            sentence=f"{share:.1%} of the images get another answer when asked again: a random "
            "defence must be attacked through its expectation (attack(..., draws=20)).",
        )
    sentence = "Every image gets the same answer when asked again."
    return Finding(outcome="pass", figure=share, sentence=sentence)


def neighbours_change_nothing(subject: Subject) -> Finding:
    """Fails where the other images of a batch, its size or its order change an image's answer.

    A figure would then hold for one batch size and one order of the images, and an attack whose
    batches shrink as images fall would search another model than the one that is judged.
    """
    return _judged(
        subject,
        _COMPANY,
        "predictions depend on the other images of the batch (statistics of the batch at test "
        "time?), so that no figure holds for an image by itself",
        "Every image gets the same answer alone, among others, in another order and beside blank "
        "ones.",
    )


def asking_for_gradients_changes_nothing(subject: Subject) -> Finding:
    """Fails where a forward pass differs when gradients are asked for: the defence is to notice.

    An attack that needs no gradient, or one on a copy that cannot tell, meets another model.
    """
    return _judged(
        subject,
        _MODES,
        "the model notices an attack by its asking for gradients, and defends by that",
        "Every image gets the same answer whether or not gradients are asked for.",
    )


def _judged(subject: Subject, ways: Mapping[str, _Way], meaning: str, fine: str) -> Finding:
    """Asks in each way, and compares with the usual answers."""
    usual, most = subject.logits, 0.0
    if bool(moved(usual, subject.again).any()):
        sentence = "The answers are random: a difference could be chance."
        return Finding(outcome="not checked", sentence=sentence)
    for words, ask in ways.items():
        try:
            rows, answers = ask(subject)
        except (MemoryError, torch.OutOfMemoryError):
            continue  # larger batches than it is evaluated in: no fault of its own
        except Exception as error:  # asked as usual there was none
            sentence = f"Asked {words}, the model does not answer ({described(error)}): {meaning}."
            return Finding(outcome="fail", figure=1.0, sentence=sentence)
        others = moved(usual[rows], answers)
        share, turned = float(others.double().mean()), usual[rows].argmax(1) != answers.argmax(1)
        if exceeds(int(others.sum()), len(rows), _HARDLY):
            sentence = (
                f"Asked {words}, {int(others.sum())} of {len(rows)} images get another answer, "
                f"{int(turned.sum())} another class: {meaning}."
            )
            return Finding(outcome="fail", figure=share, sentence=sentence)
        most = max(most, share)
    return Finding(outcome="pass", figure=most, sentence=fine)


def _in_batches(subject: Subject, *, size: int | None) -> tuple[Tensor, Tensor]:
    """In another order, in batches of that size; None keeps the usual one."""
    generator = torch.Generator().manual_seed(subject.seed)
    rows = torch.randperm(len(subject.images), generator=generator)
    rows = rows[:_FEW] if size == 1 else rows
    images = subject.images[rows.to(subject.images.device)]
    return rows, subject.answer(images, "company", batch_size=size)


def _beside(subject: Subject, *, copies: bool) -> tuple[Tensor, Tensor]:
    """Each as the last of four: after copies of itself, or after images of one colour each."""
    few = subject.images[:_FEW]
    low, high = subject.threat.bounds
    blank = [torch.full_like(few, each) for each in (low, high, (low + high) / 2)]
    together = torch.stack([*(3 * [few] if copies else blank), few], dim=1).flatten(0, 1)
    return torch.arange(len(few)), subject.answer(together, "company", batch_size=4)[3::4]


def _in_mode(
    subject: Subject,
    mode: Callable[[nn.Module], AbstractContextManager[None]],
    *,
    watched: bool = False,
) -> tuple[Tensor, Tensor]:
    """In a mode of autograd, with images that require a gradient or do not."""
    with_it = partial(mode, subject.model)
    answers = subject.answer(subject.images, "clean", mode=with_it, watched=watched)
    return torch.arange(len(subject.images)), answers


def _enabled(_: nn.Module) -> AbstractContextManager[None]:
    """As an attack by the gradient asks."""
    return torch.enable_grad()


def _disabled(_: nn.Module) -> AbstractContextManager[None]:
    """As a judge asks."""
    return torch.no_grad()


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """As a user asks, whose parameters nobody froze; the scope around it freezes them again."""
    for each in model.parameters():
        each.requires_grad_(each.is_floating_point())
    with torch.no_grad():
        yield


_COMPANY: Mapping[str, _Way] = {
    "alone": partial(_in_batches, size=1),
    "in other batches of 3": partial(_in_batches, size=3),
    "in other batches of 8": partial(_in_batches, size=8),
    "in another order": partial(_in_batches, size=None),
    "all together": partial(_in_batches, size=1 << 20),
    "beside blank images": partial(_beside, copies=False),
    "beside copies of itself": partial(_beside, copies=True),
}
_MODES: Mapping[str, _Way] = {
    "for gradients of the images": partial(_in_mode, mode=_enabled, watched=True),
    "with gradients enabled": partial(_in_mode, mode=_enabled),
    "about images that require a gradient": partial(_in_mode, mode=_disabled, watched=True),
    "with parameters that require a gradient": partial(_in_mode, mode=_trainable),
}
