"""Evaluation: the figures of a report against closed forms and by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evaluated import LINF, tensors
from support.networks import Answering, Net, assert_same, disturbed_net, snapshot
from support.searched import linear
from support.suspects import ALL
from torch import nn

from defenses import (
    AttackError,
    DefenseError,
    EvaluationError,
    RobustnessReport,
    Smoothing,
    ThreatModel,
    ThreatModelError,
    attack,
    certify,
    evaluate,
    wilson_interval,
)
from defenses.checks.checks import CheckSettings
from defenses.measuring.images import ImageSource

FAST = ("fgsm",)


@pytest.mark.parametrize("names", [("fgsm",), ("pgd", "apgd"), ("apgd", "pgd")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_robust_accuracy_is_the_closed_form(norm, names):
    """An image is robust exactly when its margin exceeds the most that the ball can take."""
    if norm == "l2" and "fgsm" in names:
        names = ("pgd",)
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(64, generator=draw)
    data = tensors(n=300, classes=2, seed=2)
    images = data.images.double().flatten(1) / 255
    threat = ThreatModel(norm=norm, eps={"linf": 0.01, "l2": 0.2}[norm])
    bias = -float(images.mean(0) @ weight.double())
    data.labels = ((images @ weight.double() + bias) < 0).long()
    data.labels[:30] = 1 - data.labels[:30]  # some are wrong from the start
    margin = (images @ weight.double() + bias) * (1 - 2 * data.labels)
    if norm == "linf":  # clipped to the bounds, exactly
        sign = (weight.sign() * (1 - 2 * data.labels[:, None])).double()
        worst = (images - threat.eps * sign).clamp(0, 1)
        floor = (worst @ weight.double() + bias) * (1 - 2 * data.labels)
        certain = floor.abs() > 1e-4
    else:  # the bounds can only help: compare where they do not bind
        floor = margin - threat.eps * float(weight.norm())
        certain = (floor.abs() > 0.05) & (
            (images - 0.5).abs().amax(1) <= 0.5 - threat.eps * weight.abs().max() / weight.norm()
        )
        certain |= (floor > 0) | (margin < 0)
    report = evaluate(linear(weight, bias), data, threat, attacks=names, progress=False)
    assert certain.double().mean() > (0.95 if norm == "linf" else 0.2)
    expected = (floor > 0)[certain].tolist()
    assert 0 < sum(expected) < len(expected)
    assert torch.tensor(report.worst_case)[certain].tolist() == expected
    assert report.clean_accuracy == pytest.approx((margin > 0).double().mean().item())


def test_each_attack_sees_only_what_still_stands():
    """Misclassified images are never attacked, fooled ones not again; rows are cumulative."""
    data, seen = tensors(), []

    class ByFirstPixel(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot((images[:, 0, 0, 0] * 3.999).long(), 4).float()

    data.labels = (data.images[:, 0, 0, 0].float() / 255 * 3.999).long()
    data.labels[::5] = (data.labels[::5] + 1) % 4

    def first(model, images, labels):
        seen.append(len(images))
        moved = images.clone()
        moved[::2, 0, 0, 0] = (images[::2, 0, 0, 0] + 0.9) % 1
        return moved

    def second(model, images, labels):
        seen.append(len(images))
        return images

    wide = ThreatModel(norm="linf", eps=1.0)
    report = evaluate(ByFirstPixel(), data, wide, attacks=[first, second], batch_size=1000)
    assert report.clean_accuracy == 0.8
    assert seen[0] == 32
    assert seen[1] == sum(report.robust["first"]) < 32
    assert report.robust["second"] == report.robust["first"] == report.worst_case
    assert not any(
        robust and not right
        for robust, right in zip(report.worst_case, report.correct, strict=True)
    )


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 2.0)])
def test_the_default_is_the_quick_ensemble(norm, eps):
    """By the settings in the report."""
    report = evaluate(Net(), tensors(4), ThreatModel(norm=norm, eps=eps), progress=False)
    assert report.settings == {
        "apgd": {"steps": 50, "loss": "scaled-ce", "restarts": 1},
        "apgdt": {"steps": 50, "target_classes": 3},
    }


def test_there_are_default_attacks_in_l0_too():
    """Which has no gradient steps."""
    report = evaluate(Net(), tensors(4), ThreatModel(norm="l0", eps=3), progress=False)
    assert list(report.robust) == ["sparsefool", "onepixel"]


def test_figures_follow_from_the_matrix():
    """Accuracy, recall, macro recall and intervals, by hand."""
    report = RobustnessReport(
        threat=LINF,
        classes=4,
        indices=(0, 1, 2, 3, 4),
        labels=(0, 0, 1, 1, 3),
        predictions=(0, 0, 1, 2, 3),
        outcomes={
            "pgd": (True, True, True, None, False),
            "apgd": (True, False, True, None, None),
        },
        settings={"pgd": {}, "apgd": {}},
        seed=0,
        images="",
        versions={},
    )
    assert report.robust["apgd"] == (True, False, True, False, False)
    assert (report.tried, report.fooled) == ({"pgd": 4, "apgd": 3}, {"pgd": 1, "apgd": 1})
    assert report.individual_accuracy == {"pgd": pytest.approx(0.6), "apgd": None}
    assert report.clean_accuracy == 0.8
    assert report.attack_accuracy == {"pgd": 0.6, "apgd": 0.4}
    assert report.worst_case_accuracy == 0.4
    assert report.clean_recall == (1.0, 0.5, None, 1.0)
    assert report.worst_case_recall == (0.5, 0.5, None, 0.0)
    assert report.clean_macro_recall == pytest.approx(2.5 / 3)
    assert report.worst_case_macro_recall == pytest.approx(1 / 3)
    assert report.worst_case_interval == wilson_interval(2, 5)


@given(trials=st.integers(1, 2000), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_wilson_interval_solves_its_equation(trials, data):
    """Its ends are the shares at which the observation is 1.96 standard errors away."""
    successes = data.draw(st.integers(0, trials))
    share = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            error = (end * (1 - end) / trials) ** 0.5
            assert abs(share - end) == pytest.approx(1.959964 * error, rel=1e-4, abs=1e-9)


def test_the_report_survives_json_and_disk(tmp_path):
    """Everything but the example images comes back, and the file is plain JSON."""
    few = CheckSettings(samples=4, steps=1, queries=1, draws=1, planted=1, spot=2)
    report = evaluate(
        Net(), tensors(), LINF, attacks=FAST, samples=20, verdicts=few, progress=False
    )
    assert tuple(verdict.name for verdict in report.verdicts) == ALL
    path = tmp_path / "robustness.json"
    report.save(path)
    values = json.loads(path.read_text())
    assert RobustnessReport.from_dict(values) == report
    assert values["summary"]["worst_case_accuracy"] == report.worst_case_accuracy
    assert [entry.name for entry in tmp_path.iterdir()] == ["robustness.json"]
    assert {"torch", "torchattacks"} <= set(report.versions)


def test_a_failing_save_leaves_what_was_there(tmp_path, monkeypatch):
    """The file is replaced whole or not at all, and no temporary one stays."""
    report = evaluate(Net(), tensors(4), LINF, attacks=FAST, progress=False)
    path = tmp_path / "robustness.json"
    path.write_text("precious")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report.save(path)
    assert path.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", ["drop", "shorten", "sign", "verdict", "schema", "label", "kind"]
)
def test_values_that_are_not_a_report_are_refused(damage):
    """In one typed error."""
    report = evaluate(Net(), tensors(6), LINF, attacks=FAST, progress=False)
    values = report.to_dict()
    if damage == "drop":
        del values["labels"]
    elif damage == "shorten":
        values["outcomes"]["fgsm"] = values["outcomes"]["fgsm"][1:]
    elif damage == "sign":
        values["outcomes"]["fgsm"] = "2" + values["outcomes"]["fgsm"][1:]
    elif damage == "verdict":
        values["verdicts"] = [{"name": "x", "outcome": "maybe", "figure": 1, "sentence": ""}]
    elif damage == "schema":
        values["schema"] = 0
    elif damage == "label":
        values["labels"][0] = 9
    else:
        values["threat"] = "linf"
    with pytest.raises(EvaluationError):
        RobustnessReport.from_dict(values)


def test_the_model_and_the_random_states_come_back(capsys):
    """Evaluation in the middle of training changes nothing, and prints nothing off a terminal."""
    net = disturbed_net()
    before = snapshot(net)
    evaluate(net, tensors(8), LINF, attacks=("pgd", "square", lambda m, x, y: x), samples=5)
    assert_same(before, snapshot(net))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_seed_repeats_the_evaluation_and_chooses_the_images():
    """Same seed, same report; another seed, other images."""
    net, data = Net(), tensors(60)
    run = [
        evaluate(net, data, LINF, attacks=("pgd",), samples=20, seed=seed, progress=False)
        for seed in (1, 1, 2)
    ]
    assert run[0] == run[1]
    assert run[0].indices != run[2].indices
    assert list(run[0].indices) == sorted(set(run[0].indices))
    assert len(run[0].indices) == 20


def test_every_kind_of_data_set_gives_the_same_report():
    """uint8 tensors, float tensors and a map-style list of pairs."""
    net, data = Net(), tensors(12)
    floats = SimpleNamespace(images=data.images.float() / 255, labels=data.labels)
    pairs = [(floats.images[i], int(data.labels[i])) for i in range(12)]
    reports = [
        evaluate(net, each, LINF, attacks=FAST, batch_size=5, progress=False)
        for each in (data, floats, pairs, torch.utils.data.Subset(pairs, range(12)))
    ]
    assert all(report == reports[0] for report in reports)


def test_examples_show_what_the_attacks_made_of_some_images():
    """8, inside the ball, some fooled and some not, with predictions that the model gives."""
    torch.manual_seed(0)
    net, data = Net().eval(), tensors(60)
    with torch.no_grad():
        data.labels = net(data.images.float() / 255).argmax(1)
    gentle = ThreatModel(norm="linf", eps=0.02)
    report = evaluate(net, data, gentle, attacks=("fgsm", "pgd"), batch_size=7, progress=False)
    assert 0 < report.worst_case_accuracy < 1
    shown = report.examples
    assert len(shown.clean) == len(shown.adversarial) == len(shown.labels) == 8
    assert gentle.contains(shown.clean, shown.adversarial).all()
    with torch.no_grad():
        assert torch.equal(net(shown.adversarial).argmax(1), shown.predictions)
        assert torch.equal(net(shown.clean).argmax(1), shown.labels)
    fooled = int((shown.predictions != shown.labels).sum())
    assert fooled >= min(4, sum(report.fooled.values()))
    assert fooled < 8


def test_exhaustive_tries_every_attack_on_every_correct_image():
    """The full matrix: the same worst case, and each attack's own accuracy."""
    net, data = Net().eval(), tensors(40)
    with torch.no_grad():
        data.labels = net(data.images.float() / 255).argmax(1)
    data.labels[:5] = (data.labels[:5] + 1) % 4
    gentle = ThreatModel(norm="linf", eps=0.02)
    names = ("fgsm", "pgd")
    quick = [attack(name, gentle, **({"steps": 5} if name == "pgd" else {})) for name in names]
    short, full = (
        evaluate(net, data, gentle, attacks=quick, exhaustive=flag, progress=False)
        for flag in (False, True)
    )
    assert full.tried == {"fgsm": 35, "pgd": 35}
    assert short.tried["pgd"] == 35 - short.fooled["fgsm"]
    assert short.individual_accuracy["pgd"] is None
    own = evaluate(net, data, gentle, attacks=quick[1:], exhaustive=True, progress=False)
    assert full.individual_accuracy["pgd"] == own.worst_case_accuracy
    assert full.attack_accuracy["fgsm"] == full.individual_accuracy["fgsm"]
    assert full.outcomes["pgd"][:5] == (None,) * 5


