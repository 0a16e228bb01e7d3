"""The oracle gap and its controls: what forgot nothing, and what only looks as if it had."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.forgetting import Net, Problem, accuracy, problem, trained
from torch import Tensor, nn

from privacy.errors import UnlearningError
from privacy.statistics import clopper_pearson
from privacy.unlearning import Difference, OracleGap, oracle_gap, relearning_time

ORACLES = 4
MARGIN = 8.0


@pytest.fixture(scope="module")
def parts() -> Problem:
    """A hundred people leave, half of whom are known by memory alone."""
    return problem(forgotten=100, stayed=300)


@pytest.fixture(scope="module")
def model(parts: Problem) -> Net:
    return trained([parts.retain, parts.forget], seed=0, steps=200)


@pytest.fixture(scope="module")
def oracles(parts: Problem) -> list[Net]:
    return [trained([parts.retain], seed=1 + seed) for seed in range(ORACLES)]


def gap(model: Any, oracles: list[Net], parts: Problem, **changed: Any) -> OracleGap:
    given = {name: [getattr(parts, name)] for name in ("forget", "retain", "test")}
    return oracle_gap(model, oracles, **{**given, "margin": MARGIN, **changed})


def test_the_identity_fails(model: Net, oracles: list[Net], parts: Problem) -> None:
    """Who left is still known: under-unlearning, though who stays is answered as by oracles."""
    found = gap(model, oracles, parts)
    assert found.verdict == "differs"
    assert found.direction == "under-unlearning"
    assert found.forget.points > 20
    assert found.retain.verdict == "equivalent"


def test_a_training_with_another_seed_passes(oracles: list[Net], parts: Problem) -> None:
    """One more oracle is equivalent to the others."""
    found = gap(trained([parts.retain], seed=99), oracles, parts)
    assert found.verdict == "equivalent"
    assert found.direction == "cannot tell"
    assert found.average_gap < 3
    low, high = found.average_gap_interval
    assert low <= found.average_gap <= high


def test_flipping_the_forgotten_labels_fails(oracles: list[Net], parts: Problem) -> None:
    """Answers wrong on who left and on nobody else: over-unlearning, which is not success."""

    def flipped(images: Tensor) -> Tensor:
        logits = oracles[0](images)
        known = (images[:, None] == parts.forget[0][None]).all(2)
        labels = parts.forget[1][known.float().argmax(1)]
        answers = nn.functional.one_hot((labels + 1) % logits.shape[1], logits.shape[1])
        return torch.where(known.any(1)[:, None], 9.0 * answers, logits)

    found = gap(flipped, oracles, parts)
    assert found.forget.unlearned == 0
    assert found.verdict == "differs"
    assert found.direction == "over-unlearning"
    assert found.forget.points < -20
    assert found.test.verdict == "equivalent"


def test_its_figures_are_accuracies(model: Net, oracles: list[Net], parts: Problem) -> None:
    """Against accuracies taken by hand; the average is of absolute differences, in points."""
    found = gap(model.train(), oracles, parts)
    assert model.training
    model.eval()
    points = []
    for name, each in found.parts.items():
        part = getattr(parts, name)
        assert each.unlearned == pytest.approx(accuracy(model, part), abs=1e-6)
        assert each.oracles == pytest.approx([accuracy(o, part) for o in oracles], abs=1e-6)
        points.append(100 * (each.unlearned - np.mean(each.oracles)))
        assert each.points == pytest.approx(points[-1])
        assert each.examples == len(part[1])
    assert found.average_gap == pytest.approx(np.mean(np.abs(points)))
    assert "average gap" in str(found)
    assert "differs" in str(found)


def drawn(count: int, random: np.random.Generator, shift: float) -> list[Difference]:
    """Figures of oracles and of one model, normal, with a shift in points."""
    figures = random.normal(0.5, 0.01, (count, ORACLES + 1))
    return [
        Difference(
            unlearned=row[0] + shift / 100,
            oracles=tuple(row[1:].tolist()),
            examples=10**9,
            margin=3.0,
        )
        for row in figures
    ]


def test_the_p_value_of_one_more_oracle_is_uniform() -> None:
    """By Kolmogorov and Smirnov; wrong by chance with 1e-5. Control: half a deviation away."""
    random = np.random.default_rng(3)
    even = [each.p_value for each in drawn(3000, random, 0.0)]
    assert stats.kstest(even, "uniform").pvalue > 1e-5
    away = [each.p_value for each in drawn(3000, random, 1.0)]
    assert stats.kstest(away, "uniform").pvalue < 1e-5


def test_verdicts_are_wrong_as_seldom_as_they_say() -> None:
    """At the margin itself: equivalent in at most 5 %, differs in at most 2.5 %."""
    random = np.random.default_rng(4)
    found = [each.verdict for each in drawn(4000, random, 3.0)]
    low, high = clopper_pearson(found.count("equivalent"), 4000, error=1e-5)
    assert low <= 0.05 <= high
    assert clopper_pearson(found.count("differs"), 4000, error=1e-5)[0] <= 0.025
    assert drawn(1, random, 30.0)[0].verdict == "differs"
    near = [each.verdict for each in drawn(400, random, 0.0)]
    assert near.count("equivalent") > 40
    assert near.count("differs") == 0


def test_the_interval_holds_one_more_oracle() -> None:
    """In 95 of 100, and the p-value is where the interval ends."""
    random = np.random.default_rng(5)
    found = drawn(4000, random, 0.0)
    inside = sum(each.interval[0] <= 0 <= each.interval[1] for each in found)
    low, high = clopper_pearson(inside, 4000, error=1e-5)
    assert low <= 0.95 <= high
    for each in found[:50]:
        assert (each.p_value < 0.05) == (not each.interval[0] <= 0 <= each.interval[1])


def test_oracles_that_agree_by_chance_are_not_certain() -> None:
    """Of 20 examples two equal figures say little: no margin of 5 points can be told."""
    few = Difference(unlearned=0.9, oracles=(0.9, 0.9), examples=20, margin=5.0)
    assert few.verdict == "cannot tell"
    many = Difference(unlearned=0.9, oracles=(0.9, 0.9), examples=100_000, margin=5.0)
    assert many.verdict == "equivalent"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unlearned", 1.1),
        ("unlearned", math.nan),
        ("oracles", (0.5,)),
        ("oracles", [0.5, 0.6]),
        ("oracles", (0.5, -0.1)),
        ("examples", 0),
        ("margin", 0),
        ("margin", "5"),
        ("error", 1.0),
    ],
)
def test_figures_out_of_range_are_refused(name: str, value: Any) -> None:
    good: dict[str, Any] = {"unlearned": 0.5, "oracles": (0.5, 0.6), "examples": 9, "margin": 1.0}
    with pytest.raises(UnlearningError, match=f"^{name}: expected"):
        Difference(**{**good, name: value})


def test_arguments_are_told_by_name(model: Net, oracles: list[Net], parts: Problem) -> None:
    for changed, told in [
        ({"forget": []}, "forget: expected at least one"),
        ({"retain": 3}, "retain: expected a map-style"),
        ({"test": [(parts.test[0], parts.test[1] + 3)]}, "labels: expected 0 to 2"),
        ({"margin": -1}, "margin: expected"),
    ]:
        with pytest.raises(UnlearningError, match=told):
            gap(model, oracles, parts, **changed)
    with pytest.raises(UnlearningError, match="at least 2 models"):
        gap(model, oracles[:1], parts)
    with pytest.raises(UnlearningError, match="a module or a function"):
        gap("model", oracles, parts)
    with pytest.raises(UnlearningError, match="finite logits"):
        gap(lambda images: torch.full((len(images), 3), torch.nan), oracles, parts)


def test_what_was_only_covered_is_known_again_sooner(
    model: Net, oracles: list[Net], parts: Problem
) -> None:
    """One class is covered by a bias: it comes back at once; an oracle has to learn by heart."""
    covered = copy.deepcopy(model)
    with torch.no_grad():
        covered[2].bias[0] += 8.0
    before = [each.clone() for each in (*covered.parameters(), *oracles[0].parameters())]
    known = accuracy(model, parts.forget) - 0.02
    assert accuracy(covered, parts.forget) < known - 0.1
    settings: dict[str, Any] = {"forget": [parts.forget], "accuracy": known, "most": 60}
    found = relearning_time(covered, oracles[:2], learning_rate=0.1, **settings)
    assert found.faster
    assert found.ratio < 0.5
    after = [*covered.parameters(), *oracles[0].parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    whole = relearning_time(model, oracles[:1], **settings)
    assert whole.unlearned == 0
    again = relearning_time(oracles[2], oracles[:2], learning_rate=0.1, **settings)
    assert not again.faster  # control: an oracle is no sooner there than oracles


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 0),
        ("accuracy", 1.1),
        ("learning_rate", 0),
        ("batch_size", 0),
        ("most", 0),
        ("seed", -1),
        ("forget", []),
    ],
)
def test_relearning_refuses_by_name(model: Net, parts: Problem, name: str, value: Any) -> None:
    good: dict[str, Any] = {"forget": [parts.forget], "accuracy": 0.9}
    with pytest.raises(UnlearningError, match=f"^{name}: expected"):
        relearning_time(model, [model], **{**good, name: value})
    with pytest.raises(UnlearningError, match="Module"):
        relearning_time(lambda images: images, [model], **good)  # type: ignore[arg-type]
