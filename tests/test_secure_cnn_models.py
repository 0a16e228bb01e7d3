"""`secure_cnn.models`: each fits its images, mixes no examples, and follows its seed."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secure_cnn.data import DataSpec, ShuffledBatches, load_data
from secure_cnn.errors import ModelError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.layers import Bands
from secure_cnn.models import MODELS, Architecture, build_model, load_weights

pytestmark = pytest.mark.usefixtures("few_noise_images")


def spec(channels=3, height=8, width=8, classes=3):
    """A spec of images of this shape."""
    names = tuple(f"class {number}" for number in range(classes))
    return DataSpec(shape=(channels, height, width), classes=names)


def random_images(count, shape, seed=0):
    """Images in [0, 1]."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 65, 40), (2, 9, 70)])
def test_logits_for_every_size(name, shape):
    """Finite logits of the right shape, and a gradient for every weight."""
    data = spec(*shape)
    model = build_model(name, data)
    logits = model(random_images(2, shape))
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    assert sum(weight.grad.abs().sum() > 0 for weight in model.parameters()) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_no_example_depends_on_another(name):
    """In training mode a logit's gradient reaches no other example's pixels."""
    model = build_model(name, spec())
    images = random_images(3, (3, 8, 8)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[1].square().sum(), images)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_seed_alone(name):
    """Same seed, same bits; another seed, others; the global random state is untouched."""
    before = torch.get_rng_state()
    one, again = (build_model(name, spec(), generator_seed=7).state_dict() for _ in range(2))
    other = build_model(name, spec(), generator_seed=8).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    drawn = {"handcrafted": "features.patches.filters"}
    drawn |= dict.fromkeys(("scattering", "nonexpansive"), "head.weight")
    first = drawn.get(name, "conv2.weight" if name == "quick" else "conv1.weight")
    assert not torch.equal(one[first], other[first])


@pytest.mark.parametrize("name", MODELS)
def test_only_known_layers_with_group_norm(name):
    """No batch statistics, no dropout, no buffer that could carry a statistic of the data.

    Filters of `scattering` and `quick` are buffers that no file carries: formulas give them. What
    `handcrafted` has drawn from a seed its files carry.
    """
    model = build_model(name, spec())
    kinds = {type(module) for module in model.modules() if list(module.parameters(recurse=False))}
    waves = {"handcrafted": "features.waves.0."}.get(name)
    waves = "scattering." if name in ("scattering", "nonexpansive") else waves
    fixed = {f"{waves}low", f"{waves}waves"} if waves else set()
    fixed |= {"conv1.filters"} if name == "quick" else set()
    drawn = {key for key in model.state_dict() if key.startswith("features.")}
    assert kinds == ({nn.Linear} if waves else {nn.Conv2d, nn.GroupNorm, nn.Linear})
    assert {key for key, _ in model.named_parameters()} == set(model.state_dict()) - drawn
    assert {key for key, _ in model.named_buffers()} - drawn == fixed
    assert bool(drawn) == (name == "handcrafted")
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_changes_only_the_layout(name):
    """The same logits up to rounding."""
    model = build_model(name, spec(height=16, width=16))
    images = random_images(2, (3, 16, 16))
    want = model(images)
    model = model.to(memory_format=torch.channels_last)
    got = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_input_normalisation_is_fixed():
    """0 becomes -2 and 1 becomes 2, whatever the data."""
    normalize = build_model("compact", spec()).normalize
    assert (normalize(torch.zeros(1, 3, 8, 8)) == -2).all()
    assert (normalize(torch.ones(1, 3, 8, 8)) == 2).all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 9, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_of_another_form_are_refused(images):
    """Other channels, sizes, ranks and dtypes are named, not left to a convolution."""
    with pytest.raises(ModelError, match=r"expected float images \[n, 3, 8, 8\]"):
        build_model("compact", spec())(images)


def test_compact_learns_the_digits():
    """A few plain epochs at seed 0 reach more than 95 % on what was held out."""
    data = load_data("digits")
    model = build_model("compact", data.spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in ShuffledBatches(data.train, batch_size=32, epochs=6, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert evaluate_model(model, data.test, data.spec.classes).accuracy > 0.95


class TestArchitecture:
    GOOD = {"model": "resnet20", "channels": 3, "height": 9, "width": 8, "classes": ["a", "b"]}  # noqa: RUF012

    def test_survives_json(self):
        """To JSON and back it is equal and builds the same weights as the short form."""
        architecture = Architecture.from_dict(self.GOOD)
        again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
        assert again == architecture
        short = build_model("resnet20", DataSpec(shape=(3, 9, 8), classes=("a", "b")))
        load_weights(short, again.build().state_dict())
        assert torch.equal(again.build().head.weight, short.head.weight)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"model": "os.system"}, "expected one of compact"),
            ({"model": 3}, "model as str"),
            ({"channels": 0}, "channels"),
            ({"channels": True}, "channels as int"),
            ({"height": 7}, "at least 8x8"),
            ({"width": 10**9}, "make the images smaller"),
            ({"width": 8.0}, "width as int"),
            ({"classes": ["a"]}, "classes"),
            ({"classes": ["a"] * 100_000}, "classes"),
            ({"classes": ["a", 1]}, "list of names"),
            ({"classes": "ab"}, "classes as list"),
            ({"extra": 1}, "expected exactly"),
        ],
    )
    def test_strange_values_are_refused(self, changes, match):
        """Nothing from a file reaches a layer unchecked."""
        with pytest.raises(ModelError, match=match):
            Architecture.from_dict({**self.GOOD, **changes})

    def test_a_missing_value_is_refused(self):
        """The message lists what is expected."""
        with pytest.raises(ModelError, match="expected exactly"):
            Architecture.from_dict({"model": "compact"})


