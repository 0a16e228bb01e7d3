"""Answers from several views: the same as each view asked by hand."""

import pytest
import torch
from torch import nn

from secure_cnn.errors import ModelError
from secure_cnn.views import Views


class Counting(nn.Module):
    """A linear model that counts how often it is asked."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
        self.weight, self.asked = nn.Parameter(weight), 0

    def forward(self, images):
        self.asked += 1
        return images.flatten(1) @ self.weight.T


def moved(image, rows, columns):
    """An image moved down and to the right by so many pixels, pixel by pixel."""
    found = torch.zeros_like(image)
    for i in range(6):
        for j in range(6):
            if 0 <= i - rows < 6 and 0 <= j - columns < 6:
                found[:, i, j] = image[:, i - rows, j - columns]
    return found


IMAGES = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_mirror_images_count_as_much_as_images():
    """And each is asked once."""
    model = Counting()
    found = Views(model, mirror=True)(IMAGES)
    assert model.asked == 2
    expected = (model(IMAGES) + model(IMAGES.flip(3))) / 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_moved_images_have_half_of_the_weight():
    """To the upper left and to the lower right, and nothing comes in."""
    model = Counting()
    found = Views(model, mirror=False, shift=2)(IMAGES)
    by_hand = [
        sum(
            weight * model(moved(image, by, by)[None])[0]
            for by, weight in ((0, 0.5), (-2, 0.25), (2, 0.25))
        )
        for image in IMAGES
    ]
    assert torch.allclose(found, torch.stack(by_hand), atol=1e-5)


def test_no_view_but_the_image_is_the_model_itself():
    """Control."""
    model = Counting()
    assert torch.equal(Views(model, mirror=False)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("shift", [-1, 6])
def test_a_shift_out_of_range_is_refused(shift):
    """When it is made, or with the first images that are too small for it."""
    with pytest.raises(ModelError, match="shift: expected"):
        Views(Counting(), mirror=False, shift=shift)(IMAGES)
