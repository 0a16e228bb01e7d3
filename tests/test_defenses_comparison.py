"""Paired comparison: published vectors, an independent test, coverage by simulation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.evaluated import LINF, tensors
from support.networks import Net

from defenses import EvaluationError, ThreatModel, evaluate
from defenses.evaluation.comparison import PairedComparison, compare
from defenses.measuring.counting import exceeds, mcnemar, outnumbers


@given(one=st.integers(0, 400), other=st.integers(0, 400))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_mcnemar_is_the_binomial_test(one, other):
    """SciPy's, on the discordant pairs; and its one-sided form decides who outnumbers whom."""
    if one + other:
        assert mcnemar(one, other) == pytest.approx(stats.binomtest(one, one + other).pvalue)
        greater = stats.binomtest(one, one + other, alternative="greater").pvalue
        assert outnumbers(one, other, level=0.01) == (greater < 0.01)
    else:
        assert mcnemar(one, other) == 1


def test_thousands_of_discordant_pairs_are_counted():
    """Neither overflow nor a long wait."""
    assert mcnemar(10_000, 10_000) == 1
    assert 0 <= mcnemar(10_000, 8_000) < 1e-40


def test_nothing_tried_exceeds_nothing():
    """A share of no images is no evidence."""
    assert not exceeds(0, 0, 0.01)
    assert not exceeds(1, 100, 0.01)
    assert exceeds(10, 100, 0.01)


def test_the_interval_is_newcombes():
    """The first example of table I of Newcombe (1998, Stat. Med. 17, 2635), method 10."""
    found = PairedComparison(both=36, first_only=12, second_only=2, neither=0)
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_interval_covers_the_truth():
    """In about 95 of 100 draws, at several truths."""
    random = np.random.default_rng(0)
    for shares in ((0.4, 0.1, 0.05, 0.45), (0.8, 0.02, 0.02, 0.16), (0.1, 0.3, 0.1, 0.5)):
        truth, inside = shares[1] - shares[2], 0
        for counts in random.multinomial(120, shares, size=1000).tolist():
            low, high = PairedComparison(
                both=counts[0], first_only=counts[1], second_only=counts[2], neither=counts[3]
            ).interval
            inside += low <= truth <= high
        assert 0.93 <= inside / 1000 <= 0.99


def test_swapping_the_models_mirrors_the_comparison():
    """Difference and interval change their sign, the p value does not."""
    one = PairedComparison(both=30, first_only=9, second_only=4, neither=7)
    other = replace(one, first_only=4, second_only=9)
    assert other.difference == -one.difference
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]))
    assert other.p_value == one.p_value


def test_two_reports_are_compared_image_by_image():
    """Counts by hand from the worst cases."""
    data = tensors(60)
    one, other = (
        evaluate(Net(), data, LINF, attacks=["fgsm"], samples=50, progress=False) for _ in range(2)
    )
    found = compare(one, other)
    assert found.samples == 50
    assert found.both == sum(a and b for a, b in zip(one.worst_case, other.worst_case, strict=True))
    assert found.difference == pytest.approx(one.worst_case_accuracy - other.worst_case_accuracy)
    assert compare(one, one).p_value == 1
    assert compare(one, one).difference == 0


def test_reports_that_cannot_be_compared_are_refused():
    """Other images, another ball, other attacks: each is named."""
    net, data = Net(), tensors(30)
    report = evaluate(net, data, LINF, attacks=["fgsm"], samples=20, progress=False)
    wider = ThreatModel(norm="linf", eps=0.2)
    for word, threat, given_data, seed, names in (
        ("images", LINF, tensors(30, seed=1), 0, ["fgsm"]),
        ("images", LINF, data, 1, ["fgsm"]),
        ("threat models", wider, data, 0, ["fgsm"]),
        ("attacks", LINF, data, 0, ["fgsm", "ffgsm"]),
    ):
        other = evaluate(
            net, given_data, threat, attacks=names, samples=20, seed=seed, progress=False
        )
        with pytest.raises(EvaluationError, match=word):
            compare(report, other)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, -1, 1, 1)])
def test_counts_that_cannot_be_are_refused(counts):
    """Negative, or of nothing."""
    names = ("both", "first_only", "second_only", "neither")
    with pytest.raises(EvaluationError, match="counts"):
        PairedComparison(**dict(zip(names, counts, strict=True)))
