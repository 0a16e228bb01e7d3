"""Images from gradients, measured: told where nothing protects them, and not where noise does."""

import math

import pytest
import torch
from support.leakage_records import inversion_of
from torch import nn

from privacy.leakage import Inversion, Reconstruction, shared_gradient
from secure_cnn.data import Split, load_data
from secure_cnn.errors import ModelError, RunError
from secure_cnn.interruption import Stopped, StopRequest
from secure_cnn.leakage import gradients, sharing
from secure_cnn.leakage.gradients import InversionSettings, measure_inversion
from secure_cnn.leakage.sharing import Sharing
from secure_cnn.models import build_model

DATA = load_data("digits")
QUICK = Inversion(steps=40, restarts=1, total_variation=1e-3)
NOISED = Sharing(max_grad_norm=1.0, noise_multiplier=1.0)
GO_ON = StopRequest()


def network():
    """Smooth, so that a short search finds an image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(12 * 64, 10),
        )


def settings(**changes):
    usual = {"protections": (Sharing(),), "batches": (1,), "repeats": 2, "images": 1}
    return InversionSettings(**{**usual, "candidates": 300, "inversion": QUICK, **changes})


def chosen(asked):
    """The candidates of a measurement, as its docstring says that they are drawn."""
    random = torch.Generator().manual_seed(asked.seed)
    return DATA.train.batch(torch.randperm(len(DATA.train), generator=random)[: asked.candidates])


@pytest.fixture
def search(monkeypatch):
    """In place of the search: answers what a test says, and keeps the labels it was given."""

    class Search:
        def __init__(self):
            self.labels, self.images = [], torch.zeros(0)

        def __call__(self, model, gradient, *, shape, labels, inversion, stop):
            self.labels.append(labels.tolist())
            return Reconstruction(images=self.images[: len(labels)], labels=labels, objective=0.0)

    found = Search()
    monkeypatch.setattr(gradients, "invert", found)
    return found


def test_images_are_told_by_plain_gradients_and_not_by_noised_ones():
    """The same images; what is found of them is shown beside them."""
    asked = settings(protections=(Sharing(), NOISED), batches=(1, 2))
    model, state = network().train(), torch.random.get_rng_state()
    weights = [each.clone() for each in model.parameters()]
    records, pictures = measure_inversion(model, DATA.train, asked, stop=GO_ON)
    assert [(each.protection, each.batch, each.asked) for each in records] == [
        *(("plain", 1, 2), ("plain", 2, 4), ("noised", 1, 2), ("noised", 2, 4)),
    ]
    plain, noised = records[:2], records[2:]
    assert all(each.identified == each.asked for each in plain)
    assert sum(each.identified for each in noised) == 0
    assert min(each.psnr for each in plain) > max(each.psnr for each in noised) + 5
    # Clopper and Pearson's for both of two: the root of a fortieth.
    assert (plain[0].low, plain[0].high) == (pytest.approx(0.025**0.5), 1.0)
    images, _ = chosen(asked)
    assert torch.equal(pictures[1].originals, images[:2])
    assert pictures[1].found.shape == (2, 1, 8, 8)
    assert model.training
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_gradient_of_another_image_does_not_tell_this_one(monkeypatch):
    """Control: what is identified is so by its own gradient alone."""
    others = DATA.test.batch(torch.arange(3))

    def elsewhere(model, images, labels):
        return shared_gradient(model, *(each[: len(images)] for each in others))

    monkeypatch.setattr(sharing, "shared_gradient", elsewhere)
    ((record,), _) = measure_inversion(network(), DATA.train, settings(), stop=GO_ON)
    assert record.identified == 0


def test_who_is_identified_is_counted_one_to_one(search):
    """Originals in another order are all found; the first of them for each is one."""
    asked = settings(batches=(4,), repeats=1, candidates=50)
    of_a_kind = DATA.train.labels == 3
    same = Split(images=DATA.train.images[of_a_kind], labels=DATA.train.labels[of_a_kind])
    order = torch.randperm(len(same), generator=torch.Generator().manual_seed(asked.seed))
    images, _ = same.batch(order[:8])
    search.images = images[:4].flip(0)
    ((record,), (picture,)) = measure_inversion(network(), same, asked, stop=GO_ON)
    assert (record.identified, record.psnr, record.ssim) == (4, 100.0, pytest.approx(1.0))
    assert torch.equal(picture.found, picture.originals)
    search.images = images[:1].expand(4, -1, -1, -1)
    ((record,), _) = measure_inversion(network(), same, asked, stop=GO_ON)
    assert record.identified == 1
    # Another image of the data set is nearer to itself than any that was shared.
    search.images = images[4:]
    ((record,), _) = measure_inversion(network(), same, asked, stop=GO_ON)
    assert (record.identified, record.candidates) == (0, 50)


def test_of_few_images_in_a_gradient_more_are_inverted(search):
    """Four alone would leave an interval from 0 to 0.6 where none is found."""
    search.images = torch.zeros(8, 1, 8, 8)
    usual = InversionSettings()
    asked = settings(batches=usual.batches, repeats=usual.repeats, images=usual.images)
    records, _ = measure_inversion(build_model("compact", DATA.spec), DATA.train, asked, stop=GO_ON)
    assert [(each.batch, each.asked) for each in records] == [(1, 16), (4, 16), (8, 16)]
    assert len(search.labels) == asked.gradients == 22
    nothing = inversion_of("plain", 1, 0, asked=records[0].asked)
    assert nothing.high < 0.25


@pytest.mark.parametrize("shared", [Sharing(), Sharing(max_grad_norm=0.01)])
def test_labels_are_found_and_not_given(search, shared):
    """By the last bias, behind clipping too, and those that several images have."""
    asked = settings(protections=(shared,), batches=(1, 4, 8), repeats=2)
    images, labels = chosen(asked)
    search.images = images[:8]
    model = build_model("compact", DATA.spec)
    measure_inversion(model, DATA.train, asked, stop=GO_ON)
    batches = [labels[i * n : (i + 1) * n] for n in asked.batches for i in range(2)]
    assert search.labels == [sorted(each.tolist()) for each in batches]
    assert any(len(set(each)) < len(each) for each in search.labels)


def test_clipping_shortens_each_example_alone():
    """Against each example's own gradient; a long norm changes nothing."""
    model, (images, labels) = network(), DATA.train.batch(torch.arange(3))
    random = torch.Generator()
    own = [shared_gradient(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    lengths = [torch.cat([each.flatten() for each in one.values()]).norm() for one in own]
    norm = float(sorted(lengths)[1])
    clipped = Sharing(max_grad_norm=norm)(model, images, labels, random)
    factors = [min(1.0, norm / float(each)) for each in lengths]
    assert min(factors) < 1 == max(factors)
    for name, each in clipped.items():
        mean = sum(f * one[name] for f, one in zip(factors, own, strict=True)) / 3
        assert each == pytest.approx(mean.numpy(), abs=1e-6)
    whole = Sharing(max_grad_norm=1e6)(model, images, labels, random)
    for name, each in Sharing()(model, images, labels, random).items():
        assert whole[name] == pytest.approx(each.numpy(), abs=1e-6)


def test_noise_is_what_a_private_step_adds_and_follows_from_its_seed():
    """Its deviation is the multiplier times the norm over the images, on 7,690 values."""
    model, (images, labels) = network(), DATA.train.batch(torch.arange(4))
    shared = [
        Sharing(max_grad_norm=2.0, noise_multiplier=each)(
            model, images, labels, torch.Generator().manual_seed(seed)
        )
        for each, seed in ((0.0, 1), (3.0, 1), (3.0, 1), (3.0, 2))
    ]
    clipped, noised, again, other = (
        torch.cat([each.flatten() for each in one.values()]).double() for one in shared
    )
    assert torch.equal(noised, again)
    assert not torch.equal(noised, other)
    # Of so many squares the mean leaves this interval with probability below 1e-9.
    share = float(((noised - clipped) / (3.0 * 2.0 / 4)).square().mean())
    assert share == pytest.approx(1.0, abs=6.5 * math.sqrt(2 / len(clipped)))


def test_inputs_of_a_trained_head_are_found_exactly(search):
    """However bad the picture is; with noise there is nothing to find."""
    asked = settings(protections=(Sharing(), NOISED), batches=(1, 2), repeats=4, candidates=100)
    search.images = torch.zeros(2, 1, 8, 8)
    model = build_model("scattering", DATA.spec)
    (plain, pairs, noised, lost), _ = measure_inversion(model, DATA.train, asked, stop=GO_ON)
    assert (plain.identified, noised.identified) == (4, 0)
    # Of two images of one class the mean alone is found.
    assert pairs.identified >= 6
    assert lost.identified <= 2
    assert plain.psnr < 15


def test_the_same_seed_gives_the_same_figures():
    """Of search and noise; another seed chooses other images."""
    asked = settings(protections=(NOISED,), repeats=1, inversion=Inversion(steps=5, restarts=1))
    again = settings(
        protections=(NOISED,), repeats=1, inversion=Inversion(steps=5, restarts=1), seed=1
    )
    one, two, other = (
        measure_inversion(network(), DATA.train, each, stop=GO_ON)[1][0]
        for each in (asked, asked, again)
    )
    assert torch.equal(one.found, two.found)
    assert not torch.equal(one.originals, other.originals)


def test_a_stop_ends_it():
    stop = StopRequest()
    stop.set()
    with pytest.raises(Stopped):
        measure_inversion(network(), DATA.train, settings(), stop=stop)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Sharing(max_grad_norm=0.0), "max_grad_norm: expected a finite number > 0"),
        (lambda: Sharing(noise_multiplier=1.0), "expected max_grad_norm with it"),
        (lambda: Sharing(max_grad_norm=1.0, noise_multiplier=-1.0), "a finite number >= 0"),
        (lambda: InversionSettings(batches=()), "batches: expected one or more"),
        (lambda: InversionSettings(batches=(0,)), "batches: expected a whole number, at least 1"),
        (lambda: InversionSettings(repeats=0), "repeats: expected a whole number, at least 1"),
        (
            lambda: InversionSettings(candidates=1),
            "candidates: expected a whole number",
        ),
        (
            lambda: measure_inversion(
                network(), DATA.test.first(15), settings(batches=(8,)), stop=GO_ON
            ),
            "expected at least 16 images",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(RunError, match=words):
        call()


def test_a_model_without_a_last_bias_is_refused():
    """No label would follow."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    assert isinstance(model(torch.zeros(1, 1, 8, 8)), torch.Tensor)
    with pytest.raises(ModelError, match="a linear layer with a bias"):
        measure_inversion(
            model, Split(images=DATA.train.images, labels=DATA.train.labels), settings(), stop=GO_ON
        )