def test_nothing_to_attack_is_still_a_report():
    """A model that is always wrong has a worst case of zero and no examples."""
    net, data = Net().eval(), tensors(6)
    with torch.no_grad():
        data.labels = (net(data.images.float() / 255).argmax(1) + 1) % 4
    report = evaluate(net, data, LINF, progress=False)
    assert report.clean_accuracy == report.worst_case_accuracy == 0
    assert report.examples is None


def test_two_attacks_of_one_name_are_told_apart():
    """The second gets a number."""
    pair = [attack("pgd", LINF, steps=n) for n in (1, 2)]
    report = evaluate(Net(), tensors(6), LINF, attacks=pair, progress=False)
    assert list(report.robust) == ["pgd", "pgd #2"]
    assert report.settings["pgd #2"]["steps"] == 2


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda images: images.flatten(1) * float("nan"), "finite logits"),
        (lambda images: images, "logits of shape"),
        (lambda images: images.flatten(1)[:, :1], "at least 2 classes"),
        (lambda images: images.flatten(1)[:, :2], "for a model of 2 classes"),
        (lambda images: {"logits": images}, "dict"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused(answer, word):
    """NaN, wrong shapes, too few classes."""
    with pytest.raises(EvaluationError, match=word):
        evaluate(Answering(answer), tensors(), LINF, progress=False)


GOOD = tensors(4)


@pytest.mark.parametrize(
    ("data", "error", "word"),
    [
        ([], EvaluationError, "at least one image"),
        ([(torch.zeros(1, 8, 8), "cat")], EvaluationError, "integer label"),
        ([("cat.png", 1)], EvaluationError, "expected a tensor, got str"),
        ([(torch.zeros(1, 8, 8), 0.7)], EvaluationError, "integer label, got 0.7"),
        ([(torch.zeros(1, 8, 8), torch.tensor(1.0))], EvaluationError, "integer label"),
        ([(torch.zeros(1, 8, 8), 1, 0)], EvaluationError, "an image and its label"),
        ([torch.zeros(1, 8, 8)], EvaluationError, "an image and its label"),
        ([7], EvaluationError, "an image and its label"),
        ((GOOD.images, GOOD.labels), EvaluationError, "TensorDataset"),
        ([(torch.zeros(8, 8), 1)], EvaluationError, "channels, height, width"),
        ([(torch.zeros(1, 8, k), 1) for k in (8, 9)], EvaluationError, "several shapes"),
        ([(torch.full((1, 8, 8), 2.0), 1)], ThreatModelError, "normalisation"),
        ([(torch.zeros(1, 8, 8), -1)], EvaluationError, "none negative"),
        (
            SimpleNamespace(images=GOOD.images, labels=GOOD.labels[:3]),
            EvaluationError,
            "4 images but 3 labels",
        ),
        (
            SimpleNamespace(images=GOOD.images, labels=GOOD.labels.float()),
            EvaluationError,
            "int64",
        ),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(data, error, word):
    """Each with what was expected."""
    with pytest.raises(error, match=word):
        evaluate(Net(), data, LINF, attacks=FAST, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"attacks": ()}, EvaluationError, "at least one"),
        ({"attacks": "pgd"}, EvaluationError, "sequence"),
        ({"attacks": ["pdg"]}, AttackError, "there are"),
        ({"attacks": [3]}, EvaluationError, "name or a callable"),
        ({"attacks": ["n-fgsm"]}, EvaluationError, "for training"),
        (
            {"attacks": [attack("pgd", ThreatModel(norm="linf", eps=0.2))]},
            EvaluationError,
            "reaches 0.2",
        ),
        ({"attacks": [lambda m, x, y: 1 - x]}, AttackError, "left the ball"),
        ({"attacks": [lambda m, x, y: x[:0]]}, AttackError, "expected images"),
        ({"attacks": [lambda m, x, y: None]}, AttackError, "NoneType"),
        ({"samples": 0}, EvaluationError, "1 to 40"),
        ({"samples": 41}, EvaluationError, "1 to 40"),
        ({"batch_size": 0}, EvaluationError, "batch_size"),
        ({"seed": -1}, EvaluationError, "seed"),
    ],
)
def test_wrong_settings_are_refused(given, error, word):
    """A figure made with them would not mean what it says."""
    with pytest.raises(error, match=word):
        evaluate(Net(), tensors(), LINF, progress=False, **given)


