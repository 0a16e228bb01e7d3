"""The frozen front: found where it is fixed, gone through once, and no other run for it."""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from secure_cnn import OwnNetwork, Recipe, archive, build_model, read_model, run
from secure_cnn.data import DataSpec, ImageData, Split, load_data
from secure_cnn.evaluate import evaluate_model
from secure_cnn.interruption import Stopped, StopRequest
from secure_cnn.recipe import Variant
from secure_cnn.recipe import front as front_room
from secure_cnn.recipe.front import Features, FrozenFront
from secure_cnn.recipe.settings import images_stay
from secure_cnn.record import RunRecord

ASSEMBLY = sys.modules["secure_cnn.recipe.assembly"]
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 16}
SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b", "c", "d"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


@pytest.fixture
def weights(tmp_path):
    """Weights as if trained elsewhere."""
    path = tmp_path / "w.safetensors"
    archive.save_plain(path, dict(build_model("compact", SPEC, generator_seed=9).state_dict()))
    return path


@pytest.fixture
def recipe(shapes, weights, tmp_path):
    """Makes recipes of three epochs of four steps, which train a head."""

    def make(name="run", **changes):
        base = {"out": tmp_path / name, "data": shapes, "epochs": 3, "robust_samples": 4}
        base |= {"weights": weights, "train_only": ["head.*"], "baseline": False}
        return Recipe(**(base | {"batch_size": 16} | changes))

    return make


@pytest.fixture
def uncached(monkeypatch):
    """Makes a run whose images go through the whole model at every step."""

    def go(asked, **given):
        with monkeypatch.context() as patch:
            patch.setattr(ASSEMBLY, "images_stay", lambda *_: False)
            return run(asked, **given)

    return go


@pytest.fixture
def filled(monkeypatch):
    """Numbers of images that went through fronts when they were filled, a number a front."""
    counts, fill = [], Features.fill

    def counted(features, before):
        if features._values is None:
            counts.append(len(features))
        fill(features, before)

    monkeypatch.setattr(Features, "fill", counted)
    return counts


class Seen(nn.Module):
    """Frozen, and counts all images that any copy of it was given."""

    rows = 0

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images):
        Seen.rows += len(images)
        return images * self.scale


class Row(nn.Module):
    """A layer that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def data_of(count=8):
    """Random images of SPEC."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *SPEC.shape), dtype=torch.uint8, generator=generator)
    split = Split(images=images, labels=torch.arange(count) % 4)
    return ImageData(name="random", train=split, test=split, spec=SPEC)


def names_in_front(*layers):
    """The types of the layers that are taken into a front, before a trained head."""
    body = nn.Sequential(*layers, nn.Flatten()).requires_grad_(False)
    model = nn.Sequential(*body, nn.Linear(72, 4))
    found = FrozenFront.of(model, data_of(), seed=0, device=CPU)
    return [type(layer).__name__ for layer in found.layers]


def frozen_norm(**settings):
    """As `training_mode` leaves a frozen BatchNorm."""
    return nn.BatchNorm2d(2, **settings).requires_grad_(False)


def test_what_is_fixed_is_the_front_up_to_the_first_layer_that_is_not():
    """Flattening too; dropout and what stands behind it is left in the rest."""
    conv = nn.Conv2d(1, 2, 3)
    assert names_in_front(conv) == ["Conv2d", "Flatten"]
    assert names_in_front(conv, nn.ReLU(inplace=True)) == ["Conv2d", "ReLU", "Flatten"]
    assert names_in_front(conv, nn.Dropout(0.1), nn.ReLU()) == ["Conv2d"]
    assert names_in_front(Seen()) == ["Seen", "Flatten"]
    # What it draws does not show in these images.
    seldom = Row(lambda images: images + 0 * torch.rand(()))
    assert names_in_front(conv, seldom) == ["Conv2d"]


