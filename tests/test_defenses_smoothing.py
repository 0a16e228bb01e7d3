"""Certificates: coverage where the truth is known, and the trick that breaks floats."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.networks import assert_same, disturbed_net, snapshot
from torch import nn

from defenses.errors import EvaluationError, ThreatModelError
from defenses.smoothing import certification
from defenses.smoothing.certification import certify
from defenses.smoothing.smoothing import CertificationReport, Smoothing

QUICK = Smoothing(sigma=0.25, samples=500)


def dataset(levels, labels=None):
    """uint8 images [n, 1, 8, 8], each of one level, unless they are given whole."""
    images = torch.as_tensor(levels, dtype=torch.uint8)
    if images.ndim == 1:
        images = images[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return SimpleNamespace(images=images, labels=labels)


class Linear(nn.Module):
    """Class 1 where w.x > b, computed in float64: smoothed, its radius is |w.x - b| / |w|."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight.double(), bias
        self.double_home = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, images):
        score = images.flatten(1) @ self.weight - self.bias
        return torch.stack([-score, score], dim=1)


def one_pixel(level):
    """Class 1 where the first pixel is above level + 1/2: the exact radius is known."""
    weight = torch.zeros(64)
    weight[0] = 1.0
    return Linear(weight, (level + 0.5) / 255)


@pytest.mark.parametrize("distance", [2, 40, 90])
def test_coverage_holds_and_is_not_wasted(distance):
    """Of many certificates at most alpha exceed the exact radius, and half a sigma is not lost.

    The control, a radius from the share of hits instead of its lower bound, is too large in about
    half of all cases and must be rejected.
    """
    trials, true = 1500, (distance - 0.5) / 255
    smoothing = Smoothing(sigma=0.25, selection=10, samples=200, alpha=0.05)
    data = dataset([100 + distance] * trials, torch.ones(trials, dtype=torch.int64))
    report = certify(one_pixel(100), data, smoothing, batch_size=20_000, progress=False)
    allowed = int(stats.binom.isf(1e-4, trials, smoothing.alpha))
    false = sum(radius > true for radius in report.radii)
    assert false <= allowed
    # A certificate of the other class is false however short it is.
    assert report.verdicts.count("wrong") <= allowed
    naive = [0.25 * stats.norm.ppf(min(hits, 199) / 200) for hits in report.hits]
    assert sum(radius > true for radius in naive) > 3 * allowed
    if distance > 2:
        # What the bound costs at most: its distance from the share, at 200 samples.
        assert 0 < true - np.median(report.radii) < 0.25 * 0.5


def test_many_samples_come_close_to_the_exact_radius():
    """Of a linear classifier on all pixels, to a hundredth of sigma."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=draw, dtype=torch.float64)
    images = torch.randint(256, (6, 1, 8, 8), generator=draw, dtype=torch.uint8)
    scores = (images.flatten(1).double() / 255) @ weight
    bias = float(scores.mean())
    data = dataset(images, (scores > bias).long())
    exact = (scores - bias).abs() / weight.norm()
    report = certify(Linear(weight, bias), data, Smoothing(sigma=0.5, samples=40_000))
    assert report.verdicts.count("correct") == 6
    for radius, true in zip(report.radii, exact.tolist(), strict=True):
        assert true - 0.5 * 0.05 < radius <= true


class TellsOrigin(nn.Module):
    """Class 1 where float arithmetic betrays that noise was added to pixels of level 64.

    After the example of Voracek and Hein (2023): (y - a) + a is y again if y was made as a + noise.
    """

    origin = torch.tensor(64 / 255)

    def forward(self, images):
        betrayed = ((images - self.origin) + self.origin == images).flatten(1).all(dim=1)
        return nn.functional.one_hot(betrayed.long(), 2).float()


def naive_votes(model, level, samples=2000):
    """Votes of the usual implementation: noise in floats, added in floats."""
    noise = 0.5 * torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.bincount(model(level / 255 + noise).argmax(1), minlength=2)


def test_the_floating_point_trick_breaks_the_usual_way_and_not_this_one():
    """Two images 0.03 apart: in floats both are certified to 1.3, as different classes."""
    smoothing = Smoothing(sigma=0.5, samples=2000)
    distance = math.sqrt(64) / 255
    usual = [naive_votes(TellsOrigin(), level) for level in (64, 63)]
    assert [int(votes.argmax()) for votes in usual] == [1, 0]
    assert all(smoothing.radius(int(votes.max())) > 10 * distance for votes in usual)
    ours = certify(TellsOrigin(), dataset([64, 63]), smoothing, progress=False)
    assert ours.selected[0] == ours.selected[1]
    assert min(ours.class_radii) > distance  # it does not get out of it by abstaining


def test_the_model_sees_levels_and_whole_noise_only():
    """The same sum of level and noise is the same float, whatever the two parts."""
    seen = []

    class Watches(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1)[:, :2]

    certify(Watches(), dataset([0, 7, 255]), QUICK, progress=False)
    pixels = torch.cat([each.flatten() for each in seen])
    levels = (pixels.double() * 255).round()
    assert torch.equal((levels.float() / 255), pixels)
    assert pixels.min() < 0
    assert pixels.max() > 1


@given(samples=st.integers(1, 3000), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_radius_is_the_clopper_pearson_bound(samples, data):
    """At the radius's probability, so many hits have probability at most alpha, and hardly less."""
    hits = data.draw(st.integers(0, samples))
    alpha = data.draw(st.sampled_from([0.05, 0.001]))
    radius = Smoothing(sigma=2.0, samples=samples, alpha=alpha).radius(hits)
    tail = stats.binom.sf(hits - 1, samples, stats.norm.cdf(radius / 2.0))
    if radius > 0:
        assert 0.98 * alpha < tail <= alpha
    else:
        assert tail > 0.98 * alpha  # already one half is not excluded


