"""Bounds on epsilon against closed forms, exact binomials, naive re-implementations, simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from privacy import GaussianSteps, PlanError, epsilon_of
from privacy.audit import CanaryScoreAuditor, gdp_delta, gdp_epsilon, one_run_p_value
from privacy.statistics import area_interval, epsilon_of_counts, epsilon_of_guesses, roc_area

DELTA = 1e-5


def gaussian(seed: int, mu: float, count: int) -> CanaryScoreAuditor:
    """Scores of a mu-GDP mechanism: two Gaussians mu deviations apart."""
    random = np.random.default_rng(seed)
    return CanaryScoreAuditor(
        2 * (random.standard_normal(count) + mu) - 7, 2 * random.standard_normal(count) - 7
    )


def naive_one_run(m: int, r: int, v: int, eps: float, delta: float) -> float:
    """The published code of Steinke et al. (2023), appendix D, as it stands there."""
    q = 1 / (1 + math.exp(-eps))
    beta = stats.binom.sf(v - 1, r, q)
    alpha, total = 0.0, 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    return min(beta + alpha * delta * 2 * m, 1)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 3.0, 20.0, 300.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_the_gaussian_trade_off_inverts(mu: float, delta: float) -> None:
    """Delta at epsilon(delta) is delta, also where e^epsilon has no double."""
    epsilon = gdp_epsilon(mu, delta)
    if epsilon > 0:
        assert gdp_delta(mu, epsilon) == pytest.approx(delta, rel=1e-4)
    else:
        assert gdp_delta(mu, 0.0) <= delta
    assert gdp_epsilon(mu * 1.01, delta) >= epsilon


def test_the_gaussian_trade_off_agrees_with_an_accountant() -> None:
    """One step with sampling rate 1 is 1/sigma-GDP; the accountants' bound lies just above it."""
    for sigma in (0.7, 1.0, 4.0):
        steps = GaussianSteps(noise_multiplier=sigma, sampling_rate=1.0, steps=1)
        exact = gdp_epsilon(1 / sigma, DELTA)
        assert exact <= epsilon_of([steps], DELTA) <= 1.1 * exact


def test_the_gaussian_trade_off_at_its_ends() -> None:
    """No distance is no epsilon, infinite distance is infinite, and nonsense is refused."""
    assert gdp_epsilon(0.0, DELTA) == 0.0
    assert gdp_epsilon(math.inf, DELTA) == math.inf
    assert gdp_delta(1.0, 0.0) == pytest.approx(2 * stats.norm.cdf(0.5) - 1)
    for mu, delta in ((-1.0, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PlanError, match="expected"):
            gdp_epsilon(mu, delta)


@pytest.mark.parametrize(("m", "r", "v"), [(10, 10, 10), (50, 20, 17), (400, 100, 61), (30, 9, 0)])
@pytest.mark.parametrize("epsilon", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_one_run_p_values_are_the_published_ones(
    m: int, r: int, v: int, epsilon: float, delta: float
) -> None:
    """Against the paper's own code, line by line."""
    found = one_run_p_value(examples=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(naive_one_run(m, r, v, epsilon, delta), rel=1e-9)


def test_one_run_p_values_without_delta_are_binomial() -> None:
    """At epsilon 0 each guess is a fair coin; at epsilon log 3 it is right three times of four."""
    p_value = one_run_p_value(examples=20, guesses=8, correct=7, epsilon=0.0, delta=0.0)
    assert p_value == pytest.approx((8 + 1) / 2**8)
    p_value = one_run_p_value(examples=20, guesses=3, correct=3, epsilon=math.log(3), delta=0.0)
    assert p_value == pytest.approx(0.75**3)
    with pytest.raises(PlanError, match="correct <= guesses <= examples"):
        one_run_p_value(examples=5, guesses=6, correct=6, epsilon=0.0, delta=0.0)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 100), (100, 80), (1000, 560), (100, 50)])
