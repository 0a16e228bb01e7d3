"""Checks that an answer is a function of its image alone: asked again, in other company, otherwise.

Where answers follow the batch, whether a gradient is asked for, or what was asked before, attack,
judge and user ask different models, and the figure is that of none of them. A model that keeps its
first answer to each image, and gives it for whatever comes near, is right on every attacked image
once the clean ones were asked; who asks about an attacked image first meets the network behind the
memory. No attack that starts from the clean image ever does.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from defenses.checks.subject import Subject
from defenses.measuring.counting import exceeds, outnumbers
from defenses.measuring.measurement import moved
from defenses.measuring.verdict import Finding
from defenses.quantities import described
from defenses.shape import beside
from defenses.threat import ThreatModel

__all__ = [
    "asking_for_gradients_changes_nothing",
    "copied",
    "earlier_questions_change_nothing",
    "is_deterministic",
    "neighbours_change_nothing",
]

_FEW = 32  # images that are asked about one by one
_HARDLY = 0.01  # of the images: what rounding may turn in a model that rounds inside

_MANY = 64  # images that are asked about anew
_LEVEL = 1e-3 / 3  # how often an honest model may fail by chance, each of three times
# Shares of the radius, at each of which the images are turned to be new. What is remembered between
# one share and twice as far is seen: nearer nothing is, further all three answers are the same.
_SHARES = (1.0, 2.0, 0.5)
_RANDOM = "The answers are random: a difference could be chance"
_REMEMBERS = (
    "the model answers by what it was asked before, so that an attack which starts from the image "
    "meets its memory, and who asks about the attacked image first does not"
)

# A way of asking: which images were asked about, [k], and the answers, [k, classes].
_Way = Callable[[Subject], tuple[Tensor, Tensor]]


def is_deterministic(subject: Subject) -> Finding:
    """Fails where an image gets another answer the second time."""
    share = float(moved(subject.logits, subject.again).double().mean())
    if share == 0:
        return Finding.passed("Every image gets the same answer when asked again", share)
    return Finding.failed(
        f"{share:.1%} of the images get another answer when asked again",
        "a random defence must be attacked through its expectation (attack(..., draws=20))",
        share,
    )


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
        "ones",
    )


def asking_for_gradients_changes_nothing(subject: Subject) -> Finding:
    """Fails where the answers differ when gradients are asked for: the model notices an attack.

    An attack that needs no gradient, or one on a copy that cannot tell, meets another model.
    """
    return _judged(
        subject,
        _MODES,
        "the model notices an attack by its asking for gradients, and defends by that",
        "Every image gets the same answer whether or not gradients are asked for",
    )


def copied(model: nn.Module) -> nn.Module | None:
    """The model as it is before it is asked anything; None where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever it holds: then it is asked about images of its own alone
        return None


def earlier_questions_change_nothing(subject: Subject) -> Finding:
    """Fails where an answer depends on what the model was asked before.

    Two ways, for each misses something: a copy from before the first question is asked about points
    near the images, which the model was asked about after the images (a memory outside of what is
    copied is shared); and the model itself about images that it never saw, after one of two
    neighbours (a memory that is full keeps nothing more).
    """
    if bool(moved(subject.logits, subject.again).any()):
        return Finding.not_checked(_RANDOM)
    generator = torch.Generator().manual_seed(subject.seed)
    images, most = subject.images[:_MANY], 0.0
    if subject.unasked is not None:
        change = _change(images, subject.threat, generator, 1.0)
        change[1::2] = _change(images[1::2], subject.threat, generator, 0.25)
        near = (images + change).clamp(*subject.threat.bounds)
        usual = subject.answer(near, "memory")
        first = subject.answer(near, "memory", of=subject.unasked)
        found = _compared("first", "images near those evaluated", usual, first, _REMEMBERS)
        if found.outcome == "fail":
            return found
        most = found.figure or 0.0
    for share, turned in zip(_SHARES, _turned(images), strict=True):
        earlier, later = _nearer(subject, turned, generator, share)
        if outnumbers(earlier, later, level=_LEVEL):
            return Finding.failed(
                f"Of {len(images)} new images between two others, {earlier} are answered as the "
                f"one asked before, {later} as the one asked after",
                _REMEMBERS,
                earlier / len(images),
            )
    return Finding.passed("Images get the same answers whatever the model was asked before", most)


def _judged(subject: Subject, ways: Mapping[str, _Way], meaning: str, fine: str) -> Finding:
    """Compares the answers to each way of asking with the usual ones."""
    usual, most = subject.logits, 0.0
    if bool(moved(usual, subject.again).any()):
        return Finding.not_checked(_RANDOM)
    for words, ask in ways.items():
        try:
            rows, answers = ask(subject)
        except (MemoryError, torch.OutOfMemoryError):
            continue  # larger batches than it is evaluated in: no fault of its own
        except Exception as error:  # asked as usual there was none
            silent = f"Asked {words}, the model does not answer ({described(error)})"
            return Finding.failed(silent, meaning, 1.0)
        found = _compared(words, "images", usual[rows], answers, meaning)
        if found.outcome == "fail":
            return found
        most = max(most, found.figure or 0.0)
    return Finding.passed(fine, most)


