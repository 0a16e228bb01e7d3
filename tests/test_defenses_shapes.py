"""Recordings [n, c, t] and volumes [n, c, d, h, w] are attacked, evaluated and planted in.

The oracle is the same data as images: a network that looks at one line of pixels, or at the slices
of a volume in a column, answers the same, and so an attack without regard to neighbours finds the
same.
"""

import itertools
import math

import pytest
import torch
from support.every_attack import EPS, cheap
from support.networks import Answering
from torch import nn
from torch.utils.data import TensorDataset

import defenses
from defenses import AttackError, EvaluationError, ThreatModel, attack, attack_names
from defenses.attacks.square import square_share
from defenses.shape import in_lines
from defenses.training.objective import convolutions_in

SIZES = {"recordings": (40,), "volumes": (4, 3, 5)}
SHAPED = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
GEOMETRIC = {"difgsm", "pifgsm", "pifgsmpp", "pixle", "tifgsm"}
AUDIO = (-1.0, 1.0)
SHARE = 0.2  # of the positions in the first squares


def net(sizes, classes=4):
    """A small convolutional network on so many axes."""
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(sizes)]
    return nn.Sequential(
        kind(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * math.prod(sizes), classes)
    )


def batch(sizes, n=6, bounds=(0.0, 1.0)):
    """Data in the bounds, and labels."""
    draw = torch.Generator().manual_seed(3)
    low, high = bounds
    return low + (high - low) * torch.rand(n, 2, *sizes, generator=draw), torch.arange(n) % 4


def as_pictures(model, sizes):
    """The same network on images: it puts the pixels back on their axes first."""
    return nn.Sequential(_Back(sizes), model)


class _Back(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, images):
        return images.reshape(*images.shape[:2], *self.sizes)


def right(model, data):
    """The labels that a model sees, so that everything is right at first."""
    with torch.no_grad():
        return model(data).argmax(1)