@pytest.mark.parametrize(
    "function",
    [
        lambda images: images - images.mean(0),
        lambda images: images.double(),
        lambda images: images.bfloat16(),
        lambda images: images.flatten(),
        lambda images: images.repeat(2, 1, 1, 1),
        lambda images: (images, images),
        lambda images: images.view(1, 1, 1, -1)[0],
        lambda images: images * float("nan"),
        lambda images: images.unknown(),
    ],
    ids=["mixing", "double", "bfloat16", "flat", "rows", "two", "view", "nan", "failing"],
)
def test_what_is_no_row_of_float32_for_each_image_alone_is_no_front(function):
    """Only the layer before it is."""
    layer, data = Row(function), data_of()
    model = nn.Sequential(Seen(), layer, nn.Linear(8, 4))
    found = FrozenFront.of(model, data, seed=0, device=CPU)
    assert [type(each) for each in found.layers] == [Seen]
    control = nn.Sequential(Seen(), Row(lambda images: images + 1), nn.Linear(8, 4))
    assert len(FrozenFront.of(control, data, seed=0, device=CPU).layers) == 2


def test_a_frozen_batch_norm_is_fixed_in_evaluation_mode_alone():
    """Whose statistics move, or are the batch's own, mixes examples."""
    data = data_of()
    cases = [
        (frozen_norm().eval(), 2),
        (frozen_norm().train(), 1),
        (frozen_norm(track_running_stats=False).eval(), 1),
        (frozen_norm(affine=False).train(), 1),
        (nn.BatchNorm2d(2).eval(), 1),  # trained
    ]
    for norm, length in cases:
        conv = nn.Conv2d(1, 2, 3).requires_grad_(False)
        model = nn.Sequential(conv, norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 4))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert len(FrozenFront.of(model, data, seed=0, device=CPU).layers) == length
        assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


def test_what_is_not_worth_it_or_not_known_has_no_front(monkeypatch):
    """Nothing frozen, no tensor in it, another forward, a hook, too large."""
    data = data_of()

    def front(model):
        return FrozenFront.of(model, data, seed=0, device=CPU)

    def layers():
        return OrderedDict(seen=Seen(), flat=nn.Flatten(), head=nn.Linear(64, 4))

    assert front(nn.Sequential(layers())) is not None  # control
    assert front(build_model("compact", SPEC)) is None
    assert front(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 4))) is None
    assert front(type("Own", (nn.Sequential,), {})(layers())) is None
    assert front(nn.ModuleDict(layers())) is None
    hooked = nn.Sequential(layers())
    hooked.register_forward_pre_hook(lambda _, images: None)
    assert front(hooked) is None
    held = nn.Sequential(layers())
    held.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert front(held) is None
    size = 16 * 64
    monkeypatch.setattr(front_room, "MOST_FEATURES", size)
    assert front(nn.Sequential(layers())) is not None
    monkeypatch.setattr(front_room, "MOST_FEATURES", size - 1)
    assert front(nn.Sequential(layers())) is None


def test_looking_for_a_front_moves_no_global_random_state():
    """Nor does a layer that draws."""
    model = nn.Sequential(Seen(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4))
    before = torch.get_rng_state()
    assert len(FrozenFront.of(model, data_of(), seed=0, device=CPU).layers) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_those_of_the_images_filled_or_not():
    """By index, whole and one by one; what is done to a batch does not reach them."""
    data = data_of(600)
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).requires_grad_(False)
    features = Features(layers, data.train, memory_format=torch.channels_last)
    index = torch.tensor([513, 0, 7])
    wanted = layers(data.train.batch(index)[0])
    for _ in range(2):
        found, labels = features.batch(index)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(labels, index % 4)
        found.zero_()
        one, label = features[513]
        torch.testing.assert_close(one, wanted[0])
        assert label == 1
        one.zero_()
        done = []
        features.fill(done.append)
    assert done == []  # the second time
    assert len(features) == 600


def test_a_stop_ends_the_filling_and_keeps_nothing():
    """Between two chunks."""
    features = Features(nn.Sequential(Seen()), data_of(600).train)

    def stopping(done):
        if done:
            raise Stopped

    Seen.rows = 0
    with pytest.raises(Stopped):
        features.fill(stopping)
    assert Seen.rows == 512
    features.batch(torch.arange(3))
    assert Seen.rows == 515


