"""Networks whose adversarial images are known, to search."""

import functools

import torch
from torch import nn

from defenses import AdversarialTraining, ThreatModel
from secure_cnn import load_data

LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.5)


L1 = ThreatModel(norm="l1", eps=2.0)


@functools.cache
def digits():
    """A small network that withstands some of what eps = 0.1 allows, and 60 test images."""
    data = load_data("digits")
    draw = torch.Generator().manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    objective = AdversarialTraining(LINF)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        rows = torch.randint(len(data.train.labels), (64,), generator=draw)
        optimizer.zero_grad()
        objective(model, *data.train.batch(rows)).mean().backward()
        optimizer.step()
    images, labels = data.test.batch(torch.arange(60))
    return model.eval(), images, labels


def right(model, images, labels):
    """Whether the model is, [n]."""
    with torch.no_grad():
        return model(images).argmax(1) == labels


def linear(weight, bias=0.0):
    """Two logits, +-(w.x + b)/2: they meet in a plane, and the exact worst case is known."""
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([weight, -weight]) / 2)
        layer.bias.copy_(torch.tensor([bias, -bias]) / 2)
    return nn.Sequential(nn.Flatten(), layer)


class Counting(nn.Module):
    """Counts the images that pass, and remembers how they were laid out."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.strides = model, [], set()

    def forward(self, images):
        self.seen.append(len(images))
        self.strides.add(images.stride())
        return self.model(images)
