"""Checks of the model itself: are its answers and its gradients such that an attack can work?

One of them plants a vulnerability that the attack must find: the binarisation test of Zimmermann et
al. (2022, arXiv 2206.13991). For one image at a time the last layer is replaced by a linear readout
of two classes on the model's own features, which says "planted" at a point on the edge of the ball,
and "clean" at the image and at random points inside. Simplified: one planted point and a readout
along the line from the mean of the clean features, `_DEPTH` of the way, where the paper fits one.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.checks.subject import Subject
from defenses.errors import AttackError, EvaluationError
from defenses.measuring.counting import exceeds, wilson_interval
from defenses.measuring.verdict import Finding
from defenses.scope import attack_scope
from defenses.shape import beside
from defenses.threat import ThreatModel

__all__ = [
    "Planting",
    "Readout",
    "gradients_are_not_zero",
    "outputs_are_logits",
    "plant",
    "planted_is_found",
    "random_points",
]

_WITHOUT_GRADIENT = 0.01  # of the images: what should be none
_FOUND_AT_LEAST = 0.9  # of what was planted; an attack may miss some that lie in a corner
_INNER_POINTS, _INNER_RADIUS = 64, 0.5  # how many are called clean, and at which share of eps
_DEPTH = 0.9


def outputs_are_logits(subject: Subject) -> Finding:
    """Fails where the answers cannot be used: probabilities, NaN, too few classes, no tensor."""
    try:
        logits = subject.logits
    except EvaluationError as error:
        return Finding(outcome="fail", sentence=f"{error}.")
    low, high = (float(value) for value in torch.aminmax(logits))
    found = f"They are finite, between {low:.3g} and {high:.3g}, and no probabilities"
    return Finding.passed(found, high - low)


def gradients_are_not_zero(subject: Subject) -> Finding:
    """Fails where the loss of too many images has no slope at all, or none that is finite."""
    try:
        gradients = subject.input_gradients().flatten(1)
    except AttackError as error:
        return Finding.failed("There is no slope", str(error), 1.0)
    usable = torch.isfinite(gradients).all(dim=1) & (gradients != 0).any(dim=1)
    count, zero = len(usable), int((~usable).sum())
    found = f"{zero} of {count} images have a gradient that is zero or not finite"
    if exceeds(zero, count, _WITHOUT_GRADIENT):
        meaning = "what follows the gradient cannot find what is there"
        return Finding.failed(found, meaning, zero / count)
    return Finding.passed(found, zero / count)


def planted_is_found(subject: Subject) -> Finding:
    """Fails where the iterative attack misses what was planted for it."""
    if subject.threat.norm == "l0":
        return Finding.not_checked("Only for linf, l2 and l1")
    search = subject.iterative(subject.threat, subject.settings.steps)
    chosen = subject.images[subject.right][: subject.settings.planted]
    if len(chosen) == 0:
        return Finding.not_checked("No image is classified correctly")
    made = plant(subject.model, chosen, subject.threat, search, seed=subject.seed)
    if made.planted == 0:
        return Finding.not_checked("The features do not tell a planted point from the clean ones")
    share = made.found / made.planted
    found = f"{search.name} finds {made.found} of {made.planted} planted vulnerabilities"
    if wilson_interval(made.found, made.planted)[1] < _FOUND_AT_LEAST:
        return Finding.failed(found, "it misses what is certainly there", share)
    return Finding.passed(found, share)


@final
@dataclass(frozen=True, kw_only=True)
class Planting:
    """What became of the planted vulnerabilities."""

    planted: int  # how many could be: the features told the two sides apart
    found: int  # how many of these the attack found


def plant(
    model: nn.Module, images: Tensor, threat: ThreatModel, search: Attack, *, seed: int
) -> Planting:
    """Plants a vulnerability in the ball (linf, l2, l1) of each image, and lets the attack look."""
    generator = torch.Generator().manual_seed(seed)
    planted = found = 0
    with attack_scope(model, seed=seed):
        readout = Readout(model, images[:1])
        label = torch.zeros(1, dtype=torch.int64, device=images.device)
        for image in images:
            edge = random_points(image[None], threat, generator)
            many = image.expand(_INNER_POINTS, *image.shape)
            inner = random_points(many, threat, generator, share=_INNER_RADIUS)
            if not readout.separate(torch.cat([image[None], inner]), edge):
                continue
            planted += 1
            adversarial = search(readout, image[None], label, seed=seed)
            with torch.no_grad():
                found += int(readout(adversarial).argmax(dim=1))
    return Planting(planted=planted, found=found)


class Readout(nn.Module):
    """A model with a readout of two classes in the place of its last linear layer."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self._model = model
        self._layer = _last_linear(model, example)
        self._direction = torch.empty(0)
        self._threshold = torch.empty(0)

    def separate(self, clean: Tensor, planted: Tensor) -> bool:
        """Sets the readout between the two; False where the features do not tell them apart."""
        with torch.no_grad():
            inner, outer = self._features(clean), self._features(planted)
            direction = (outer - inner.mean(dim=0)).flatten()
            length = direction.square().sum()
            highest, there = (inner @ direction).max(), (outer @ direction).squeeze()
            if not bool(torch.isfinite(length)) or not bool(there > highest):
                return False
            # A difference of one between the two sides, whatever the scale of the features.
            self._direction = direction / (there - highest)
            self._threshold = (highest + _DEPTH * (there - highest)) / (there - highest)
        return True

    def forward(self, images: Tensor) -> Tensor:
        """Two logits: how far below and above the threshold, [n, 2]."""
        above = self._features(images) @ self._direction - self._threshold
        return torch.stack([-above, above], dim=1)

    def _features(self, images: Tensor) -> Tensor:
        """What the last linear layer is given, or the logits where there is none, [n, d]."""
        if self._layer is None:
            answer: Tensor = self._model(images)
            return answer.flatten(1)
        caught: list[Tensor] = []
        hook = self._layer.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        try:
            self._model(images)
        finally:
            hook.remove()
        if not caught or len(caught[-1]) != len(images):
            raise AttackError(
                "model: its last linear layer is not asked about each image each time, so that it "
                "has no features to plant in"
            )
        return caught[-1].flatten(1)


def _last_linear(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The linear layer that runs last, if its input has one row for each image."""
    ran: list[nn.Module] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, given: ran.append(layer) if len(given[0]) == len(example) else None
        )
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran else None


def random_points(
    images: Tensor, threat: ThreatModel, generator: torch.Generator, *, share: float = 1.0
) -> Tensor:
    """A point for each image [n, ...], at `share` of the radius in [0, 1], clipped to the bounds.

    linf: a random corner of the cube; l2: a random direction; l1: uniform on the surface of the
    cross-polytope.
    """
    noise = torch.randn(images.shape, generator=generator).to(images)
    if threat.norm == "linf":
        change = threat.eps * noise.sign()
    else:
        order = {"l2": 2, "l1": 1}[threat.norm]
        if order == 1:  # of Laplace's distribution, whose direction is uniform in l1
            size = torch.empty(images.shape).exponential_(generator=generator).to(images)
            noise = size * noise.sign()
        lengths = beside(noise.flatten(1).norm(p=order, dim=1), noise)
        change = threat.eps * noise / lengths
    return (images + share * change).clamp(*threat.bounds)
