"""A planted vulnerability: an attack that misses what we put there ourselves would miss others.

The binarisation test of Zimmermann et al. (2022, arXiv 2206.13991), simplified. For one image at a
time the last layer is replaced by a linear readout of two classes on the model's own features.
It says "planted" at a point on the edge of the ball, and "clean" at the image and at random points
inside the ball; so an adversarial image exists, and the attack must find one.

Simplified: one planted point and a closed-form readout (along the line between the features of the
planted point and the mean of the clean ones) where the paper plants several and fits one; the
threshold lies `_DEPTH` of the way from the clean ones to the planted one.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.errors import AttackError
from defenses.scope import attack_scope
from defenses.threat import ThreatModel

__all__ = ["Planting", "Readout", "plant", "random_points"]

_INNER_POINTS = 64
_INNER_RADIUS = 0.5
_DEPTH = 0.9


@final
@dataclass(frozen=True, kw_only=True)
class Planting:
    """What became of the planted vulnerabilities.

    Attributes:
        planted: How many could be planted: the features told the two sides apart.
        found: How many of them the attack found.
    """

    planted: int
    found: int


def plant(
    model: nn.Module, images: Tensor, threat: ThreatModel, search: Attack, *, seed: int
) -> Planting:
    """Plants a vulnerability in each image's ball, and lets the attack look for it.

    Args:
        images: Clean images, [n, channels, height, width].
        threat: The ball, linf, l2 or l1.

    Raises:
        AttackError: The attack cannot work on this model.
    """
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
    """A random point for each image, at `share` of the radius, clipped to the bounds.

    Args:
        images: In the bounds, [n, ...].
        threat: linf (a random corner of the cube), l2 (a random direction) or l1 (uniform on the
            surface of the cross-polytope).
        share: Of the radius, in [0, 1].

    Returns:
        Images in the ball, [n, ...].
    """
    noise = torch.randn(images.shape, generator=generator).to(images)
    if threat.norm == "linf":
        change = threat.eps * noise.sign()
    else:
        order = {"l2": 2, "l1": 1}[threat.norm]
        if order == 1:  # of Laplace's distribution, whose direction is uniform in l1
            size = torch.empty(images.shape).exponential_(generator=generator).to(images)
            noise = size * noise.sign()
        lengths = noise.flatten(1).norm(p=order, dim=1).view(-1, *[1] * (noise.ndim - 1))
        change = threat.eps * noise / lengths
    return (images + share * change).clamp(*threat.bounds)
