"""Identity filters pass their inputs on; whitening filters make patches uncorrelated."""

import numpy as np
import pytest
import torch
from torch import nn

from secure_cnn.data import DataSpec
from secure_cnn.errors import ModelError
from secure_cnn.initialization import start_as_identity, whiten_first_layer
from secure_cnn.models import MODELS, build_model

SPEC = DataSpec(shape=(1, 16, 16), classes=("a", "b"))


def smooth(count=60, channels=1, seed=0):
    """Images whose neighbouring pixels agree, as those of photographs do."""
    noise = torch.rand(count, channels, 24, 24, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, stride=1)[..., :16, :16].contiguous()


@pytest.mark.parametrize("name", sorted({*MODELS} - {"scattering", "nonexpansive", "handcrafted"}))
def test_filters_of_ours_begin_as_the_identity_where_they_can(name):
    """All convolutions but the first, whatever the network."""
    model = build_model(name, SPEC)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    first = convolutions[0].weight.detach().clone()
    assert start_as_identity(model) == len(convolutions) - 1
    assert torch.equal(convolutions[0].weight, first)
    for layer in convolutions[1:]:
        both = min(layer.weight.shape[:2])
        images = torch.rand(2, layer.in_channels, 6, 6)
        out = nn.functional.conv2d(images, layer.weight[:both], padding=layer.kernel_size[0] // 2)
        assert torch.equal(out, images[:, :both])


def test_a_network_without_filters_has_none_to_begin():
    """Its features are those of formulas."""
    assert start_as_identity(build_model("scattering", SPEC)) == 0


def test_behind_fixed_filters_nothing_is_whitened():
    """The layer behind them is no first layer, and stays as it was drawn."""
    model = build_model("quick", SPEC)
    before = model.conv2.weight.detach().clone()
    assert whiten_first_layer(model, smooth(20), torch.Generator().manual_seed(0)) == 0
    assert torch.equal(model.conv2.weight, before)
    assert model.conv2.weight.requires_grad


def test_the_other_filters_stay_as_they_were_drawn():
    """And so do layers that cannot pass their inputs on."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, groups=2)
    )
    before = [layer.weight.detach().clone() for layer in model]
    assert start_as_identity(model) == 1
    assert torch.equal(model[1].weight[2:], before[1][2:])
    assert torch.equal(model[2].weight, before[2])
    assert torch.equal(model[3].weight, before[3])


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_are_uncorrelated_and_of_one_size(channels):
    """An oracle of loops in NumPy: second moments of the answers are a unit matrix."""
    model = nn.Sequential(nn.Conv2d(channels, 12, 2, bias=False), nn.ReLU())
    images = 200 * smooth(20, channels)  # so large that the floor of the variance is nothing
    count = whiten_first_layer(model, images, torch.Generator().manual_seed(0))
    assert count == (8 if channels == 1 else 12)
    weight = model[0].weight.detach().double().numpy()
    half = count // 2
    patches = [
        images[n, :, i : i + 2, j : j + 2].double().numpy().ravel()
        for n in range(len(images))
        for i in range(15)
        for j in range(15)
    ]
    answers = np.array(patches) @ weight[:half].reshape(half, -1).T
    moments = answers.T @ answers / len(answers)
    assert np.allclose(moments, np.eye(half), atol=0.02)
    raw = np.array(patches).T @ np.array(patches) / len(patches)
    assert abs(raw[0, 1] / raw[0, 0]) > 0.5  # control: they were far from it
    assert np.array_equal(weight[half:count], -weight[:half])


def test_the_layer_is_frozen_and_sees_what_stands_before_it():
    """Ours map [0, 1] to [-2, 2] first: whitening is of that, in a network of any mode."""
    model = build_model("compact", SPEC)
    modes = [module.training for module in model.modules()]
    assert whiten_first_layer(model, smooth(), torch.Generator().manual_seed(0)) == 16
    assert [module.training for module in model.modules()] == modes
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["conv1.weight"]
    seen: list[torch.Tensor] = []
    model.conv1.register_forward_hook(lambda _, __, out: seen.append(out[:, :8, 1:-1, 1:-1]))
    model(smooth())
    answers = seen[0].transpose(0, 1).flatten(1).double()
    # The largest direction is the brightness, whose variance is far above the floor.
    assert float((answers[0] ** 2).mean()) == pytest.approx(1.0, abs=0.05)


def test_patches_are_drawn_by_the_generator_alone():
    """The global random state is not moved."""
    before = torch.get_rng_state()
    models = [build_model("compact", SPEC, generator_seed=1) for _ in range(2)]
    for model in models:
        whiten_first_layer(model, smooth(), torch.Generator().manual_seed(5))
    assert torch.equal(models[0].conv1.weight, models[1].conv1.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_a_fitting_convolution_is_refused():
    """In our own words."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="expected a convolution to whiten"):
        whiten_first_layer(nn.Sequential(nn.Flatten()), smooth(), generator)
    grouped = nn.Sequential(nn.Conv2d(3, 6, 2, groups=3))
    with pytest.raises(ModelError, match="over all channels"):
        whiten_first_layer(grouped, smooth(channels=3), generator)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 3)

        def forward(self, images):
            return images

    with pytest.raises(ModelError, match="to be used"):
        whiten_first_layer(Unused(), smooth(), generator)