def test_the_rest_shares_its_layers_and_names_with_the_model():
    """And the model has the very front from which the features came."""
    made = [build_model("compact", SPEC, generator_seed=seed) for seed in (0, 1)]
    for model in made:
        model.requires_grad_(False).head.requires_grad_(True)
    front = FrozenFront.of(made[0], data_of(), seed=0, device=CPU)
    rest = front.put_before(made[1])
    assert [name for name, _ in rest.named_parameters()] == ["head.weight", "head.bias"]
    assert rest.head is made[1].head
    assert made[1].conv1 is front.layers.conv1
    front.fill(StopRequest())
    images, _ = data_of().test.batch(torch.arange(8))
    features, _ = front.test.batch(torch.arange(8))
    assert torch.equal(rest(features), made[1](images))


@pytest.mark.parametrize(
    ("settings", "private", "plain"),
    [
        ({}, True, True),
        ({"shift": 1}, False, False),
        ({"flip": True}, False, False),
        ({"eps": 0.1}, False, True),
        ({"gaussian_sigma": 0.1}, False, True),
        ({"flip": True, "copies": 2}, False, False),
        ({"eps": 0.1, "copies": 2}, False, False),
        ({"label_smoothing": 0.1, "average_decay": 0.0}, True, True),
    ],
    ids=str,
)
def test_images_stay_where_nothing_changes_them(settings, private, plain):
    """In the recipe's own training, and in its baseline."""
    asked = Recipe(out="run", epsilon=3.0, **settings)
    assert images_stay(asked, asked.variant) is private
    assert images_stay(asked, Variant(private=False, method=None)) is plain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.1, "label_smoothing": 0.1},
        {"average_decay": 0.0},
        {"train_only": ["conv3.*", "norm3.*", "head.*"]},
    ],
    ids=["head", "adamw", "no-average", "last-block"],
)
def test_a_run_gives_what_it_gives_without(recipe, uncached, filled, settings):
    """The same weights and the same figures in every epoch; images go through once."""
    done = run(recipe(**settings))
    assert filled == [64, 24]
    whole = uncached(recipe("whole", **settings))
    assert filled == [64, 24]  # control: the other one did not
    state, wanted = done.model.state_dict(), whole.model.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    for epoch, other in zip(done.record.epochs, whole.record.epochs, strict=True):
        assert epoch.test_accuracy == other.test_accuracy
        assert epoch.test_loss == pytest.approx(other.test_loss, rel=1e-5)
        assert epoch.train_loss == pytest.approx(other.train_loss, rel=1e-5)
    began = build_model("compact", SPEC).state_dict()
    assert not torch.equal(state["head.weight"], began["head.weight"])


def test_a_private_run_has_the_same_plan_and_epsilon(recipe, uncached, filled):
    """And record and claims, but for what noise and samples decide.

    Its baseline and its private training share the features.
    """
    settings = {**PRIVATE, "baseline": True}
    done = run(recipe(**settings))
    assert filled == [64, 24]
    whole = uncached(recipe("whole", **settings))
    first, second = (RunRecord.read(each.folder.record) for each in (done, whole))
    assert first.privacy == second.privacy
    assert first.results[1].epsilon == second.results[1].epsilon <= 8.0
    assert first.results[0].confusion == second.results[0].confusion
    assert first.claims["privacy"] == second.claims["privacy"]
    assert first.model == second.model
    assert first.notes == second.notes
    assert [e.step for e in first.epochs] == [e.step for e in second.epochs]
    assert [e.epsilon for e in first.epochs] == [e.epsilon for e in second.epochs]
    assert first.released == second.released > 0
    body = done.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert name.startswith("head.") != torch.equal(body[name], tensor)