def test_noise_of_an_image_depends_on_its_index_and_the_seed_only():
    """Not on the batch size, nor on the other images."""
    data = dataset([10, 90, 100, 101, 180])
    model = one_pixel(100)
    whole = certify(model, data, QUICK, progress=False)
    for batch_size in (1, 77, 1500, 10_000):
        assert certify(model, data, QUICK, batch_size=batch_size, progress=False) == whole
    part = certify(model, data, QUICK, images=3, seed=0, progress=False)
    known = dict(zip(whole.indices, whole.hits, strict=True))
    assert [known[index] for index in part.indices] == list(part.hits)
    assert certify(model, data, QUICK, seed=1, progress=False).hits != whole.hits


def test_selection_and_estimation_use_different_noise():
    """Else the class would be chosen for the samples that then speak for it."""
    seen = []

    class Watches(nn.Module):
        def forward(self, images):
            seen.append(images[:, 0, 0, 0])
            return images.flatten(1)[:, :2]

    certify(Watches(), dataset([7]), Smoothing(sigma=0.25, selection=50, samples=50))
    _, selection, estimation = seen  # the first is one image, to see that the model answers
    assert len(selection) == len(estimation) == 50
    assert not torch.equal(selection, estimation)


def test_models_that_want_another_layout_are_asked_in_it():
    """A `view` that only plain strides allow gives what `flatten` gives."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            torch_draw = torch.Generator().manual_seed(2)
            self.weight = nn.Parameter(torch.randn(4, 1, 3, 3, generator=torch_draw))

        def forward(self, images):
            return nn.functional.conv2d(images, self.weight).view(len(images), -1)[:, ::40]

    class Flattens(Views):
        def forward(self, images):
            return nn.functional.conv2d(images, self.weight).flatten(1)[:, ::40]

    data = dataset([10, 200])
    found = [certify(each(), data, QUICK, progress=False) for each in (Views, Flattens)]
    assert found[0] == found[1]


class _KilledError(Exception):
    """Stands for a power cut."""


def test_a_killed_certification_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    """From its file, without asking again about the images that are done."""
    data, model, state = dataset(range(60, 140, 8)), one_pixel(100), tmp_path / "state.json"
    whole = certify(model, data, QUICK, progress=False)
    real, blocks = certification._certify_block, []

    def dies(voter, block, *others):
        if len(blocks) == 3:
            raise _KilledError
        blocks.append(block.indices.tolist())
        return real(voter, block, *others)

    monkeypatch.setattr(certification, "_certify_block", dies)
    with pytest.raises(_KilledError):
        certify(model, data, QUICK, batch_size=1000, state=state, progress=False)
    assert blocks == [[0, 1], [2, 3], [4, 5]]
    blocks.clear()
    blocks.extend([None] * 4)  # never dies again
    resumed = certify(model, data, QUICK, batch_size=1000, state=state, progress=False)
    assert resumed == whole
    assert blocks[4:] == [[6, 7], [8, 9]]
    assert certify(model, data, QUICK, state=state, progress=False) == whole  # nothing left to do


def test_the_state_of_another_certification_is_refused(tmp_path):
    """Of another model, other images, other settings or another seed."""
    data, state = dataset([60, 140]), tmp_path / "state.json"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    certify(model, data, QUICK, state=state, progress=False)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    wider = Smoothing(sigma=0.5, samples=500)
    for changed in (
        lambda: certify(other, data, QUICK, state=state, progress=False),
        lambda: certify(model, dataset([60, 141]), QUICK, state=state, progress=False),
        lambda: certify(model, data, wider, state=state, progress=False),
        lambda: certify(model, data, QUICK, seed=1, state=state, progress=False),
    ):
        with pytest.raises(EvaluationError, match="another path"):
            changed()


def test_the_model_and_the_random_states_are_as_before():
    """After a certification, and after one that fails."""
    net, data = disturbed_net(), dataset([10, 200])
    before = snapshot(net)
    certify(net, data, Smoothing(sigma=0.25, samples=50), progress=False)
    assert_same(before, snapshot(net))
    data.labels[1] = 9
    with pytest.raises(EvaluationError, match="labels"):
        certify(net, data, Smoothing(sigma=0.25, samples=50), progress=False)
    assert_same(before, snapshot(net))


def test_floats_on_the_grid_are_what_bytes_are():
    """However the k / 255 was computed; pixels off the grid are refused."""
    data, model = dataset([60, 103, 140]), one_pixel(100)
    expected = certify(model, data, QUICK, progress=False)
    for images in (data.images.float() / 255, data.images.double() / 255, data.images.half() / 255):
        same = SimpleNamespace(images=images, labels=data.labels)
        assert certify(model, same, QUICK, progress=False) == expected
    listed = [(image.float().div_(255), 0) for image in data.images]
    assert certify(model, listed, QUICK, progress=False) == expected
    off = SimpleNamespace(images=data.images.float() / 255 + 1e-6, labels=data.labels)
    with pytest.raises(EvaluationError, match="k / 255"):
        certify(model, off, QUICK, progress=False)
    with pytest.raises(ThreatModelError, match="expected images in"):
        certify(model, SimpleNamespace(images=data.images.float(), labels=data.labels), QUICK)


def report():
    """Five images: certain, likely, wrong, abstained, and abstained on the wrong class."""
    return CertificationReport(
        smoothing=Smoothing(sigma=0.5, samples=1000),
        classes=3,
        indices=(0, 1, 2, 3, 4),
        labels=(0, 1, 2, 1, 2),
        selected=(0, 1, 1, 1, 1),
        hits=(1000, 800, 1000, 520, 300),
        seed=3,
        images="ab",
        versions={"torch": "2"},
    )


def test_wrong_and_abstained_are_told_apart():
    """Both have radius 0 and count against the certified accuracy."""
    found = report()
    assert found.verdicts == ("correct", "correct", "wrong", "abstained", "abstained")
    assert found.abstention == 0.4
    assert found.radii[0] == found.largest_radius == found.class_radii[2]
    assert found.radii[2:] == (0.0, 0.0, 0.0)
    assert [found.certified(radius).accuracy for radius in (0, 0.1, 0.5, 9)] == [0.4, 0.4, 0.2, 0]
    curve = found.curve()
    assert curve[0].accuracy == 0.4
    assert curve[-1].accuracy == 0.2
    assert curve[-1].radius == found.largest_radius
    assert all(a.accuracy >= b.accuracy for a, b in itertools.pairwise(curve))
    assert all(p.interval[0] <= p.accuracy <= p.interval[1] for p in curve)


def test_a_report_goes_to_json_and_back(tmp_path):
    """Whole; a summary that was tampered with is ignored, counts that do not fit are refused."""
    path = tmp_path / "certificate.json"
    report().save(path)
    values = json.loads(path.read_text())
    values["summary"]["radii"] = [9.0] * 5
    assert CertificationReport.from_dict(values) == report()
    for broken in (
        {**values, "hits": [1001, 0, 0, 0, 0]},
        {**values, "labels": [0]},
        {**values, "smoothing": {"sigma": -1.0}},
        {**values, "smoothing": {"noise": 1.0}},
        {**values, "selected": None},
        {key: value for key, value in values.items() if key != "seed"},
        {**values, "schema": 0},
    ):
        with pytest.raises(EvaluationError):
            CertificationReport.from_dict(broken)


@pytest.mark.parametrize(
    "values",
    [{"sigma": 0}, {"sigma": 0.5, "samples": 0}, {"sigma": 0.5, "selection": 0}]
    + [{"sigma": 0.5, "alpha": alpha} for alpha in (0, 1, float("nan"))],
)
def test_settings_that_prove_nothing_are_refused(values):
    """When they are made."""
    with pytest.raises(EvaluationError):
        Smoothing(**values)


def test_bad_input_is_named():
    """Batch size, seed, number of images, logits, and an alpha that the sampler would use up."""
    data, model = dataset([60, 140]), one_pixel(100)
    for wrong in ({"batch_size": 0}, {"seed": -1}, {"images": 3}, {"images": 0}):
        with pytest.raises(EvaluationError):
            certify(model, data, QUICK, progress=False, **wrong)
    with pytest.raises(EvaluationError, match="logits"):
        certify(nn.Identity(), data, QUICK, progress=False)
    strict = Smoothing(sigma=0.25, samples=10_000, alpha=1e-9)
    with pytest.raises(EvaluationError, match="alpha"):
        certify(model, data, strict, progress=False)