def test_one_run_epsilon_is_where_the_p_value_crosses(guesses: int, correct: int) -> None:
    """Just below the bound is ruled out, just above is not; a coin rules out nothing."""
    bound = epsilon_of_guesses(
        examples=1000, guesses=guesses, correct=correct, delta=1e-6, confidence=0.95
    )

    def p_value(epsilon: float) -> float:
        return one_run_p_value(
            examples=1000, guesses=guesses, correct=correct, epsilon=epsilon, delta=1e-6
        )

    if correct == guesses / 2:
        assert bound == 0.0
    else:
        assert p_value(bound - 1e-6) < 0.05 <= p_value(bound + 1e-6)


def test_clopper_pearson_is_that_of_its_definition() -> None:
    """Each rate's bound is where the binomial tail has half of the error."""
    bound = epsilon_of_counts(
        hits=70, positives=90, false_alarms=11, negatives=80, delta=1e-3, confidence=0.9
    )
    interval = stats.binomtest(70, 90).proportion_ci(0.9, "exact")
    other = stats.binomtest(11, 80).proportion_ci(0.9, "exact")
    assert bound == pytest.approx(math.log((interval.low - 1e-3) / other.high))
    nothing = epsilon_of_counts(
        hits=0, positives=90, false_alarms=80, negatives=80, delta=1e-3, confidence=0.9
    )
    assert nothing == 0.0


def exceeded(method: str, mu: float, claimed: float, *, confidence: float, runs: int) -> int:
    """In how many simulated audits the bound exceeds the claim."""
    return sum(
        getattr(gaussian(seed, mu, 300), method)(DELTA, confidence) > claimed
        for seed in range(runs)
    )


METHODS = ["epsilon_from_gdp", "epsilon_clopper_pearson", "epsilon_one_run"]


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_at_their_confidence(method: str) -> None:
    """Of 200 audits of a true Gaussian mechanism at 80 % no more than a fifth exceed the truth."""
    wrong = exceeded(method, 1.0, gdp_epsilon(1.0, DELTA), confidence=0.8, runs=200)
    assert stats.binom.sf(wrong - 1, 200, 0.2) > 1e-3


def test_the_gaussian_bound_is_not_vacuous() -> None:
    """With 20000 scores a side it reaches nine tenths of the truth, the others a good part."""
    auditor, truth = gaussian(0, 1.0, 20_000), gdp_epsilon(1.0, DELTA)
    assert 0.9 * truth < auditor.epsilon_from_gdp(DELTA, 0.95) < truth
    assert 0.4 * truth < auditor.epsilon_clopper_pearson(DELTA, 0.95) < truth
    assert 0.3 * truth < auditor.epsilon_one_run(DELTA, 0.95) < truth


@pytest.mark.parametrize("method", METHODS)
def test_a_violation_is_found(method: str) -> None:
    """A mechanism of mu 6 that claims mu 1/4 is caught by every method, practically always."""
    claimed = gdp_epsilon(0.25, DELTA)
    auditor = gaussian(3, 6.0, 4000)
    assert getattr(auditor, method)(DELTA, 0.999) > claimed


def test_the_selected_threshold_is_paid_for() -> None:
    """Control: the best of all thresholds on the same data exceeds the truth far too often."""
    greedy, corrected = 0, 0
    for seed in range(50):
        random = np.random.default_rng(seed)
        ins, outs = random.standard_normal(600), random.standard_normal(600)
        best = max(
            epsilon_of_counts(
                hits=int((ins > t).sum()),
                positives=600,
                false_alarms=int((outs > t).sum()),
                negatives=600,
                delta=DELTA,
                confidence=0.6,
            )
            for t in np.concatenate([ins, outs])
        )
        greedy += best > 0
        corrected += CanaryScoreAuditor(ins, outs).epsilon_clopper_pearson(DELTA, 0.6) > 0
    assert greedy > 30
    assert corrected <= 20


def test_ties_do_not_count_for_the_auditor() -> None:
    """Scores that are all equal know nothing, in whatever order they are listed."""
    auditor = CanaryScoreAuditor(np.zeros(500), np.zeros(500))
    assert auditor.epsilon_one_run(DELTA, 0.95) == 0.0
    assert auditor.epsilon_clopper_pearson(DELTA, 0.95) == 0.0
    assert auditor.epsilon_from_gdp(DELTA, 0.95) == 0.0
    assert auditor.attack_auroc == 0.5


