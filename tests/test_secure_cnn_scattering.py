"""`secure_cnn.scattering`: its formulas, written out in pixels, and what they promise."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import privacy
from secure_cnn.data import DataSpec
from secure_cnn.models import build_model
from secure_cnn.scattering import Scattering, UnitNorm, scattering_features, scattering_layers

ANGLES = [(3 - number) * math.pi / 8 for number in range(8)]


def random_images(count, *shape, seed=0):
    """Images in [0, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, dtype=torch.float64, generator=generator)


def wave(shape, width, angle, slant, frequency):
    """Gaussian and plane wave at each pixel of a torus, its copies two periods around summed."""
    rows, columns = shape
    gauss, carried = np.zeros(shape), np.zeros(shape, complex)
    for down in range(-2 * rows, 3 * rows):
        for right in range(-2 * columns, 3 * columns):
            along = down * math.cos(angle) + right * math.sin(angle)
            across = right * math.cos(angle) - down * math.sin(angle)
            value = math.exp(-(along**2 + slant**2 * across**2) / (2 * width**2))
            if value > 1e-30:
                gauss[down % rows, right % columns] += value
                phase = complex(math.cos(frequency * along), math.sin(frequency * along))
                carried[down % rows, right % columns] += value * phase
    return gauss, carried


def lowpass(shape):
    """A Gaussian of 1.6 pixels whose sum is 1."""
    gauss, _ = wave(shape, 1.6, 0.0, 1.0, 0.0)
    return gauss / gauss.sum()


def morlet(shape, scale, angle):
    """The Morlet wavelet: of mean 0, with the area of its Gaussian for a norm."""
    width = 0.8 * 2**scale
    gauss, carried = wave(shape, width, angle, 0.5, 0.75 * math.pi / 2**scale)
    wavelet = carried - carried.sum() / gauss.sum() * gauss
    return wavelet * 0.5 / (2 * math.pi * width**2)


def convolved(signal, kernel):
    """Circular convolution, a sum over the kernel's values: no transform."""
    down, right = (np.subtract.outer(np.arange(side), np.arange(side)) for side in signal.shape)
    return np.tensordot(signal[down[:, None, :, None], right[None, :, None, :]], kernel, 2)


def halved(kernel):
    """The filter for a signal of which each second pixel is left."""
    return 4 * kernel[::2, ::2]


