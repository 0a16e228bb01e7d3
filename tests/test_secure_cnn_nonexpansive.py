"""The model `nonexpansive`: its constant is a bound, not a vast one, and certifies its answers."""

import json

import pytest
import torch
from torch import nn

import defenses
from secure_cnn import (
    Architecture,
    DataSpec,
    build_model,
    lipschitz_bound,
    load_data,
    write_model,
)
from secure_cnn.nonexpansive import LipschitzBound
from secure_cnn.scattering import Scattering


def steepest(scattering, image):
    """How fast features move at an image in the direction in which they move fastest."""
    rates = torch.autograd.functional.jacobian(scattering, image)
    return float(torch.linalg.matrix_norm(rates.flatten(0, 3).flatten(1), 2))


@pytest.mark.parametrize("size", [(8, 8), (12, 9)])
def test_features_move_no_faster_than_the_constant_and_at_times_half_as_fast(size):
    """At noise, at edges and on a plain, where moduli of nothing would have no slope."""
    scattering = Scattering(*size)
    constant, generator = scattering.lipschitz_constant(), torch.Generator().manual_seed(1)
    scattering.double()
    noise = torch.rand(1, 1, *size, generator=generator, dtype=torch.float64)
    fastest = [steepest(scattering, each) for each in (noise, noise.round(), 0.5 + noise / 50)]
    assert max(fastest) <= constant
    assert max(fastest) >= 0.45 * constant
    assert constant < 1


def test_the_constant_is_that_of_the_filters():
    """Filters that were made steeper have another constant; colours are features of their own."""
    scattering = Scattering(8, 8)
    before = scattering.lipschitz_constant()
    scattering.low.mul_(2)
    assert scattering.lipschitz_constant() == pytest.approx(2 * before, rel=1e-6)
    colours = build_model("nonexpansive", DataSpec(shape=(3, 8, 8), classes=("a", "b")))
    assert lipschitz_bound(colours).constant == before


def test_a_model_that_is_not_as_it_was_built_has_no_bound():
    """A layer replaced, added or hooked; another model."""
    spec = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
    model = build_model("nonexpansive", spec)
    assert isinstance(lipschitz_bound(model), LipschitzBound)
    others = [build_model("scattering", spec), nn.Sequential(*model, nn.ReLU()), model.head]
    hooked = build_model("nonexpansive", spec)
    hooked.scattering.register_forward_hook(lambda *_: None)
    replaced = build_model("nonexpansive", spec)
    replaced.flatten.forward = lambda images: 2 * images.flatten(1)
    assert [lipschitz_bound(each) for each in (*others, hooked, replaced)] == [None] * 5


def test_no_attack_finds_what_is_certified():
    """A trained head on digits: PGD in l2 against its certified accuracy, and where that ends."""
    data = load_data("digits")
    model = build_model("nonexpansive", data.spec)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with torch.no_grad():
        features = model[:3](images)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(features), labels).backward()
        optimizer.step()
    bound = lipschitz_bound(model)
    test = data.test.first(50)
    report = defenses.certify_lipschitz(model, test, head=bound.head, constant=bound.constant)
    threat = defenses.ThreatModel(norm="l2", eps=0.1)
    found = defenses.evaluate(model, test, threat, attacks=["pgd"], verdicts=False, progress=False)
    assert report.certified(0.0).accuracy > 0.8
    assert 0.1 < report.certified(0.1).accuracy <= found.worst_case_accuracy
    assert report.certified(1.0).accuracy < report.certified(0.1).accuracy


def test_the_command_prints_what_is_proven(cli, tmp_path):
    """Of a file with such a model, in a table and in the JSON; of another model nothing."""
    data, out = load_data("digits"), tmp_path / "figures.json"
    for name in ("nonexpansive", "scattering"):
        architecture = Architecture.for_data(name, data.spec)
        path = tmp_path / f"{name}.safetensors"
        write_model(path, architecture.build(), architecture, claims={}, sealing=None)
        code, printed, _ = cli("evaluate", path, "--data", "digits", "--json", out)
        proven = json.loads(out.read_text())["lipschitz"]
        assert code == 0
        assert ("proven by the Lipschitz constant" in printed) == (name == "nonexpansive")
        assert (proven is not None) == (name == "nonexpansive")
