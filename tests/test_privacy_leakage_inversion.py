"""Images from gradients: exactly where that follows, else by a search, and not behind noise."""

import math

import pytest
import torch
from torch import nn

from privacy.errors import LeakageError
from privacy.leakage.inversion import (
    Inversion,
    input_of_linear,
    invert,
    labels_of,
    shared_gradient,
    similarity,
)

CLASSES = 4


def random_images(count, seed=0, size=8):
    """Smooth images in [0, 1], which differ."""
    drawn = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(drawn, size=(size, size), mode="bilinear")


def network(seed=0):
    """A small smooth network, as it is before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(12 * 64, CLASSES),
        )


class Grey(nn.Module):
    """Counts brightness from mid-grey."""

    def forward(self, images):
        return images - 0.5


def rank_of(found, original, candidates):
    """How many candidates are nearer to what was found than the original is."""
    apart = (candidates - found).flatten(1).norm(dim=1)
    return int((apart < (original - found).norm()).sum())


def test_a_fully_connected_network_gives_its_image_away_exactly():
    """Its label by a sign, its image by a quotient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    image = random_images(1)
    gradient = shared_gradient(model, image, torch.tensor([2]))
    assert labels_of(gradient["3.bias"], count=1).tolist() == [2]
    found = input_of_linear(gradient["1.weight"], gradient["1.bias"]).view_as(image)
    assert found == pytest.approx(image.numpy(), abs=1e-4)
    assert similarity(found[0], image[0])[0] > 80


@pytest.mark.parametrize("labels", [[0], [0, 3], [1, 1, 2], [3, 3, 3, 0]])
def test_labels_follow_from_the_last_bias(labels):
    """Of a network that is not yet sure of anything, repeated ones too."""
    gradient = shared_gradient(network(), random_images(len(labels)), torch.tensor(labels))
    assert labels_of(gradient["5.bias"], count=len(labels)).tolist() == sorted(labels)


def test_a_search_finds_the_image_among_others_and_not_behind_noise():
    """By the plain gradient; the control is the same one with noise of a private step in it."""
    model, image = network().eval(), random_images(1, seed=5)
    candidates = random_images(500, seed=6)
    labels = torch.tensor([1])
    gradient = shared_gradient(model, image, labels)
    search = Inversion(steps=120, restarts=1, total_variation=1e-4)
    weights = [each.clone() for each in model.parameters()]
    state = torch.random.get_rng_state()
    found = invert(model, gradient, shape=(1, 8, 8), labels=labels, inversion=search)
    assert rank_of(found.images[0], image[0], candidates) == 0
    assert found.objective < 1e-3
    assert similarity(found.images[0], image[0])[0] > 15
    assert all(
        torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    random = torch.Generator().manual_seed(0)
    length = math.sqrt(sum(float(each.square().sum()) for each in gradient.values()))
    noised = {
        name: each / length + torch.randn(each.shape, generator=random)
        for name, each in gradient.items()
    }
    lost = invert(model, noised, shape=(1, 8, 8), labels=labels, inversion=search)
    assert rank_of(lost.images[0], image[0], candidates) > 0
    assert lost.objective > found.objective


def test_contrast_is_raised_where_the_gradient_does_not_tell_it():
    """Behind a normalising layer it does not; without one it does, and is left as it was found."""
    dull = 0.5 + 0.2 * (random_images(1, seed=8) - 0.5)
    labels = torch.tensor([2])
    search = Inversion(steps=150, restarts=1, total_variation=1e-3)
    told = network().eval()
    hidden = nn.Sequential(Grey(), nn.Conv2d(1, 12, 3, padding=1, bias=False), *told[1:])
    hidden.insert(2, nn.GroupNorm(1, 12, eps=1e-12))
    spans = []
    for model in (told, hidden.eval()):
        gradient = shared_gradient(model, dull, labels)
        found = invert(model, gradient, shape=(1, 8, 8), labels=labels, inversion=search).images
        spans.append(float((found - 0.5).abs().max()))
    assert spans[0] < 0.4
    assert spans[1] == pytest.approx(0.5)


def test_the_best_start_is_kept_and_a_stop_ends_it():
    """By the objective of the search; more starts are never worse."""
    model, image = network().eval(), random_images(1, seed=7)
    gradient = shared_gradient(model, image, torch.tensor([0]))
    asked = {"shape": (1, 8, 8), "labels": torch.tensor([0])}
    one, three = (
        invert(model, gradient, **asked, inversion=Inversion(steps=10, restarts=each))
        for each in (1, 3)
    )
    assert three.objective <= one.objective
    calls = []
    invert(model, gradient, **asked, stop=lambda: calls.append(0) or len(calls) > 3)
    assert len(calls) < 10


def test_similarity_is_known_where_it_is_known():
    """An error of a tenth everywhere is 20 dB; another image is less alike."""
    image, other = random_images(2)
    ratio, alike = similarity(image * 0.8 + 0.1, image * 0.8)
    assert ratio == pytest.approx(20.0)
    assert similarity(image, other)[1] < alike < 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Inversion(steps=0), "steps: expected a whole number, at least 1"),
        (lambda: Inversion(rate=0.0), "rate: expected a finite number > 0"),
        (lambda: Inversion(total_variation=math.nan), "total_variation: expected a number >= 0"),
        (
            lambda: labels_of(torch.zeros(2, 2), count=1),
            "bias_gradient: expected a tensor of floats with 1 axes",
        ),
        (lambda: labels_of(torch.zeros(2), count=0), "count: expected a whole number, at least 1"),
        (lambda: input_of_linear(torch.zeros(2, 3), torch.zeros(3)), "a linear layer"),
        (lambda: input_of_linear(torch.zeros(2, 3), torch.zeros(2)), "a unit that was active"),
        (lambda: similarity(torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)), "two of one shape"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    """With what was expected."""
    with pytest.raises(LeakageError, match=words):
        call()


def test_a_gradient_of_another_model_is_refused():
    """By the parameter that does not fit; one of zeros too."""
    model = network()
    gradient = shared_gradient(model, random_images(1), torch.tensor([0]))
    asked = {"shape": (1, 8, 8), "labels": torch.tensor([0])}
    for other, words in (
        ({name: each for name, each in gradient.items() if name != "5.bias"}, "5.bias, got none"),
        (gradient | {"5.bias": torch.zeros(3)}, r"expected \[4\] for 5.bias, got \[3\]"),
        (gradient | {"6.bias": torch.zeros(3)}, "expected none for 6.bias"),
        ({name: torch.zeros_like(each) for name, each in gradient.items()}, "not 0 everywhere"),
    ):
        with pytest.raises(LeakageError, match=words):
            invert(model, other, **asked)