def test_an_attack_of_ones_own_goes_through_the_door():
    """It finds the model in evaluation mode, and what it leaves behind is cleared away."""
    net = disturbed_net()
    before, modes = snapshot(net), []

    def careless(model, images, labels):
        modes.append(model.training)
        model.train()
        images = images.clone().requires_grad_()
        model(images).sum().backward()
        torch.manual_seed(0)
        return (images + 0.1 * images.grad.sign()).clamp(0, 1).detach()

    report = evaluate(net, tensors(), LINF, attacks=[careless], batch_size=8, progress=False)
    assert list(report.robust) == ["careless"]
    assert not any(modes)
    assert_same(before, snapshot(net))


class OneByOne(torch.utils.data.IterableDataset):
    """Images that come one by one, and have no number."""

    def __iter__(self):
        return iter([(GOOD.images[0], 0), (GOOD.images[1], 1)])


def loader(**settings):
    """Twelve images in batches of five."""
    data = tensors(12)
    pairs = torch.utils.data.TensorDataset(data.images, data.labels)
    return torch.utils.data.DataLoader(pairs, batch_size=5, **settings)


def test_loaders_and_arrays_give_the_same_report_too():
    """A loader that keeps the order, numpy's arrays in any layout, labels of any whole dtype."""
    net, data = Net(), tensors(12)
    images, labels = data.images.numpy(), data.labels.numpy()
    flipped = np.ascontiguousarray(images[::-1])[::-1]  # strides below zero
    pairs = [(images[i], labels[i]) for i in range(12)]
    reports = [
        evaluate(net, each, LINF, attacks=FAST, progress=False)
        for each in (
            data,
            loader(),
            loader(collate_fn=torch.utils.data.default_collate),
            SimpleNamespace(images=images, labels=labels.astype(">i4")),
            SimpleNamespace(images=flipped, labels=labels.astype("u1")),
            pairs,
        )
    ]
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_bytes_are_read_in_the_bounds_of_the_threat_model(bounds):
    """0 and 255 are the bounds: the report is that of the same images as floats."""
    net, data = Net(), tensors(20)
    low, width = bounds[0], bounds[1] - bounds[0]
    threat = ThreatModel(norm="linf", eps=0.1 * width, bounds=bounds)
    floats = low + data.images.double() * width / 255
    same = SimpleNamespace(images=floats.float(), labels=data.labels)
    one, other = (
        evaluate(net, each, threat, attacks=FAST, progress=False) for each in (data, same)
    )
    for name in ("predictions", "outcomes", "worst_case_accuracy"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (loader(shuffle=True), "loader.dataset"),
        (loader(drop_last=True), "loader.dataset"),
        (loader(sampler=[3, 1, 2]), "loader.dataset"),
        (torch.utils.data.DataLoader(OneByOne(), batch_size=None), "two tensors"),
        (torch.utils.data.DataLoader(["a", "b"]), "two tensors"),
        (OneByOne(), "only be iterated"),
        (iter([(GOOD.images[0], 0)]), "only be iterated"),
        ({0: (GOOD.images[0], 0)}, "read by index"),
        (GOOD.images, "TensorDataset"),
        ("digits", "read by index"),
        (None, "read by index"),
        (list, "read by index"),
        ([(GOOD.images[0], 0), (GOOD.images[0].float(), 0)], "several shapes or dtypes"),
        ([(GOOD.images[0], 2**70)], "label of a class"),
        ([(torch.zeros(1, 0, 8), 1)], "channels, height, width"),
        ([(np.array(["a"], dtype=object), 1)], "expected numbers"),
        ([(torch.zeros(1, 8, 8, device="meta"), 1)], "meta device"),
        ([(torch.zeros(1, 8, 8).to_sparse(), 1)], "dense"),
        (SimpleNamespace(images=GOOD.images, labels=torch.ones(4, dtype=torch.bool)), "int64"),
        (SimpleNamespace(images=GOOD.images, labels=torch.ones(4, 1).long()), "shape"),
        (SimpleNamespace(images=GOOD.images, labels=torch.tensor(3)), "4 images but 0 labels"),
        (SimpleNamespace(images=GOOD.images, labels=[0, 1, 2, 3]), "read by index"),
    ],
)
def test_data_of_a_foreign_kind_is_refused_with_the_cure(data, word):
    """In one typed error, by evaluation and certification alike."""
    with pytest.raises(EvaluationError, match=word):
        evaluate(Net(), data, LINF, attacks=FAST, progress=False)
    with pytest.raises(EvaluationError, match=word):
        certify(Net(), data, Smoothing(sigma=0.25, samples=10, selection=10), progress=False)