def written_out(image, *, halve=True):
    """Scattering of one channel; `halve`: coarse moduli at each second pixel, as it is made."""
    height, width = image.shape
    right, below = (4 * (-(-side // 4) + 1) - side for side in (width, height))
    image = np.pad(image, ((4, below), (4, right)), mode="reflect")
    low = lowpass(image.shape)
    coarse = [morlet(image.shape, 1, angle) for angle in ANGLES]

    def averaged(signal):
        small = signal.shape != low.shape
        found = convolved(signal, halved(low) if small else low).real
        step = 2 if small else 4
        return found[::step, ::step][1 : 1 - (-height // 4), 1 : 1 - (-width // 4)]

    def modulus(signal, kernel):
        found = abs(convolved(signal, kernel))
        return found[::2, ::2] if halve else found

    fine = [abs(convolved(image, morlet(image.shape, 0, angle))) for angle in ANGLES]
    maps = [image, *fine, *(modulus(image, kernel) for kernel in coarse)]
    maps += [modulus(first, kernel) for first in fine for kernel in coarse]
    return np.stack([averaged(each) for each in maps])


@pytest.mark.parametrize("shape", [(8, 8), (9, 14)])
def test_it_is_what_its_formulas_say(shape):
    """To rounding in float64; in float32 to 1e-6 of images in [0, 1]."""
    (images,) = random_images(1, 2, *shape)
    got = Scattering(*shape).double()
    got.reset()
    want = np.concatenate([written_out(each) for each in images.numpy()])[None]
    np.testing.assert_allclose(got(images[None]).numpy(), want, rtol=0, atol=1e-12)
    single = Scattering(*shape)(images[None].float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), want, rtol=0, atol=1e-6)


def test_halving_the_coarse_moduli_changes_next_to_nothing():
    """They hold next to no frequency that each second pixel could not carry."""
    image = random_images(1, 12, 12)[0].numpy()
    whole, halved_moduli = written_out(image, halve=False), written_out(image)
    assert np.abs(whole - halved_moduli).max() < 0.01 * np.abs(whole[1:]).max()


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (32, 32), (9, 70)])
def test_the_frame_bound_is_at_most_one(shape):
    """At no frequency of a real image do the filters together gain energy (Littlewood-Paley)."""
    made = Scattering(*shape).double()
    made.reset()
    waves = made.waves.square().sum((0, 1))
    mirrored = waves.roll((-1, -1), (0, 1)).flip(0, 1)
    total = made.low.square() + (waves + mirrored) / 2
    assert total.max() <= 1 + 1e-12
    assert total[0, 0] == pytest.approx(1)
    assert total.min() > 0.1


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_it_never_expands_a_difference(size):
    """Nearby images and others, and a checkerboard's difference, the highest of frequencies."""
    images = random_images(8, 1, 28, 28)
    others = images + size * (random_images(8, 1, 28, 28, seed=1) - 0.5)
    rows = torch.arange(28)
    others[0] = images[0] + size * (1 - 2 * ((rows[:, None] + rows) % 2))
    others[1] = images[1] + size
    made = Scattering(28, 28).double()
    moved = (made(images) - made(others)).flatten(1).norm(dim=1)
    assert (moved <= (images - others).flatten(1).norm(dim=1)).all()


def test_a_shift_by_its_step_moves_the_maps():
    """By one, exactly, away from the borders."""
    images = torch.zeros(2, 1, 40, 40, dtype=torch.float64)
    images[0, :, 15:24, 14:25] = random_images(1, 9, 11)
    images[1] = images[0].roll((4, 4), (1, 2))
    one, other = Scattering(40, 40).double()(images)
    torch.testing.assert_close(other[:, 3:9, 3:9], one[:, 2:8, 2:8], rtol=0, atol=1e-9)


def test_layers_give_rows_of_norm_one():
    """As many as are said, for every number of channels; a black image gives no NaN."""
    for shape in ((1, 8, 8), (3, 13, 10)):
        rows = nn.Sequential(*scattering_layers(*shape).values())(random_images(3, *shape).float())
        assert rows.shape == (3, scattering_features(*shape))
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert torch.equal(UnitNorm()(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_its_filters_outlive_an_emptied_model():
    """`build_model` empties and fills them; a state dict has the head alone."""
    model = build_model("scattering", DataSpec(shape=(1, 8, 8), classes=("a", "b")))
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert torch.equal(model.scattering.waves, Scattering(8, 8).waves)
    assert torch.equal(model.scattering.low, Scattering(8, 8).low)


def test_a_private_step_reaches_the_head_alone():
    """At noise that does not show: the mean of the examples' gradients, each of norm C."""
    data = random_images(6, 1, 8, 8).float()
    dataset = TensorDataset(data, torch.arange(6) % 3)
    model = build_model("scattering", DataSpec(shape=(1, 8, 8), classes=("a", "b", "c")))
    norm = 0.1
    gradients = []
    for image, label in dataset:
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        own = torch.cat([model.head.weight.grad.flatten(), model.head.bias.grad])
        assert norm < own.norm() <= 2
        gradients.append(own * norm / own.norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    plan = privacy.DPPlan(
        samples=6, batch_size=6, epochs=1, max_grad_norm=norm, noise_multiplier=1e-6, delta=0.1
    )
    private = privacy.attach(plan, model, optimizer, dataset)
    for images, labels in private.batches:
        private.step(F.cross_entropy(model(images), labels, reduction="none"))
    moved = torch.cat([weight.detach().flatten() for weight in model.parameters()]) - before
    torch.testing.assert_close(moved, -0.1 * torch.stack(gradients).mean(0), rtol=1e-3, atol=1e-6)
