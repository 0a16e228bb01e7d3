"""Small networks, and snapshots of all that an attack may disturb."""

import copy
import random

import numpy as np
import torch
from numpy.random import mtrand  # the global state is what is under test here
from torch import nn


class Net(nn.Module):
    """A small CNN with everything that an attack could disturb."""

    def __init__(self, classes=4):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5))
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 64, classes)

    def forward(self, images):
        hidden = torch.relu_(self.norm(self.conv(images - self.mean)))
        return self.head(self.drop(hidden.flatten(1)))


class Answering(nn.Module):
    """A model that answers with a function of the images."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


def disturbed_net():
    """A net with mixed modes, a frozen layer, gradients on some parameters, and used buffers."""
    net = Net().train()
    net(torch.rand(8, 1, 8, 8)).sum().backward()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    net.head.bias.grad = None
    return net


def snapshot(net):
    """Everything the scope promises to restore, by identity and by value."""
    return {
        "modes": [module.training for module in net.modules()],
        "requires_grad": [each.requires_grad for each in net.parameters()],
        "grad objects": [id(each.grad) for each in net.parameters()],
        "grads": [copy.deepcopy(each.grad) for each in net.parameters()],
        "buffer objects": [id(each) for each in net.buffers()],
        "state": {key: value.clone() for key, value in net.state_dict().items()},
        "torch": torch.get_rng_state(),
        "numpy": mtrand.get_state(),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
    }


def assert_same(before, after):
    """Bit-identical snapshots."""
    for key in ("modes", "requires_grad", "grad objects", "buffer objects", "python", "dtype"):
        assert before[key] == after[key], key
    for one, other in zip(before["grads"], after["grads"], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key]), key
    assert torch.equal(before["torch"], after["torch"])
    for one, other in zip(before["numpy"], after["numpy"], strict=True):
        np.testing.assert_array_equal(one, other)


class Switched(nn.Module):
    """Something with hooks that can be switched, as Opacus' wrapper is."""

    def __init__(self, *, enabled):
        super().__init__()
        self.hooks_enabled = enabled

    def enable_hooks(self):
        self.hooks_enabled = True

    def disable_hooks(self):
        self.hooks_enabled = False
