"""U-LiRA: even where all models are alike, and finds the few who are told."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.forgetting import Net

from privacy.errors import UnlearningError
from privacy.leakage import confidence
from privacy.unlearning import margins, unlearning_lira

Numbers = np.ndarray


def alike(models: int, examples: int, seed: int) -> Numbers:
    """Margins of models that differ by chance alone, each example with a law of its own."""
    random = np.random.default_rng(seed)
    middle, spread = random.normal(2, 3, examples), random.uniform(0.5, 2, examples)
    found: Numbers = middle + spread * random.normal(size=(models, examples))
    return found


def test_against_one_pair_after_the_other() -> None:
    """Laws by scipy, of all models but the two that are judged."""
    table = alike(11, 7, 0)
    forgot, never = table[:5] + 0.7, table[5:]
    found = unlearning_lira(forgot, never, permutations=1)
    for example in range(7):
        areas, rights = [], []
        for i in range(5):
            for j in range(6):
                mine, others = np.delete(forgot, i, 0), np.delete(never, j, 0)
                laws = [
                    stats.norm(side[:, example].mean(), side[:, example].std(ddof=1))
                    for side in (mine, others)
                ]
                ratios = [
                    laws[0].logpdf(x) - laws[1].logpdf(x)
                    for x in (forgot[i, example], never[j, example])
                ]
                areas.append(ratios[0] > ratios[1])
                rights += [ratios[0] > 0, ratios[1] < 0]
        assert found.areas[example] == pytest.approx(np.mean(areas))
        assert found.accuracies[example] == pytest.approx(np.mean(rights))
    assert found.models == (5, 6)


def test_where_all_are_alike_a_coin_tells_as_much() -> None:
    """Mean area and accuracy are 1/2 within five deviations; the p-values say nothing."""
    table = alike(24, 1500, 1)
    found = unlearning_lira(table[:12], table[12:], permutations=19)
    assert abs(found.mean_area - 0.5) < 5 * found.areas.std() / np.sqrt(1500)
    assert abs(found.mean_accuracy - 0.5) < 5 * found.accuracies.std() / np.sqrt(1500)
    assert found.worst_area > 0.7  # chosen by its own figure: chance
    assert abs(found.worst_area - found.worst_by_chance) < 0.05
    assert found.mean_p_value > 0.05
    assert found.worst_p_value >= 0.05


def test_with_one_left_out_at_a_time_a_coin_would_tell_more() -> None:
    """Control of why a pair is left out: laws that lack the judged model alone point away."""
    table = alike(8, 3000, 2)
    right = []
    for row in range(4):
        rest = np.delete(table[:4], row, 0)
        own = stats.norm.logpdf(table[row], rest.mean(0), rest.std(0, ddof=1))
        other = stats.norm.logpdf(table[row], table[4:].mean(0), table[4:].std(0, ddof=1))
        right.append((own > other).mean())
    assert np.mean(right) < 0.48


@pytest.mark.parametrize("kind", ["more", "less", "wider"])
def test_a_few_who_are_told_are_found(kind: str) -> None:
    """Three of 300: known better, answered worse than by oracles, or less evenly."""
    table = alike(20, 300, 3)
    forgot, never = table[:10].copy(), table[10:]
    told = [7, 70, 170]
    middle = never[:, told].mean(0)
    if kind == "wider":
        forgot[:, told] = middle + 30 * (forgot[:, told] - forgot[:, told].mean(0))
    else:
        forgot[:, told] += {"more": 12.0, "less": -12.0}[kind]
    found = unlearning_lira(forgot, never)
    assert set(told) <= set(found.worst[:8].tolist())
    assert found.areas[told].min() > 0.8
    assert found.mean_area < 0.55  # which the mean hides
    if kind != "wider":
        assert found.worst_p_value <= 0.05


def test_everybody_told_is_told_by_the_mean() -> None:
    table = alike(16, 100, 4)
    found = unlearning_lira(table[:8] + 4.0, table[8:])
    assert found.mean_area > 0.85
    assert found.mean_p_value == found.worst_p_value == 0.01
    assert found.worst_accuracy >= found.mean_accuracy > 0.7


def test_an_example_that_all_models_answer_alike_is_no_certainty() -> None:
    """A constant column is a coin's; and so is a table of nothing but constants."""
    table = alike(12, 20, 5)
    table[:, 0] = 3.0
    assert unlearning_lira(table[:6], table[6:], permutations=1).areas[0] == 0.5
    flat = np.ones((4, 3))
    assert unlearning_lira(flat, flat, permutations=1).mean_area == 0.5


def test_margins_of_one_model_without_a_list_are_told_so() -> None:
    with pytest.raises(UnlearningError, match=r"models: .* at least 1 model, .* put it in a list"):
        margins(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))])  # type: ignore[arg-type]


def test_margins_are_the_log_odds_of_each_models_own_class() -> None:
    images, labels = torch.randn(9, 6), torch.arange(9) % 3
    models = [Net(), Net()]
    found = margins(models, [(images, labels)])
    with torch.no_grad():
        expected = np.stack([confidence(model(images), labels) for model in models])
    assert found.shape == (2, 9)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"unlearned": np.zeros((3, 5))}, "unlearned: expected finite margins"),
        ({"unlearned": np.zeros(5)}, "unlearned: expected"),
        ({"oracles": np.zeros((4, 6))}, "oracles: expected margins of the same 5"),
        ({"oracles": np.full((4, 5), np.inf)}, "oracles: expected finite"),
        ({"oracles": [[0.0] * 5] * 4}, "oracles: expected"),
        ({"permutations": 0}, "permutations: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_tables_are_checked(changed: dict[str, Any], told: str) -> None:
    good: dict[str, Any] = {"unlearned": np.zeros((4, 5)), "oracles": np.zeros((4, 5))}
    with pytest.raises(UnlearningError, match=told):
        unlearning_lira(**{**good, **changed})
