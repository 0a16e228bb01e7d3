"""`secure_cnn.handcrafted`: its formulas written out, and that it is made of nobody's images."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import defenses
from secure_cnn import handcrafted as room
from secure_cnn.checkpoint import read_model, write_model
from secure_cnn.data import DataSpec
from secure_cnn.handcrafted import Handcrafted, handcrafted_features, noise_images
from secure_cnn.models import Architecture, build_model
from secure_cnn.recipe.front import FrozenFront

pytestmark = pytest.mark.usefixtures("few_noise_images")

SHAPE = (1, 12, 12)
SPEC = DataSpec(shape=SHAPE, classes=("a", "b", "c"))


def generator(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def drawn(shape=SHAPE, seed=0):
    """Features that were drawn."""
    features = Handcrafted(*shape)
    features.draw(generator(seed))
    return features


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 9), (2, 64, 70), (1, 130, 65)])
def test_images_of_any_size_become_rows_of_norm_10(shape):
    """Of as many features as are foretold; large images are averaged first, and also black ones."""
    features = drawn(shape)
    images = torch.cat([torch.rand(2, *shape, generator=generator(1)), torch.zeros(1, *shape)])
    rows = features(images)
    assert rows.shape == (3, handcrafted_features(*shape))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((3,), 10.0))


def test_a_draw_follows_from_the_generator_alone():
    """The same seed, the same bits; another, others; the global random state stays."""
    before = torch.get_rng_state()
    one, again, other = (drawn(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    room._drawn.cache_clear()
    anew = drawn(seed=3).state_dict()
    assert all(torch.equal(one[name], anew[name]) for name in one)


def test_what_was_drawn_is_not_changed_by_who_changes_a_model():
    """What is remembered of a draw belongs to no model."""
    first = drawn()
    want = first.patches.filters.clone()
    first.patches.filters.zero_()
    assert torch.equal(drawn().patches.filters, want)


def test_a_file_holds_what_was_drawn(tmp_path, monkeypatch):
    """Whoever reads it draws nothing, on whatever machine, and gets the same answers."""
    architecture = Architecture.for_data("handcrafted", SPEC)
    model = architecture.build(generator_seed=5).eval()
    write_model(tmp_path / "m.safetensors", model, architecture, claims={}, sealing=None)
    with monkeypatch.context() as patched:
        patched.setattr(room, "_drawn", None)
        read = read_model(tmp_path / "m.safetensors", unlocking=None).model
    images = torch.rand(4, *SHAPE, generator=generator(1))
    assert torch.equal(read(images), model(images))


def test_patches_by_their_formula():
    """One image, one filter and one place after the other, in float64."""
    features = drawn()
    image = torch.rand(SHAPE, generator=generator(2), dtype=torch.float64)
    filters = features.patches.filters.double().numpy()
    found = features.patches(image[None].float())[0].double()
    likeness = np.zeros((400, 8, 8))
    for row in range(8):
        for column in range(8):
            patch = image[0, row : row + 5, column : column + 5].numpy()
            centred = (patch - patch.mean()) / math.sqrt(patch.var() + 0.05**2)
            likeness[:, row, column] = (filters[:, 0] * centred).sum((1, 2))
    above = np.maximum(0, likeness - 0.8)
    # Eight positions to four places, so two by two.
    amount = above.reshape(400, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(found, np.sqrt(amount + 1e-4), atol=2e-4)


def test_patches_do_not_see_brightness_and_hardly_contrast():
    """Every filter's values add up to nothing, and likeness is by deviation, well above 0.05."""
    features = drawn((3, 12, 12))
    images = torch.rand(3, 3, 12, 12, generator=generator(2)) / 2
    amounts = features.patches(images).square()
    torch.testing.assert_close(features.patches(images + 0.5).square(), amounts, atol=1e-4, rtol=0)
    weaker = features.patches(0.7 * images).square()
    assert (weaker - amounts).abs().mean() < 0.1 * amounts.mean()
    assert (features.patches(images.flip(3)).square() - amounts).abs().mean() > 0.5 * amounts.mean()


def test_whitening_by_one_large_matrix():
    """Among maps and among places is the Kronecker product; powers by singular values here."""
    maps = torch.rand(200, 5, 2, 3, generator=generator(), dtype=torch.float64)
    maps = maps * torch.arange(1, 6).view(1, 5, 1, 1)
    whitening = room._Whitening(5, 6)
    whitening.fit(maps.float())
    rows = F.normalize(maps.flatten(1)).numpy()
    mean = rows.mean(0)
    centred = (rows - mean).reshape(200, 5, 6)

    def power(values):
        left, singular, _ = np.linalg.svd(values, full_matrices=False)
        variances = singular**2 / 200
        return left @ np.diag((variances + 0.1 * variances.mean()) ** -room._FLATTENING) @ left.T

    among_maps = power(centred.transpose(1, 0, 2).reshape(5, -1))
    among_places = power(centred.transpose(2, 0, 1).reshape(6, -1))
    white = (rows - mean) @ np.kron(among_maps, among_places).T
    want = white / np.linalg.norm(white, axis=1, keepdims=True)
    np.testing.assert_allclose(whitening(maps.float()).numpy(), want, atol=1e-5)


def test_features_vary_more_alike_than_before():
    """On noise that it was not fitted to: of the variance less is in the largest directions."""

    def spread(rows):
        variances = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
        return float((variances.sum() ** 2) / (variances**2).sum())

    features = drawn()
    images = noise_images(400, *SHAPE, generator(9))
    with torch.no_grad():
        before = F.normalize(features.waves(images).flatten(1))
        after = features.wave_whitening(features.waves(images))
    assert spread(after) > 2 * spread(before)


def test_noise_images_are_images_and_half_of_them_lie_on_black():
    """Values in [0, 1]; in every other one the corners are black; colours differ."""
    images = noise_images(200, 3, 16, 16, generator())
    assert 0 <= images.min() < images.max() <= 1
    black = (images == 0).float().mean((1, 2, 3))
    assert black[0::2].mean() > black[1::2].mean() + 0.1
    corners = (images[0::2, :, 0, 0] == 0).float().mean()
    middle = (images[0::2, :, 8, 8] == 0).float().mean()
    assert corners > middle + 0.3
    assert (images[:, 0] != images[:, 1]).any()
    grey = noise_images(3, 1, 16, 16, generator())
    assert grey.shape == (3, 1, 16, 16)


def test_rows_do_not_depend_on_the_batch_and_are_cached_as_a_front(shapes):
    """So a private step can bound each example, and a run computes features once."""
    from secure_cnn.data import load_data

    data = load_data(shapes)
    model = build_model("handcrafted", data.spec)
    front = FrozenFront.of(model, data, seed=0, device=torch.device("cpu"))
    assert front is not None
    assert [name for name, _ in front.layers.named_children()] == ["normalize", "features"]
    images = torch.rand(20, *data.spec.shape, generator=generator(1))
    torch.testing.assert_close(model(images)[3:5], model(images[3:5]), atol=1e-5, rtol=1e-5)


def test_it_can_be_attacked():
    """Gradients reach the pixels, also of a black image, where roots have steep slopes."""
    model = build_model("handcrafted", SPEC).eval()
    images = torch.cat([torch.zeros(2, *SHAPE), torch.rand(6, *SHAPE, generator=generator(1))])
    labels = model(images).argmax(1)
    threat = defenses.ThreatModel(norm="linf", eps=0.2)
    attacked = defenses.attack("pgd", threat, steps=10)(model, images, labels)
    assert attacked.isfinite().all()
    assert (model(attacked).argmax(1) != labels).any()