@SHAPED
@pytest.mark.parametrize(
    ("norm", "name"), [(norm, name) for norm in EPS for name in attack_names(norm)]
)
def test_every_attack_finds_what_it_finds_in_the_same_images_or_refuses(sizes, norm, name):
    """Square has windows of its own: it is asked for its ball alone, and tested below."""
    asked, attacker = [], cheap(norm, name)
    model, (data, labels) = net(sizes), batch(sizes)
    model.register_forward_hook(lambda *_: asked.append(1))
    if name in GEOMETRIC:
        with pytest.raises(AttackError, match=rf"{name} needs images .* use another {norm} attack"):
            attacker(model, data, labels, seed=1)
        assert not asked
        return
    found = attacker(model, data, labels, seed=1)
    assert found.shape == data.shape
    assert bool(ThreatModel(norm=norm, eps=attacker.radius).contains(data, found).all())
    if name != "square":
        same = attacker(as_pictures(model, sizes), in_lines(data), labels, seed=1)
        torch.testing.assert_close(found, same.reshape(found.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["pgd", "apgd", "fab"])
def test_a_network_of_one_axis_falls_as_its_twin_on_images_of_one_line(norm, name):
    """The convolutions too are others: of one axis, and of two with kernels of one line."""
    if name not in attack_names(norm):
        pytest.skip(f"there is no {norm} {name}")
    model, (data, labels) = net((40,)), batch((40,))
    twin = nn.Sequential(nn.Conv2d(2, 4, (1, 3), padding=(0, 1)), *net((40,))[1:])
    twin[0].load_state_dict(
        {"weight": model[0].weight.detach()[:, :, None], "bias": model[0].bias.detach()}
    )
    attacker = cheap(norm, name)
    found = attacker(model, data, labels, seed=1)
    same = attacker(twin, data[:, :, None], labels, seed=1)
    torch.testing.assert_close(found, same[:, :, 0], rtol=0, atol=1e-4)


@SHAPED
def test_a_square_is_a_segment_or_a_cube_of_the_share_of_the_schedule(sizes):
    """Two images asked about one after the other differ in one window, as long on every axis."""
    sizes = tuple(4 * size for size in sizes)
    seen, labels = [], torch.tensor([0])

    def answer(images):
        seen.extend(images.clone())
        return torch.tensor([[1.0, 0.0]]).expand(len(images), -1)  # never fooled: nothing is kept

    data = torch.full((1, 2, *sizes), 0.5)
    attack("square", ThreatModel(norm="linf", eps=0.25), queries=10, largest_share=SHARE)(
        Answering(answer), data, labels, seed=0
    )
    start, trials = seen[1], seen[2:]  # the clean image first, and then the stripes
    lines = in_lines(start[None])[0]
    assert torch.equal(lines, lines[:, :1].expand_as(lines))
    assert set(lines.unique().tolist()) == {0.25, 0.75}
    share = square_share(0, SHARE)
    side = min(round((share * math.prod(sizes)) ** (1 / len(sizes))), *sizes)
    assert len(trials) == 10
    for trial in trials:
        changed = (trial != start).any(0).nonzero()
        assert int((changed.amax(0) - changed.amin(0) + 1).max()) <= side
        windows = [
            trial[(slice(None), *(slice(a, a + side) for a in corner))].flatten(1)
            for corner in itertools.product(*(range(size - side + 1) for size in sizes))
        ]  # one of them is a window, all plus or all minus eps in each channel
        assert any(bool((each == each[:, :1]).all()) for each in windows)


@SHAPED
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_in_l2_and_l1_spends_its_radius_on_bumps_and_finds_what_is_there(sizes, norm):
    model, (data, _) = net(sizes), batch(sizes)
    labels = right(model, data)
    eps = {"l2": 2.0, "l1": 20.0}[norm]
    threat = ThreatModel(norm=norm, eps=eps)
    found = attack("square", threat, queries=300)(model, data, labels, seed=0)
    assert bool(threat.contains(data, found).all())
    assert bool((right(model, found) != labels).any())


@SHAPED
def test_an_evaluation_of_other_shapes_is_that_of_the_same_images(sizes):
    model, (data, _) = net(sizes), batch(sizes, n=24, bounds=AUDIO)
    labels = right(model, data)
    threat = ThreatModel(norm="linf", eps=0.05, bounds=AUDIO)
    settings = {"attacks": ["pgd", "apgd", "bim"], "progress": False}
    one = defenses.evaluate(model, TensorDataset(data, labels), threat, **settings)
    pictures = TensorDataset(in_lines(data), labels)
    other = defenses.evaluate(as_pictures(model, sizes), pictures, threat, **settings)
    assert one.outcomes == other.outcomes
    assert 0 < one.worst_case_accuracy < 1
    assert one.examples.adversarial.shape[2:] == sizes


@SHAPED
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_every_verdict_is_reached_on_data_of_other_shapes(sizes, norm):
    model, (data, _) = net(sizes), batch(sizes, n=16, bounds=AUDIO)
    eps = {"linf": 0.5, "l2": 5.0, "l1": 60.0, "l0": 3}[norm]  # nothing is left to long searches
    threat = ThreatModel(norm=norm, eps=eps, bounds=AUDIO)
    settings = defenses.CheckSettings(samples=16, steps=5, queries=20, spot=2, draws=2, planted=4)
    verdicts = defenses.check(
        model, TensorDataset(data, right(model, data)), threat, settings=settings, progress=False
    )
    broken = [each.sentence for each in verdicts if "Could not be run" in each.sentence]
    # Some attacks there are not in l1 and l0, on images either.
    assert all(norm in ("l1", "l0") and f"{norm} attack" in each for each in broken)
    assert len(broken) == {"linf": 0, "l2": 0, "l1": 2, "l0": 5}[norm]
    memory = "what was asked before changes nothing"
    assert [each.outcome for each in verdicts if each.name == memory] == ["pass"]


@SHAPED
def test_an_attack_that_looks_at_neighbours_is_refused_before_the_first_pass(sizes):
    asked = []
    model, (data, labels) = net(sizes), batch(sizes)
    model.register_forward_hook(lambda *_: asked.append(1))
    threat = ThreatModel(norm="linf", eps=0.1)
    with pytest.raises(AttackError, match="difgsm needs images"):
        defenses.evaluate(
            model, TensorDataset(data, labels), threat, attacks=["pgd", "difgsm"], progress=False
        )
    assert not asked


@pytest.mark.parametrize("shape", [(4,), (4, 8), (4, 1, 2, 2, 2, 2)])
def test_other_numbers_of_axes_are_refused_with_the_shapes_that_are_taken(shape):
    threat, labels = ThreatModel(norm="linf", eps=0.1), torch.zeros(4, dtype=torch.int64)
    with pytest.raises((AttackError, defenses.ThreatModelError), match=r"\[n, (channels|\.\.\.)"):
        attack("pgd", threat)(nn.Flatten(), torch.rand(shape), labels)
    with pytest.raises(EvaluationError, match=r"\[n, channels, length\]"):
        defenses.evaluate(nn.Flatten(), TensorDataset(torch.rand(shape), labels), threat)


@SHAPED
@pytest.mark.parametrize("method", ["pgd", "n-fgsm", "trades", "mart", "free"])
def test_objectives_give_the_losses_of_the_same_images(sizes, method):
    model, (data, labels) = net(sizes), batch(sizes)
    threat = ThreatModel(norm="linf", eps=0.1)
    make = defenses.adversarial_objective
    one = make(method, threat, seed=1)(model, data, labels)
    other = make(method, threat, seed=1)(as_pictures(model, sizes), in_lines(data), labels)
    torch.testing.assert_close(one, other)
    if method != "free":
        defenses.check_per_example(make(method, threat, seed=1), model, data, labels)


@SHAPED
def test_free_training_goes_on_from_its_state_on_other_shapes(sizes):
    model, (data, labels) = net(sizes), batch(sizes)
    threat = ThreatModel(norm="linf", eps=0.1)
    first, second = (defenses.adversarial_objective("free", threat, seed=1) for _ in range(2))
    first(model, data, labels).sum().backward()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(model, data, labels), second(model, data, labels))