class TestLoadWeights:
    def test_weights_arrive(self):
        """Afterwards both models are the same function."""
        source, target = (build_model("compact", spec(), generator_seed=seed) for seed in (1, 2))
        load_weights(target, source.state_dict())
        images = random_images(2, (3, 8, 8))
        assert torch.equal(source(images), target(images))

    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (lambda state: state.pop("norm1.bias"), "missing norm1.bias"),
            (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
            (
                lambda state: state.update({"head.bias": torch.zeros(4)}),
                r"head.bias: .*\[3\].*\[4\]",
            ),
            (lambda state: state.update({"head.bias": torch.zeros(3).half()}), "float16"),
        ],
    )
    def test_a_wrong_tensor_is_named_and_nothing_changes(self, spoil, match):
        """All weights or none."""
        model = build_model("compact", spec())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = build_model("compact", spec(), generator_seed=1).state_dict()
        spoil(state)
        with pytest.raises(ModelError, match=match):
            load_weights(model, state)
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)

    def test_another_model_is_a_short_message(self):
        """Of many differences the first are named and the rest are counted."""
        with pytest.raises(ModelError, match=r"and \d+ more"):
            load_weights(
                build_model("compact", spec()), build_model("resnet20", spec()).state_dict()
            )


def test_models_outside_their_range_are_refused():
    """An unknown name and an image too small are errors that say what is possible."""
    with pytest.raises(ModelError, match="resnet18"):
        build_model("resnet50", spec())
    with pytest.raises(ModelError, match="at least 8x8"):
        build_model("compact", spec(height=7))


def cut(images, edges):
    """Bands as they are meant: a plain cut."""
    pairs = pairwise(edges)
    cuts = [(images.clamp(low, high) - low) * (2 / (high - low)) - 1 for low, high in pairs]
    return torch.cat(cuts, dim=1)


def test_bands_cut_to_the_last_bit_and_hide_no_gradient():
    """On the way back a pixel belongs to all bands that a change of 0.1 brings it into."""
    values = torch.tensor([0.0, 0.05, 0.15, 0.3, 0.449, 0.451, 0.6, 0.85, 0.999, 1.0])
    images = values.view(1, 1, 2, 5).requires_grad_()
    edges = (0.1, 0.35, 0.9)
    found = Bands(edges, reach=0.1)(images)
    assert torch.equal(found, cut(images, edges))
    slopes = [
        torch.autograd.grad(found[0, band].sum(), images, retain_graph=True)[0].flatten()
        for band in (0, 1)
    ]
    torch.testing.assert_close(slopes[0], 8.0 * (values < 0.45))
    torch.testing.assert_close(slopes[1], 2 / 0.55 * (values > 0.25))


def test_bands_take_gradients_of_each_example():
    """As clipping by `vmap` asks for them."""
    bands, images = Bands((0.1, 0.5, 0.9), reach=0.1), random_images(3, (1, 1, 4, 4))

    def total(image):
        return bands(image).square().sum()

    each = torch.func.vmap(torch.func.grad(total))(images)
    alone = torch.stack([torch.func.grad(total)(image) for image in images])
    torch.testing.assert_close(each, alone)


def test_banded_does_not_see_what_happens_to_black_and_white():
    """A change of up to 0.1 leaves the logits as they are, and its gradient is there."""
    model = build_model("banded", spec())
    images = (random_images(4, (3, 8, 8)) > 0.5).float()
    inwards = 0.5 - images
    logits = model(images)
    torch.testing.assert_close(model(images + 0.19 * inwards), logits)
    assert not torch.allclose(model(images + 0.4 * inwards), logits, rtol=0, atol=1e-3)
    (gradient,) = torch.autograd.grad(model(images.requires_grad_()).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("model", ["handcrafted", "nonexpansive", "scattering"])
@pytest.mark.parametrize("shape", [(65, 8, 8), (1, 8, 4097)])
def test_fixed_features_of_images_that_only_a_forged_file_has_are_refused(model, shape):
    """Before memory is asked for that no machine has, or minutes are spent on filters."""
    spec = DataSpec(shape=shape, classes=("a", "b"))
    with pytest.raises(ModelError, match="expected at most 64 channels and 4096 pixels a side"):
        build_model(model, spec)
