"""Models that are suspect in one way each, and what the checks should say of them."""

from types import SimpleNamespace

import torch
from torch import nn

from defenses import ThreatModel

LINF = ThreatModel(norm="linf", eps=0.05)
LOGITS = "the outputs are logits"
SAME = "the model is deterministic"
COMPANY = "the rest of the batch changes nothing"
UNWATCHED = "asking for gradients changes nothing"
MEMORY = "what was asked before changes nothing"
GRADIENT = "gradients are not zero"
PLANTED = "a planted vulnerability is found"
ITERATIVE = "iterative beats single-step"
FAIR = "a single step is a fair guide"
TWICE = "twice the steps change little"
FALLS = "accuracy falls to zero as eps grows"
NOISE = "random noise is weaker"
BLACK_BOX = "black-box does not beat white-box"
TRANSFER = "transfer does not beat white-box"
RESCALED = "rescaled logits change nothing"
STANDARD = "the standard finds little more"
ALL = (
    *(LOGITS, SAME, COMPANY, UNWATCHED, MEMORY, GRADIENT, PLANTED, ITERATIVE, FAIR),
    *(TWICE, FALLS, NOISE, BLACK_BOX, TRANSFER, RESCALED, STANDARD),
)


class Honest(nn.Module):
    """Two convolutions and a linear layer with random weights, or a linear layer alone."""

    def __init__(self, seed=0, *, linear=False):
        super().__init__()
        torch.manual_seed(seed)
        hidden = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        self.body = nn.Sequential(*([] if linear else hidden), nn.Flatten())
        self.head = nn.Linear(64 if linear else 32, 4)
        with torch.no_grad():  # every class is seen in random images
            self.head.bias -= self(torch.rand(500, 1, 8, 8)).mean(0) / 30

    def forward(self, images):
        # Random images differ little to a random net; scaled, its classes are spread.
        return 30 * self.head(self.body(images - 0.5))


class Wrapped(nn.Module):
    """An honest net behind something."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = Honest(), before, after

    def forward(self, images):
        images = self.before(images) if self.before else images
        logits = self.net(images)
        return self.after(logits) if self.after else logits


def data_for(model, n=150, seed=0):
    """Random images, labelled as the model does."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    return SimpleNamespace(images=images, labels=labels)
