"""What one example adds to a step: bounds from canaries' scores, and checks of the released sum.

Scores of canaries that were in and that were out bound epsilon from below. None may move the sum by
more than the clipping norm: it is looked for along directions in which it would be too large, and
in steps with hardly any noise the sum itself is held against its definition.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
from scipy import stats
from torch import Tensor

from privacy.audit.report import Check, at_most
from privacy.errors import PlanError
from privacy.statistics import (
    Numbers,
    epsilon_of_counts,
    epsilon_of_guesses,
    gdp_epsilon,
    roc_area,
    true_positive_rate,
)
from privacy.validate import probability

__all__ = [
    "MISMATCH",
    "CanaryScoreAuditor",
    "check_clipped_sum",
    "check_contribution",
    "check_epsilon",
    "check_images",
    "check_largest",
    "check_objective",
    "check_release",
    "check_sum",
    "mismatch",
]

_THRESHOLDS = np.linspace(0.002, 0.998, 250)
"""Quantiles of the scores among which a threshold is chosen, on data that is not counted."""
_GUESSED_SHARES = tuple(2.0**-k for k in range(8))
"""Shares of all canaries on which the one-run method ventures a guess; fixed, so that trying them
all costs a factor (Bonferroni) and nothing else."""
MISMATCH = 0.01
"""Largest part of a clipped sum that need not be that of the definition, in clipping norms for the
root of the number of examples: rounding makes 1e-5, convolutions in TF32 1e-3."""
_TOLERANCE = 0.01
"""How far a measured sum may lie from the definition's beyond chance: rounding, low precision."""
_UNEXPLAINED = 1e-5
"""Change of a parameter, as a part of it, that rounding explains."""


@final
class CanaryScoreAuditor:
    """Lower bounds on epsilon from two samples of scores; higher means `was in`.

    The interface is that of JAX-Privacy's auditor (Google DeepMind), on numpy and scipy alone.

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
        self, in_scores: Sequence[float] | Numbers, out_scores: Sequence[float] | Numbers
    ) -> None:
        self._in = _checked("in_scores", in_scores)
        self._out = _checked("out_scores", out_scores)

    def epsilon_from_gdp(self, delta: float, confidence: float) -> float:
        """The epsilon of the least mu for which both samples fit a mu-GDP pair of Gaussians.

        Valid where scores are Gaussian with one deviation: a white-box score of a step with
        Gaussian noise is.
        """
        return gdp_epsilon(self.gdp_mu(confidence), delta)

    def gdp_mu(self, confidence: float) -> float:
        """A lower bound on mu = (mean in - mean out) / deviation.

        By Student's interval of the difference and the chi-squared one, each at half of the error.
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
        return roc_area(self._in, self._out)

    def tpr_at_given_fpr(self, fpr: float) -> float:
        """Share of the canaries in that a threshold finds which at most `fpr` of the out pass.

        A point estimate, without a confidence.
        """
        return true_positive_rate(self._in, self._out, fpr=fpr)

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
        self, in_scores: Numbers, out_scores: Numbers, delta: float, confidence: float
    ) -> float:
        """The bound that its counts give."""
        above_in = int((in_scores > self.threshold).sum())
        above_out = int((out_scores > self.threshold).sum())
        ins, outs = (above_in, len(in_scores)), (above_out, len(out_scores))
        if self.out:
            ins, outs = (outs[1] - outs[0], outs[1]), (ins[1] - ins[0], ins[1])
        return epsilon_of_counts(
            hits=ins[0],
            positives=ins[1],
            false_alarms=outs[0],
            negatives=outs[1],
            delta=delta,
            confidence=confidence,
        )


def _checked(name: str, scores: Sequence[float] | Numbers) -> Numbers:
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


def check_epsilon(method: str, bound: float, *, claimed: float) -> Check:
    """No lower bound may exceed the claim."""
    says = "lower bound on the epsilon of one step, at most the claimed one"
    return at_most(f"epsilon ({method})", bound, claimed, says=says)


def check_contribution(auditor: CanaryScoreAuditor, *, error: float) -> Check:
    """One example may move the clipped sum by the clipping norm and no further."""
    moved = auditor.mean_difference(confidence=1 - error)
    return Check(
        name="contribution",
        passed=moved <= 1 + _TOLERANCE,
        measured=moved,
        limit=1.0,
        says="clipping norms by which one example moves the sum, at least",
    )


def check_sum(sums: Tensor, excess: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """No more may be added up than the definition's clipped sum, less may.

    Many small excesses of all examples together show here, where none of them shows alone. `sums`
    are norms of the definition's sums, [steps, k] of k kinds, and `excess` is what was added beyond
    them along their own directions, noise with it.
    """
    steps, kinds = sums.shape
    beyond = (excess - _TOLERANCE * sums).double().sum(0) / (noise_multiplier * math.sqrt(steps))
    says = "what is added up beyond the clipped gradients, in deviations of the noise"
    return at_most("sum", float(beyond.max()), float(stats.norm.isf(error / kinds)), says=says)


def check_largest(beyond: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """In no physical batch, and by no canary, may more be added than the clipping norm each.

    `beyond` is what was added beyond the definition in one direction each, noise with it: towards
    what is clipped off of a physical batch, or along a canary; float [k].
    """
    return at_most(
        "largest contribution",
        float(beyond.max()) / noise_multiplier,
        float(stats.norm.isf(error / len(beyond))),
        says="most that one physical batch or canary added beyond its clipped gradients, in "
        "deviations of the noise",
    )


def mismatch(residual: Tensor, total: Tensor, *, examples: int, noise_multiplier: float) -> float:
    """What one step with hardly any noise added up that is not the definition's sum, or less of it.

    `residual` is what it added beyond the definition's sum `total`, noise with it. In clipping
    norms for the root of the number of examples; infinite where it is not a number.
    """
    residual, total = residual.double(), total.double()
    size = max(float(total.norm()), 1e-12)
    along = max(-1.0, min(0.0, float(residual @ total) / size**2))
    rest = float((residual - along * total).square().sum())
    if not math.isfinite(rest):
        return math.inf
    noise = noise_multiplier**2 * residual.numel()
    return math.sqrt(max(0.0, rest - noise) / max(1, examples))


def check_clipped_sum(mismatches: Sequence[float]) -> Check:
    """With hardly any noise, what is added up must be the definition's sum, or less of it.

    Whatever couples examples or bends a gradient shows here, however many parameters there are.
    """
    says = "clipping norms an example that are not the definition's, in steps with hardly any noise"
    return at_most("clipped sum", max(mismatches), MISMATCH, says=says)


def check_images(foreign: int) -> Check:
    """What the step works on must be what was read for it: else its coins are for nothing.

    `foreign` counts images of rows that were not read for their batch; augmented ones do not count.
    """
    says = "images in the batches that are of rows which were not read for them"
    return at_most("images", float(foreign), 0.0, says=says)


def check_objective(apart: bool) -> Check:
    """No loss may know other examples, not even by a constant: its gradient would be theirs too.

    Asked of a few examples at the first parameters: what sets in only later is not seen.
    """
    return at_most(
        "objective",
        float(not apart),
        0.0,
        says="the objective keeps examples apart: 1 if changing one, or leaving one out, moved the "
        "losses of others",
    )


def check_release(unexplained: float) -> Check:
    """Nothing may change but by the released gradient, in the optimizer's step."""
    return at_most(
        "release",
        unexplained,
        _UNEXPLAINED,
        says="largest change of parameters, buffers, tensors of the model or the optimizer, or of "
        "what lies in .grad, that no released gradient explains, as a part of them",
    )