def test_images_that_are_no_images_are_refused():
    """NaN, infinity, whole numbers and complex ones."""
    for images in (
        torch.full((4, 1, 8, 8), float("nan")),
        torch.full((4, 1, 8, 8), float("inf")),
        torch.zeros(4, 1, 8, 8, dtype=torch.int64),
        torch.zeros(4, 1, 8, 8, dtype=torch.complex64),
    ):
        data = SimpleNamespace(images=images, labels=GOOD.labels)
        with pytest.raises(ThreatModelError, match="expected images"):
            evaluate(Net(), data, LINF, attacks=FAST, progress=False)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": "8"}, "batch_size"),
        ({"seed": 1.0}, "seed"),
        ({"samples": 2.0}, "samples"),
        ({"samples": True}, "samples"),
        ({"verdicts": "yes"}, "verdicts"),
        ({"model": "net"}, "Module"),
        ({"threat": "linf"}, "ThreatModel"),
    ],
)
def test_settings_of_another_type_are_refused(given, word):
    """As those out of range are."""
    right = {"model": Net(), "data": tensors(), "threat": LINF, "attacks": FAST}
    with pytest.raises(DefenseError, match=word):
        evaluate(**right | given, progress=False)


class Brightened(torch.utils.data.Dataset):
    """Its tensors are not its examples: an image is what `__getitem__` makes of them."""

    def __init__(self, data):
        self.images, self.labels = data.images.float() / 255, data.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return (self.images[index] + 0.25).clamp(0, 1), int(self.labels[index])


class Declared(Brightened):
    """Says that its tensors are its examples, and they are."""

    batch_by_indices = True

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class Overridden(Declared):
    """Inherits the word, and changes the examples."""

    def __getitem__(self, index):
        return Brightened.__getitem__(self, index)


@pytest.mark.parametrize(
    ("kind", "brighter"), [(Brightened, True), (Declared, False), (Overridden, True)]
)
def test_what_a_data_set_does_to_its_images_counts(kind, brighter):
    """Tensors that it holds besides are its own affair, unless its class declares them."""
    data = kind(GOOD)
    found = ImageSource(data, LINF).images(torch.arange(4))
    wanted = (data.images + 0.25).clamp(0, 1) if brighter else data.images
    assert torch.equal(found, wanted[:4])
