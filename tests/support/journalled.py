"""An evaluation short enough to be interrupted at every point."""

import torch

from defenses import ThreatModel, attack, evaluate
from defenses.checks.checks import CheckSettings
from support.evaluated import tensors
from support.networks import Net

GENTLE = ThreatModel(norm="linf", eps=0.03)
FEW = CheckSettings(samples=12, steps=2, queries=5, draws=2, planted=2, spot=1)


def subject(n=45):
    """A net with random weights, and images that it gets right."""
    torch.manual_seed(0)
    net, data = Net().eval(), tensors(n)
    with torch.no_grad():
        data.labels = net(data.images.float() / 255).argmax(1)
    data.labels[::9] = (data.labels[::9] + 1) % 4
    return net, data


def run(model, data, *, state=None, **changes):
    """A small evaluation with two attacks and the verdicts."""
    settings = {
        "attacks": [attack("fgsm", GENTLE), attack("pgd", GENTLE, steps=3)],
        "batch_size": 8,
        "verdicts": FEW,
        "progress": False,
    }
    return evaluate(model, data, GENTLE, state=state, **settings | changes)
