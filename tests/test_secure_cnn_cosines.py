"""`secure_cnn.cosines`: the filters are those of the discrete cosine transform, in both signs."""

import numpy as np
import pytest
import torch
from scipy.fft import idctn
from scipy.signal import correlate2d

from secure_cnn.cosines import Cosines
from secure_cnn.data import DataSpec
from secure_cnn.models import build_model


def oracle(down, right):
    """The inverse transform of one coefficient, as large as its frequency wants it."""
    coefficients = np.zeros((3, 3))
    coefficients[down, right] = 1.0
    return (0.5 + np.hypot(down, right)) * idctn(coefficients, norm="ortho")


LOWEST = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1)]


def test_filters_are_the_lowest_cosines_and_their_negatives():
    """All but the finest, in the order of their frequencies."""
    filters = Cosines(1).filters.numpy()
    want = np.stack([oracle(*each) for each in LOWEST])[:, None]
    np.testing.assert_allclose(filters, np.concatenate([want, -want]), atol=1e-6)


def test_each_channel_is_filtered_by_itself():
    """As SciPy correlates it, with zeros around the image; sixteen maps for each."""
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    maps = Cosines(3)(images)
    assert maps.shape == (2, 48, 9, 7)
    for channel, (number, each) in ((c, n) for c in range(3) for n in enumerate(LOWEST)):
        want = correlate2d(images[1, channel].numpy(), oracle(*each), mode="same")
        np.testing.assert_allclose(maps[1, 16 * channel + number], want, atol=1e-5)
        np.testing.assert_allclose(maps[1, 16 * channel + 8 + number], -want, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_quick_network_begins_with_them_and_trains_what_follows(channels):
    """Its file has nothing of them, and no gradient goes that far."""
    spec = DataSpec(shape=(channels, 16, 16), classes=("a", "b"))
    model = build_model("quick", spec)
    assert torch.equal(model.conv1.filters, Cosines(channels).filters)
    assert model.conv2.in_channels == 16 * channels
    assert not any(name.startswith("conv1") for name in model.state_dict())
    assert [name for name, _ in model.named_children()][:4] == [
        *("normalize", "conv1", "pool1", "relu1")
    ]
    assert model[:4](torch.rand(1, *spec.shape)).grad_fn is None
