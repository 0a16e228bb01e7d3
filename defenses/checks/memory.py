"""A check that an answer does not follow from earlier questions: a model may remember, and repeat.

A model that keeps its first answer to each image, and gives it for whatever comes near, is right on
every attacked image once the clean ones were asked; who asks about an attacked image first meets
the network behind the memory. No attack that starts from the clean image ever does.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defenses.checks.soundness import Finding
from defenses.checks.subject import Subject
from defenses.evaluation.counting import exceeds, outnumbers
from defenses.evaluation.repeated import moved
from defenses.threat import ThreatModel

__all__ = ["copied", "earlier_questions_change_nothing"]

_MANY = 64  # images that are asked about anew
_HARDLY = 0.01  # of the images: what rounding may turn in a model that rounds inside
_LEVEL = 1e-3 / 3  # how often an honest model may fail by chance, each of three times
# Shares of the radius, and how images are turned to be new each time. What is remembered between
# one share and twice as far is seen: nearer nothing is, further all three answers are the same.
_TURNS: Mapping[float, tuple[int, ...]] = {1.0: (), 2.0: (2,), 0.5: (3,)}
_MEANING = (
    "the model answers by what it was asked before, so that an attack which starts from the image "
    "meets its memory, and who asks about the attacked image first does not"
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
        sentence = "The answers are random: a difference could be chance."
        return Finding(outcome="not checked", sentence=sentence)
    generator = torch.Generator().manual_seed(subject.seed)
    images, most = subject.images[:_MANY], 0.0
    if subject.unasked is not None:
        change = _change(images, subject.threat, generator, 1.0)
        change[1::2] = _change(images[1::2], subject.threat, generator, 0.25)
        near = (images + change).clamp(*subject.threat.bounds)
        usual = subject.answer(near, "memory")
        first = subject.answer(near, "memory", of=subject.unasked)
        others, turned = moved(usual, first), usual.argmax(1) != first.argmax(1)
        most = float(others.double().mean())
        if exceeds(int(others.sum()), len(near), _HARDLY):
            sentence = (
                f"Asked first, {int(others.sum())} of {len(near)} images near those evaluated get "
                f"another answer, {int(turned.sum())} another class: {_MEANING}."
            )
            return Finding(outcome="fail", figure=most, sentence=sentence)
    for share, turn in _TURNS.items():
        earlier, later = _nearer(subject, images.flip(turn), generator, share)
        if outnumbers(earlier, later, level=_LEVEL):
            sentence = (
                f"Of {len(images)} new images between two others, {earlier} are answered as the "
                f"one asked before, {later} as the one asked after: {_MEANING}."
            )
            return Finding(outcome="fail", figure=earlier / len(images), sentence=sentence)
    sentence = "Images get the same answers whatever the model was asked before."
    return Finding(outcome="pass", figure=most, sentence=sentence)


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
    count = len(new)
    asked = torch.cat([new + change, new, new - change])
    size = min(count, subject.batch_size)
    answers = subject.answer(asked, "memory", batch_size=size).double()
    before, between, after = torch.split(answers, count)
    gaps = [(between - other).abs().amax(dim=1) for other in (before, after)]
    return int((gaps[0] < gaps[1]).sum()), int((gaps[1] < gaps[0]).sum())


def _change(
    images: Tensor, threat: ThreatModel, generator: torch.Generator, share: float
) -> Tensor:
    """A random step for each image, of this share of the radius."""
    noise = torch.randn(images.shape, generator=generator).to(images)
    width = threat.bounds[1] - threat.bounds[0]
    if threat.norm == "l0":
        places = torch.rand(len(images), 1, *images.shape[2:], generator=generator).flatten(1)
        most = min(max(1, int(share * threat.eps)), places.shape[1])
        chosen = torch.zeros_like(places).scatter_(1, places.topk(most).indices, 1.0)
        return width * noise.sign() * chosen.view(-1, 1, *images.shape[2:]).to(images)
    if threat.norm == "linf":
        return noise.sign() * (share * threat.eps)
    order = 2 if threat.norm == "l2" else 1
    lengths: Tensor = torch.linalg.vector_norm(noise.flatten(1), order, dim=1)
    return noise / lengths.view(-1, 1, 1, 1) * (share * threat.eps)
