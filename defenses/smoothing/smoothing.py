"""Randomised smoothing: what its counts prove, an l2 radius within which no prediction changes.

A smoothed classifier gives the class that a model sees most often under Gaussian noise. If that
class has probability p, no perturbation shorter than sigma Phi^-1(p) changes the answer (Cohen et
al. 2019, arXiv 1902.02918). Deliberately not here: the model and the noise (`certification`).
"""

from dataclasses import dataclass
from typing import final

from scipy import special

from defenses.errors import EvaluationError
from defenses.quantities import as_real, as_whole, shown
from defenses.smoothing.grid_noise import LARGEST_SIGMA

__all__ = ["Smoothing"]

_RESERVE = 0.01
_ROUND_DOWN = 1 - 1e-9  # far more than scipy's own error, far less than anyone can see


@final
@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How a classifier is smoothed and how much is asked to prove it.

    Attributes:
        sigma: Standard deviation of the noise, where the pixels span [0, 1]; in (0, 10]. The
            largest radius that can be proven is a small multiple of it.
        selection: Noisy copies that choose an image's class, at least 1.
        samples: Noisy copies that bound its probability from below, at least 1; with ten times as
            many the largest radius grows by about 0.7 sigma.
        alpha: Largest probability that the certificate of one image is false, in (0, 1).

    Raises:
        EvaluationError: A value is out of range.

    Example:
        >>> smoothing = Smoothing(sigma=0.5)
        >>> round(smoothing.radius(10_000), 3), smoothing.radius(5_000)
        (1.599, 0.0)
    """

    sigma: float
    selection: int = 100
    samples: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < as_real(self.sigma) <= LARGEST_SIGMA:
            raise EvaluationError(
                f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {shown(self.sigma)}"
            )
        if as_whole(self.selection) < 1 or as_whole(self.samples) < 1:
            raise EvaluationError(
                "expected selection and samples of at least 1, got "
                f"{shown(self.selection)} and {shown(self.samples)}"
            )
        if not 0 < as_real(self.alpha) < 1:
            raise EvaluationError(f"alpha: expected a number in (0, 1), got {shown(self.alpha)}")

    def radius(self, hits: int) -> float:
        """The l2 radius that so many hits prove, rounded down; 0 where they prove none.

        With p the lower Clopper-Pearson bound (1934) of the class's probability it is
        sigma Phi^-1(p) (Cohen et al. 2019, Theorem 1, with the runner-up bounded by 1 - p), and
        none where p <= 1/2. A hundredth of `alpha` is kept for `check_sampler`.

        Args:
            hits: Samples that gave the class, 0 <= hits <= samples.

        Raises:
            EvaluationError: The count is out of range.
        """
        if not 0 <= hits <= self.samples:
            raise EvaluationError(f"hits: expected 0 to {self.samples}, got {hits}")
        if hits == 0:
            return 0.0
        error = self.alpha * (1 - _RESERVE)
        low = float(special.betaincinv(hits, self.samples - hits + 1, error)) * _ROUND_DOWN
        return self.sigma * float(special.ndtri(low)) * _ROUND_DOWN if low > 0.5 else 0.0

    def check_sampler(self, error: float) -> None:
        """Refuses a sampler whose distance from the Gaussian may cost more than is kept for it.

        Args:
            error: Total variation between the noise of one sample and what it should be.

        Raises:
            EvaluationError: All samples together use up more than a hundredth of `alpha`.
        """
        needed = error * self.samples / _RESERVE
        if needed > self.alpha:
            raise EvaluationError(
                f"alpha: expected at least {needed:.1e} for {self.samples} samples of images this "
                f"large, got {self.alpha:.1e}; take fewer samples or a larger alpha"
            )
