"""Every attack there is, each with settings that make it cheap."""

import pytest
import torch
from torch import nn

from defenses import ThreatModel, attack, attack_names
from defenses.attacks.adaptive import custom_attack

EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0, "l0": 5}
CHEAP = {
    "steps": 3,
    "queries": 20,
    "nb_sample": 8,
    "max_batch_size": 4,
    "max_iterations": 3,
    "binary_search_steps": 2,
}


def shuffle(model, images, labels):
    """Somebody's own attack, as careless as any: it trains, re-seeds and keeps its gradients."""
    model.train()
    torch.manual_seed(0)
    wanted = images.requires_grad_()
    nn.functional.cross_entropy(model(wanted), labels).backward()
    return images + 0.1 * torch.rand_like(images) * (images.mean() - images)


def cases():
    """Every attack with its norm, untargeted and, where it can, targeted."""
    for norm in EPS:
        for name in attack_names(norm):
            for targeted in (
                (False, True) if name in attack_names(norm, targeted=True) else (False,)
            ):
                kind = "targeted" if targeted else "untargeted"
                yield pytest.param(norm, name, targeted, id=f"{norm}-{name}-{kind}")
    yield pytest.param("linf", "shuffle", False, id="linf-custom")


CASES = list(cases())
EVERY = pytest.mark.parametrize(("norm", "name", "targeted"), CASES)


def cheap(norm, name, *, bounds=(0.0, 1.0), eps=None):
    """The attack with as little work as its settings allow."""
    threat = ThreatModel(norm=norm, eps=eps or EPS[norm], bounds=bounds)
    if name == "shuffle":
        return custom_attack(shuffle, threat)
    known = attack(name, threat).settings
    return attack(name, threat, **{key: CHEAP[key] for key in CHEAP if key in known})


def batch(n=4, channels=1, side=8, seed=3):
    """Images with pixels on the bounds, labels, and targets that are others."""
    draw = torch.Generator().manual_seed(seed)
    images = (1.4 * torch.rand(n, channels, side, side, generator=draw) - 0.2).clamp(0, 1)
    labels = torch.arange(n) % 4
    return images, labels, (labels + 1 + torch.arange(n) // 2 % 2) % 4
