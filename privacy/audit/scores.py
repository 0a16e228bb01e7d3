"""What scores of canaries that were in, and of canaries that were out, prove about epsilon.

The interface is that of JAX-Privacy's auditor (Google DeepMind), on numpy and scipy alone. How the
scores came about is deliberately not here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
from scipy import stats

from privacy.audit.bounds import epsilon_of_counts, epsilon_of_guesses, gdp_epsilon
from privacy.errors import PlanError
from privacy.quantities import probability

__all__ = ["CanaryScoreAuditor"]

Scores = npt.NDArray[np.float64]

_THRESHOLDS = np.linspace(0.002, 0.998, 250)
"""Quantiles of the scores among which a threshold is chosen, on data that is not counted."""
_GUESSED_SHARES = tuple(2.0**-k for k in range(8))
"""Shares of all canaries on which the one-run method ventures a guess; fixed, so that trying them
all costs a factor (Bonferroni) and nothing else."""


@final
class CanaryScoreAuditor:
    """Lower bounds on epsilon from two samples of scores; higher means `was in`.

    Guarantee: each `epsilon_*` is at most the true epsilon (at its delta) with probability at least
    `confidence`, given that scores are independent. What is looked up in the data (a threshold, a
    number of guesses) is corrected for.

    Args:
        in_scores: Scores of canaries that were in, at least 2.
        out_scores: Scores of canaries that were out, at least 2.

    Raises:
        PlanError: Too few scores, or one that is not finite.

    Example:
        >>> normal = np.random.default_rng(0).standard_normal
        >>> auditor = CanaryScoreAuditor(normal(2000) + 1, normal(2000))
        >>> 3.5 < auditor.epsilon_from_gdp(1e-5, 0.95) < gdp_epsilon(1.0, 1e-5)
        True
        >>> round(auditor.attack_auroc, 1)
        0.8
    """

    def __init__(
        self, in_scores: Sequence[float] | Scores, out_scores: Sequence[float] | Scores
    ) -> None:
        self._in = _checked("in_scores", in_scores)
        self._out = _checked("out_scores", out_scores)

    def epsilon_from_gdp(self, delta: float, confidence: float) -> float:
        """The epsilon of the least mu for which both samples fit a mu-GDP pair of Gaussians.

        Valid where scores are Gaussian with one deviation: a white-box score of a step with
        Gaussian noise is.

        Raises:
            PlanError: `delta` or `confidence` is not in (0, 1).
        """
        return gdp_epsilon(self.gdp_mu(confidence), delta)

    def gdp_mu(self, confidence: float) -> float:
        """A lower bound on mu = (mean in - mean out) / deviation.

        The difference is bounded below by Student's interval and the deviation above by the
        chi-squared one, each at half of the error.
        """
        probability("confidence", confidence)
        difference = self.mean_difference(confidence=(1 + confidence) / 2)
        if difference <= 0:
            return 0.0
        degrees = len(self._in) + len(self._out) - 2
        error = (1 - confidence) / 2
        deviation = self._deviation() * math.sqrt(degrees / float(stats.chi2.ppf(error, degrees)))
        return difference / deviation if deviation > 0 else math.inf

    def mean_difference(self, *, confidence: float) -> float:
        """A lower bound on how much higher the mean of scores that were in is; may be negative."""
        probability("confidence", confidence)
        degrees = len(self._in) + len(self._out) - 2
        error = self._deviation() * math.sqrt(1 / len(self._in) + 1 / len(self._out))
        quantile = float(stats.t.ppf(confidence, degrees))
        return float(self._in.mean() - self._out.mean()) - quantile * error

    def epsilon_clopper_pearson(self, delta: float, confidence: float) -> float:
        """From the error rates of one threshold, chosen on every other score, counted on the rest.

        Nothing is assumed about the scores' distribution.

        Raises:
            PlanError: `delta` or `confidence` is not in (0, 1).
        """
        probability("confidence", confidence)
        chosen_in, chosen_out = self._in[::2], self._out[::2]
        scores = np.concatenate([chosen_in, chosen_out])
        thresholds = np.unique(np.quantile(scores, _THRESHOLDS)).tolist()
        tests = [_Test(threshold, out) for threshold in thresholds for out in (False, True)]
        best = max(tests, key=lambda test: test.bound(chosen_in, chosen_out, delta, confidence))
        return best.bound(self._in[1::2], self._out[1::2], delta, confidence)

    def epsilon_one_run(self, delta: float, confidence: float) -> float:
        """From the number of coins guessed right (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846).

        Valid where each canary was in by an independent fair coin, also where all of them were in
        one training. The highest scores are guessed in, as many lowest ones out, the rest not at
        all; ties count against the auditor.

        Raises:
            PlanError: `delta` or `confidence` is not in (0, 1).
        """
        probability("confidence", confidence)
        corrected = 1 - (1 - confidence) / len(_GUESSED_SHARES)
        examples = len(self._in) + len(self._out)
        return max(
            epsilon_of_guesses(
                examples=examples,
                guesses=2 * each,
                correct=self._correct(each),
                delta=delta,
                confidence=corrected,
            )
            for each in {int(share * examples / 2) for share in _GUESSED_SHARES}
        )

    @property
    def attack_auroc(self) -> float:
        """Probability that a score that was in is higher than one that was out; ties count half."""
        ranks = stats.rankdata(np.concatenate([self._in, self._out]))[: len(self._in)].sum()
        pairs = len(self._in) * len(self._out)
        return float((ranks - len(self._in) * (len(self._in) + 1) / 2) / pairs)

    def tpr_at_given_fpr(self, fpr: float) -> float:
        """Share of the canaries in that a threshold finds which no more than `fpr` of the out pass.

        A point estimate, without a confidence.

        Args:
            fpr: In [0, 1].

        Raises:
            PlanError: `fpr` is not in [0, 1].
        """
        if not 0 <= fpr <= 1:
            raise PlanError(f"fpr: expected a share in [0, 1], got {fpr}")
        allowed = int(fpr * len(self._out) + 1e-9)
        if allowed >= len(self._out):
            return 1.0
        threshold = np.sort(self._out)[::-1][allowed]
        return float((self._in > threshold).mean())

    def _deviation(self) -> float:
        """The pooled standard deviation within both samples."""
        squares = ((self._in - self._in.mean()) ** 2).sum()
        squares += ((self._out - self._out.mean()) ** 2).sum()
        return math.sqrt(float(squares) / (len(self._in) + len(self._out) - 2))

    def _correct(self, each: int) -> int:
        """Right guesses among the `each` highest and the `each` lowest scores."""
        scores = np.concatenate([self._in, self._out])
        was_in = np.arange(len(scores)) < len(self._in)
        # Among equal scores the wrong ones come first: no bound is owed to an order of ties.
        highest = np.lexsort((was_in, -scores))[:each]
        lowest = np.lexsort((~was_in, scores))[:each]
        return int(was_in[highest].sum() + (~was_in[lowest]).sum())


class _Test(NamedTuple):
    """A fixed test: guesses `in` above the threshold, or, with `out`, `out` at or below it."""

    threshold: float
    out: bool

    def bound(
        self, in_scores: Scores, out_scores: Scores, delta: float, confidence: float
    ) -> float:
        """The bound that its counts give."""
        above_in = int((in_scores > self.threshold).sum())
        above_out = int((out_scores > self.threshold).sum())
        if self.out:
            hits, positives = len(out_scores) - above_out, len(out_scores)
            false_alarms, negatives = len(in_scores) - above_in, len(in_scores)
        else:
            hits, positives = above_in, len(in_scores)
            false_alarms, negatives = above_out, len(out_scores)
        return epsilon_of_counts(
            hits=hits,
            positives=positives,
            false_alarms=false_alarms,
            negatives=negatives,
            delta=delta,
            confidence=confidence,
        )


def _checked(name: str, scores: Sequence[float] | Scores) -> Scores:
    """Scores as float64 [n], n >= 2, all finite."""
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{name}: expected two or more finite scores: {error}") from error
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise PlanError(
            f"{name}: expected two or more finite scores in one dimension, got shape {array.shape}"
        )
    return array
