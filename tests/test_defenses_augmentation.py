"""Training on Gaussian noise: losses of each example's own noise, and what a certificate gains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses.errors import AttackError
from defenses.smoothing.certification import certify
from defenses.smoothing.smoothing import Smoothing
from defenses.training.objective import GaussianAugmentation
from secure_cnn import build_model, load_data


def batch(n=6):
    """Images and labels of four classes."""
    draw = torch.Generator().manual_seed(4)
    return torch.rand(n, 1, 8, 8, generator=draw), torch.arange(n) % 4


def linear(seed=0):
    """A linear model of four classes."""
    layer = nn.Linear(64, 4)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        layer.weight.copy_(torch.randn(4, 64, generator=draw))
    return nn.Sequential(nn.Flatten(), layer)


def test_losses_are_cross_entropy_on_noisy_images():
    """With the noise that the generator's seed gives, and smoothed labels."""
    model, (images, labels) = linear(), batch()
    objective = GaussianAugmentation(sigma=0.3, seed=9, label_smoothing=0.1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    logits = model(images + 0.3 * noise)
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(objective(model, images, labels), expected)
    assert objective.per_example
    assert objective(model, images[:0], labels[:0]).shape == (0,)


def test_each_loss_depends_on_its_own_example_only():
    """Another neighbour, with the same generator, changes no other loss by one bit."""
    model, (images, labels) = linear(), batch()
    one = GaussianAugmentation(sigma=0.3, seed=1)(model, images, labels)
    images[2], labels[2] = 0.5, 3
    other = GaussianAugmentation(sigma=0.3, seed=1)(model, images, labels)
    assert (one != other).nonzero().flatten().tolist() == [2]


def test_noise_is_its_own_and_goes_on_where_it_was():
    """The global state does not move; a restored objective draws what the first would have."""
    model, (images, labels) = linear(), batch()
    objective, before = GaussianAugmentation(sigma=0.3), torch.get_rng_state()
    first = objective(model, images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    restored = GaussianAugmentation(sigma=0.3, seed=5)
    restored.load_state_dict(objective.state_dict())
    second = objective(model, images, labels)
    assert torch.equal(restored(model, images, labels), second)
    assert not torch.equal(first, second)
    for wrong in ({}, {"generator": 3}, {"generator": torch.zeros(3)}):
        with pytest.raises(AttackError, match="GaussianAugmentation"):
            objective.load_state_dict(wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma", 0.0), ("sigma", float("nan")), ("seed", -1), ("label_smoothing", 1.0)],
)
def test_a_value_out_of_range_is_refused(name, value):
    """When it is made."""
    with pytest.raises(AttackError, match=name):
        GaussianAugmentation(**{"sigma": 0.5, name: value})


def trained(objective, data, steps=800):
    """A small network after a few passes with this objective."""
    model = build_model("compact", data.spec).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(data.train), (64,), generator=draw)
        optimizer.zero_grad()
        objective(model, *data.train.batch(index)).mean().backward()
        optimizer.step()
    return model


def test_a_certificate_needs_training_on_noise():
    """Trained on noise, twice as many digits are certified to 0.25 as without."""
    data, smoothing = load_data("digits"), Smoothing(sigma=0.5, samples=500)

    def plain(model, images, labels):
        return F.cross_entropy(model(images), labels, reduction="none")

    certified = [
        certify(trained(objective, data), data.test, smoothing, images=100, progress=False)
        .certified(0.25)
        .accuracy
        for objective in (plain, GaussianAugmentation(sigma=0.5))
    ]
    assert certified[1] > 0.5
    assert certified[1] > 2 * certified[0]