def test_certainty_is_no_privacy() -> None:
    """Scores without any noise have infinite epsilon by the Gaussian fit."""
    auditor = CanaryScoreAuditor(np.ones(50), np.zeros(50))
    assert auditor.epsilon_from_gdp(DELTA, 0.95) == math.inf
    assert auditor.attack_auroc == 1.0
    assert auditor.tpr_at_given_fpr(0.0) == 1.0


def test_auroc_and_tpr_are_those_of_their_definition() -> None:
    """Against all pairs, and against every threshold."""
    random = np.random.default_rng(1)
    ins, outs = random.integers(0, 9, 40) + 1.0, random.integers(0, 9, 30) * 1.0
    auditor = CanaryScoreAuditor(ins, outs)
    pairs = (ins[:, None] > outs) + 0.5 * (ins[:, None] == outs)
    assert auditor.attack_auroc == pytest.approx(pairs.mean())
    for fpr in (0.0, 0.1, 0.5, 1.0):
        thresholds = [-1.0, *outs, *ins]
        best = max((ins > t).mean() for t in thresholds if (outs > t).mean() <= fpr + 1e-12)
        assert auditor.tpr_at_given_fpr(fpr) == pytest.approx(best)
    with pytest.raises(PlanError, match=r"fpr: expected a share in \[0, 1\], got 2"):
        auditor.tpr_at_given_fpr(2)


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [[1.0, 2.0]], [1.0, math.inf]])
def test_unusable_scores_are_refused(scores: list[float]) -> None:
    """Too few, or not finite."""
    with pytest.raises(PlanError, match="in_scores: expected two or more finite scores"):
        CanaryScoreAuditor(scores, [0.0, 1.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_confidence_is_a_probability(method: str, confidence: float) -> None:
    """Certainty cannot be had."""
    with pytest.raises(PlanError, match=r"confidence: expected a probability in \(0, 1\)"):
        getattr(gaussian(0, 1.0, 10), method)(DELTA, confidence)


@pytest.mark.parametrize("wrong", ["x", None, True, 1j, -1, math.nan])
@pytest.mark.parametrize("name", ["examples", "guesses", "correct", "epsilon"])
def test_guesses_of_other_types_are_refused(name: str, wrong: object) -> None:
    """By name."""
    values = {"examples": 3, "guesses": 2, "correct": 1, "epsilon": 1.0, "delta": 0.0, name: wrong}
    with pytest.raises(PlanError, match=rf"^{name}: expected"):
        one_run_p_value(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["x", None, 2.0, math.nan, 10**400])
def test_probabilities_of_other_types_are_refused(wrong: object) -> None:
    """Of every method, before anything is computed."""
    auditor = CanaryScoreAuditor([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    for method in (
        auditor.epsilon_from_gdp,
        auditor.epsilon_clopper_pearson,
        auditor.epsilon_one_run,
    ):
        for values in ((wrong, 0.9), (1e-5, wrong)):
            with pytest.raises(PlanError, match=r"^(delta|confidence): expected"):
                method(*values)  # type: ignore[arg-type]


def test_what_no_number_holds_is_no_privacy() -> None:
    assert gdp_epsilon(1e200, 1e-5) == math.inf


def test_the_interval_of_an_area_holds_it_as_often_as_it_says() -> None:
    """Over 500 tables of 30 and 20 scores with a known area: 95 % give or take 3.5 deviations."""
    random = np.random.default_rng(0)
    for shift in (0.0, 1.0, 2.5):
        true, missed = stats.norm.cdf(shift / 2**0.5), 0
        for _ in range(500):
            found = roc_area(random.normal(shift, size=30), random.normal(size=20))
            low, high = area_interval(found, 30, 20, error=0.025)
            assert 0 <= low <= found <= high <= 1
            missed += not low <= true <= high
        assert missed <= 500 * 0.05 + 3.5 * (500 * 0.05 * 0.95) ** 0.5
    assert 0.8 < area_interval(1.0, 30, 20, error=0.025)[0] < 0.95
    low, high = area_interval(0.3, 40, 10, error=0.025)
    assert area_interval(0.7, 40, 10, error=0.025) == pytest.approx((1 - high, 1 - low))
