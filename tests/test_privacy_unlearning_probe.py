"""The linear probe: a class that the last layer hides is found in the layer before."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.forgetting import WIDTH, Net
from torch import Tensor, nn

from privacy.errors import UnlearningError
from privacy.unlearning import features_before_last, linear_probe, oracle_gap, probe_gap

Part = tuple[Tensor, Tensor]
HIDDEN = 2
"""The class that is forgotten."""


def drawn(count: int, seed: int) -> Part:
    """Two classes by one number; the third where two others have the same sign."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(count, WIDTH, generator=random)
    labels = (images[:, 0] > 0).long()
    return images, torch.where(images[:, 4] * images[:, 5] > 0, HIDDEN, labels)


def without(part: Part) -> Part:
    kept = part[1] != HIDDEN
    return part[0][kept], part[1][kept]


def of_class(part: Part) -> Part:
    kept = part[1] == HIDDEN
    return part[0][kept], part[1][kept]


def fitted(part: Part, seed: int) -> Net:
    """With a strong decay, so that what is not needed is not kept."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = Net(hidden=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    for _ in range(250):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(part[0]), part[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


TRAIN, TEST = drawn(600, 1), drawn(600, 2)


@pytest.fixture(scope="module")
def oracles() -> list[Net]:
    return [fitted(without(TRAIN), seed) for seed in range(1, 6)]


@pytest.fixture(scope="module")
def hiding() -> Net:
    """Trained with the class; its last layer never says it."""
    model = copy.deepcopy(fitted(TRAIN, 0))
    with torch.no_grad():
        model[2].bias[HIDDEN] = -1e4
    return model


def test_a_class_that_the_last_layer_hides_fails_the_probe(hiding: Net, oracles: list[Net]) -> None:
    """It answers nobody of the class right, as oracles do; its features tell the class."""
    answered = oracle_gap(
        hiding,
        oracles,
        forget=[of_class(TRAIN)],
        retain=[without(TRAIN)],
        test=[without(TEST)],
        margin=10.0,
    )
    assert answered.forget.verdict == "equivalent"
    assert answered.verdict != "differs"
    found = probe_gap(
        features_before_last(hiding),
        [features_before_last(each) for each in oracles],
        fitted=[TRAIN],
        asked=[TEST],
        forgotten=HIDDEN,
        margin=5.0,
    )
    assert found.verdict == "differs"
    assert found.points > 20


def test_a_training_with_another_seed_passes_the_probe(oracles: list[Net]) -> None:
    """Control: nothing is found in one more oracle that is not in the others."""
    one_more = features_before_last(fitted(without(TRAIN), 77))
    found = probe_gap(
        one_more,
        [features_before_last(each) for each in oracles],
        fitted=[TRAIN],
        asked=[TEST],
        forgotten=HIDDEN,
        margin=5.0,
    )
    assert found.verdict != "differs"


def test_the_probe_is_linear_and_weighs_both_sides_alike() -> None:
    """Against least squares by torch; a class that no line tells is not told."""
    images, labels = drawn(300, 5)
    rare = torch.cat([torch.arange(270), torch.nonzero(labels == HIDDEN)[:3, 0]])
    part = (images[rare], labels[rare])

    def own(given: Tensor) -> Tensor:
        return given

    assert abs(linear_probe(own, fitted=[part], asked=[TEST], forgotten=HIDDEN) - 0.5) < 0.1
    told = linear_probe(lambda x: x[:, 4:5] * x[:, 5:], fitted=[part], asked=[TEST], forgotten=2)
    assert told == 1.0
    chosen = labels == 0
    heavy = torch.where(chosen, 0.5 / chosen.sum(), 0.5 / (~chosen).sum()).double().sqrt()[:, None]
    design = torch.cat([images, torch.ones(300, 1)], 1).double() * heavy
    target = torch.where(chosen, 1.0, -1.0).double()[:, None] * heavy
    weights = torch.linalg.lstsq(design, target).solution[:-1, 0]
    scores = TEST[0].double() @ weights
    mine, others = scores[TEST[1] == 0], scores[TEST[1] != 0]
    area = float((mine[:, None] > others[None]).double().mean())
    found = linear_probe(own, fitted=[(images, labels)], asked=[TEST], forgotten=0)
    assert found == pytest.approx(area, abs=5e-3)


def test_features_are_what_the_last_linear_layer_is_given() -> None:
    model = Net().train()
    images = torch.randn(4, WIDTH)
    assert torch.equal(features_before_last(model)(images), model.features(images))
    linear_probe(features_before_last(model), fitted=[TRAIN], asked=[TEST], forgotten=HIDDEN)
    assert all(module.training for module in model.modules())
    assert not model[2]._forward_pre_hooks


def test_the_probe_refuses_by_name() -> None:
    good: dict[str, Any] = {"fitted": [TRAIN], "asked": [TEST], "forgotten": HIDDEN}

    def own(given: Tensor) -> Tensor:
        return given

    for changed, told in [
        ({"fitted": [without(TRAIN)]}, "fitted: expected some of class 2"),
        ({"asked": [of_class(TEST)]}, "asked: expected some of class 2"),
        ({"forgotten": -1}, "forgotten: expected"),
        ({"asked": []}, "asked: expected at least one"),
    ]:
        with pytest.raises(UnlearningError, match=told):
            linear_probe(own, **{**good, **changed})
    with pytest.raises(UnlearningError, match="a row for each"):
        linear_probe(lambda images: images.sum(), **good)
    with pytest.raises(UnlearningError, match="finite"):
        linear_probe(lambda images: images * np.inf, **good)
    with pytest.raises(UnlearningError, match="last layer is linear"):
        features_before_last(nn.Sequential(nn.ReLU()))