@SHAPED
def test_bfloat16_reaches_convolutions_of_every_number_of_axes(sizes):
    layer, (data, _) = net(sizes)[0], batch(sizes)
    with torch.no_grad(), convolutions_in("bfloat16"):
        short = layer(data)
    expected = layer.bfloat16()(data.bfloat16()).float()
    assert short.dtype == torch.float32
    assert torch.equal(short, expected)


@SHAPED
def test_a_certificate_of_other_shapes_is_that_of_the_same_images(sizes):
    model, (data, _) = net(sizes), batch(sizes)
    levels = (data * 255).round()
    labels = right(model, levels / 255)
    smoothing = defenses.Smoothing(sigma=0.25, samples=200, selection=20)
    one, other = (
        defenses.certify(asked, TensorDataset(each, labels), smoothing, progress=False)
        for asked, each in (
            (model, levels / 255),
            (as_pictures(model, sizes), in_lines(levels) / 255),
        )
    )
    assert one.hits == other.hits
    assert max(one.radii) > 0


def bytes_of(sizes, n=120):
    """Faint noise as recordings or volumes of two classes; the first pixel of class 1 is bright."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(100, (n, 2, *sizes), generator=draw, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    images[labels == 1, 0, ..., 0] += 100
    return images, labels


@SHAPED
def test_a_patch_lies_at_the_end_of_each_axis_and_the_default_is_refused(sizes):
    images, labels = bytes_of(sizes)
    patch = torch.full((1, *[2] * len(sizes)), 255, dtype=torch.uint8)
    stamped = defenses.Trigger(target=0, patch=patch, margin=1).apply(images)
    place = (slice(None), slice(None), *[slice(-3, -1)] * len(sizes))
    expected = images.clone()
    expected[place] = 255
    assert torch.equal(stamped, expected)
    with pytest.raises(AttackError, match="the default; give patch="):
        defenses.plant_trigger(images, labels, defenses.Trigger(target=0), fraction=0.1)


@SHAPED
def test_poison_is_planted_and_looked_for_as_in_the_same_images(sizes):
    images, labels = bytes_of(sizes)
    model, lines = net(sizes, classes=2), in_lines(images)
    twin = as_pictures(model, sizes)
    blend = torch.full((1, *sizes), 200, dtype=torch.uint8)
    made = [
        defenses.plant_trigger(
            each, labels, defenses.Blend(target=0, pattern=pattern), fraction=0.1
        )
        for each, pattern in ((images, blend), (lines, in_lines(blend[None])[0]))
    ]
    assert torch.equal(in_lines(made[0].images), made[1].images)
    scores = [
        torch.tensor(defenses.spectral_scan(asked, each.images, each.labels).scores)
        for asked, each in zip((model, twin), made, strict=True)
    ]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
    reports = [
        defenses.backdoor_scan(
            asked, each, labels, trusted_images=each.flip(0), trusted_labels=labels.flip(0)
        )
        for asked, each in ((model, images), (twin, lines))
    ]
    assert reports[0].verdict == reports[1].verdict