def test_the_finished_file_has_all_of_the_model(recipe):
    """Which predicts as the run said of its last epoch and of its end."""
    done = run(recipe())
    data = load_data(recipe().data)
    loaded = read_model(done.folder.model, unlocking=None)
    assert list(loaded.model.state_dict()) == list(build_model("compact", SPEC).state_dict())
    found = evaluate_model(loaded.model, data.test, SPEC.classes)
    last = done.record.epochs[-1]
    assert found.accuracy == done.record.results[0].accuracy == last.test_accuracy
    assert found.loss == pytest.approx(last.test_loss, rel=1e-5)


@pytest.mark.parametrize("private", [{}, PRIVATE], ids=["plain", "private"])
def test_a_resumed_run_computes_its_features_again(recipe, stopped_after, filled, private):
    """Stopped before the features are there, while they are computed, and within epochs."""
    asked = recipe("parts", baseline=bool(private), **private)
    for looks in (1, 2, 4, 6):
        with stopped_after(looks):
            part = run(asked, resume=asked_before(asked))
        assert part.record.status == "interrupted"
        assert part.folder.training.is_file()
    done = run(asked, resume=True)
    assert done.record.status == "complete"
    if not private:
        whole = run(recipe("whole")).model.state_dict()
        assert all(torch.equal(whole[n], t) for n, t in done.model.state_dict().items())
    else:
        assert done.record.results[-1].epsilon <= 8.0


def asked_before(asked):
    """Whether the recipe's run was begun."""
    return Path(asked.out).exists()


def own(spec, *, draw=lambda: 1.0):
    """A front that counts, a frozen convolution, dropout and a trained head."""
    model = nn.Sequential(
        OrderedDict(
            seen=Seen(),
            conv=nn.Conv2d(1, 4, 3).requires_grad_(False),
            norm=nn.BatchNorm2d(4).requires_grad_(False),
            relu=nn.ReLU(inplace=True),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.1),
            head=nn.Linear(144, len(spec.classes)),
        )
    )
    with torch.no_grad():
        model.conv.weight.mul_(draw())
    return model


def rows_of(recipe, network, **settings):
    """Images through the front in a run."""
    Seen.rows = 0
    name = f"epochs{settings['epochs']}"
    run(recipe(name, model="nets.py:own", weights=None, **settings), network=network)
    return Seen.rows


def test_more_epochs_send_no_more_images_through_the_front(recipe, monkeypatch):
    """Once in all, besides a few at random, and once more to judge the whole model."""
    network = OwnNetwork(name="nets.py:own", make=own)
    counts = [rows_of(recipe, network, epochs=epochs) for epochs in (1, 4)]
    assert counts[0] == counts[1] < 64 + 2 * 24 + 100
    monkeypatch.setattr(ASSEMBLY, "images_stay", lambda *_: False)
    assert rows_of(recipe, network, epochs=5) > 5 * (64 + 24)  # control


def test_a_network_that_is_made_anew_each_time_keeps_the_front_of_its_features(recipe):
    """Its function draws where no seed reaches; the finished model is still the one measured."""
    random = np.random.default_rng(0)
    network = OwnNetwork(
        name="nets.py:own", make=lambda spec: own(spec, draw=lambda: random.choice([-3.0, 3.0]))
    )
    for number in range(3):
        asked = recipe(f"anew{number}", model="nets.py:own", weights=None, baseline=False)
        done = run(asked, network=network)
        last = done.record.epochs[-1]
        found = evaluate_model(done.model, load_data(asked.data).test, SPEC.classes)
        assert found.loss == pytest.approx(last.test_loss, rel=1e-5)


def test_persons_are_protected_behind_a_front_too(recipe, shapes, tmp_path, filled):
    """Three images each, said by the data set itself."""
    with np.load(shapes) as arrays:
        split = dict(arrays)
    path = tmp_path / "persons.npz"
    np.savez(path, **split, groups=np.arange(64) // 2, test_groups=1000 + np.arange(24))
    asked = recipe(data=path, unit="person", **{**PRIVATE, "batch_size": 8})
    done = run(asked)
    assert filled == [64, 24]
    assert done.record.privacy.unit == "person"
    assert done.record.privacy.sampling_rate == 8 / 32
    assert read_model(done.folder.model, unlocking=None).claims["privacy"]["unit"] == "person"