def _compared(way: str, images: str, usual: Tensor, other: Tensor, meaning: str) -> Finding:
    """Fails where more answers differ, asked in another way, than rounding may turn."""
    others, turned = moved(usual, other), usual.argmax(1) != other.argmax(1)
    found = (
        f"Asked {way}, {int(others.sum())} of {len(others)} {images} get another answer, "
        f"{int(turned.sum())} another class"
    )
    share = float(others.double().mean())
    if exceeds(int(others.sum()), len(others), _HARDLY):
        return Finding.failed(found, meaning, share)
    return Finding.passed(found, share)


def _in_batches(subject: Subject, *, size: int | None) -> tuple[Tensor, Tensor]:
    """Asks in a random order, in batches of `size`; None keeps the usual size."""
    generator = torch.Generator().manual_seed(subject.seed)
    rows = torch.randperm(len(subject.images), generator=generator)
    rows = rows[:_FEW] if size == 1 else rows
    images = subject.images[rows.to(subject.images.device)]
    return rows, subject.answer(images, "company", batch_size=size)


def _beside(subject: Subject, *, copies: bool) -> tuple[Tensor, Tensor]:
    """Asks about each image as the last of four: after copies of itself, or blank images."""
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
    """Asks in a mode of autograd; `watched` images require a gradient."""
    with_it = partial(mode, subject.model)
    answers = subject.answer(subject.images, "clean", mode=with_it, watched=watched)
    return torch.arange(len(subject.images)), answers


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Parameters trainable: as a user asks. The scope around it freezes them again."""
    for each in model.parameters():
        each.requires_grad_(each.is_floating_point())
    with torch.no_grad():
        yield


def _turned(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images, turned about on the first axis, and on the last; recordings begin in the middle.

    Those have one axis, which is turned about already.
    """
    along = images.flip(-1) if images.ndim > 3 else images.roll(images.shape[2] // 2, 2)
    return images, images.flip(2), along


def _nearer(
    subject: Subject, images: Tensor, generator: torch.Generator, share: float
) -> tuple[int, int]:
    """Of new images, how many are answered more like a neighbour asked before than one asked after.

    The two lie opposite each other and which comes first is drawn, so that of a model without a
    memory each is as likely. In one call: between calls the model's buffers are put back.
    """
    low, high = subject.threat.bounds
    centre = (low + high) / 2
    new = centre + (centre - images) / 2  # negatives are far from all that was asked
    # Cut alike on both sides: the two must not differ but in their sign.
    room = (high - low) / 4
    change = _change(new, subject.threat, generator, share).clamp(-room, room)
    asked = torch.cat([new + change, new, new - change])
    size = min(len(new), subject.batch_size)
    answers = subject.answer(asked, "memory", batch_size=size).double()
    before, between, after = torch.split(answers, len(new))
    gaps = [(between - other).abs().amax(dim=1) for other in (before, after)]
    return int((gaps[0] < gaps[1]).sum()), int((gaps[1] < gaps[0]).sum())


def _change(
    images: Tensor, threat: ThreatModel, generator: torch.Generator, share: float
) -> Tensor:
    """A random step for each image, of this share of the radius."""
    noise = torch.randn(images.shape, generator=generator).to(images)
    if threat.norm == "l0":
        places = torch.rand(len(images), 1, *images.shape[2:], generator=generator).flatten(1)
        most = min(max(1, int(share * threat.eps)), places.shape[1])
        chosen = torch.zeros_like(places).scatter_(1, places.topk(most).indices, 1.0)
        return threat.width * noise.sign() * chosen.view(-1, 1, *images.shape[2:]).to(images)
    if threat.norm == "linf":
        return noise.sign() * (share * threat.eps)
    order = 2 if threat.norm == "l2" else 1
    lengths: Tensor = torch.linalg.vector_norm(noise.flatten(1), order, dim=1)
    return noise / beside(lengths, noise) * (share * threat.eps)


def _enabled(_: nn.Module) -> AbstractContextManager[None]:
    return torch.enable_grad()


def _disabled(_: nn.Module) -> AbstractContextManager[None]:
    return torch.no_grad()


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
    "with gradients enabled": partial(_in_mode, mode=_enabled),  # as an attack by the gradient asks
    # As the attacked images are judged.
    "about images that require a gradient": partial(_in_mode, mode=_disabled, watched=True),
    "with parameters that require a gradient": partial(_in_mode, mode=_trainable),
}
