"""Randomised smoothing: what its counts prove, an l2 radius within which no prediction changes.

A smoothed classifier gives the class that a model sees most often under Gaussian noise. If that
class has probability p, no perturbation shorter than sigma Phi^-1(p) changes the answer (Cohen et
al. 2019, arXiv 1902.02918). How the samples are drawn is in `certification`.
In `CertificationReport` every radius follows from a count, so that none is claimed without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, final

from scipy import special

from defenses.errors import EvaluationError
from defenses.measuring.counting import wilson_interval
from defenses.measuring.journal import FiledReport
from defenses.quantities import LARGEST_SIGMA, as_real, as_whole, shown

__all__ = ["CertificationReport", "CertifiedPoint", "Smoothing"]

_RESERVE = 0.01  # of alpha, kept for noise that is not exactly Gaussian
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
        """
        if not 0 <= hits <= self.samples:
            raise EvaluationError(f"hits: expected 0 to {self.samples}, got {hits}")
        if hits == 0:
            return 0.0
        error = self.alpha * (1 - _RESERVE)
        low = float(special.betaincinv(hits, self.samples - hits + 1, error)) * _ROUND_DOWN
        return self.sigma * float(special.ndtri(low)) * _ROUND_DOWN if low > 0.5 else 0.0

    def check_sampler(self, error: float) -> None:
        """Refuses a sampler whose error, over all samples, exceeds a hundredth of `alpha`.

        `error` is the total variation between the noise of one sample and what it should be.
        """
        needed = error * self.samples / _RESERVE
        if needed > self.alpha:
            raise EvaluationError(
                f"alpha: expected at least {needed:.1e} for {self.samples} samples of images this "
                f"large, got {self.alpha:.1e}; take fewer samples or a larger alpha"
            )


@final
@dataclass(frozen=True, kw_only=True)
class CertifiedPoint:
    """One point of the certified-accuracy curve.

    Attributes:
        radius: l2 length of a perturbation, where the pixels span [0, 1].
        accuracy: Share of images proven correct up to it.
        interval: Wilson 95 % interval of that share, for other images of the same kind.

    Example:
        >>> CertifiedPoint(radius=0.0, accuracy=0.5, interval=(0.1, 0.9)).accuracy
        0.5
    """

    radius: float
    accuracy: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, radii: Sequence[float], radius: float) -> "CertifiedPoint":
        """The share of images that are proven right up to `radius`, by how far each of them is.

        Raises:
            EvaluationError: The radius is below 0, or no number.
        """
        if not radius >= 0:
            raise EvaluationError(f"radius: expected a number >= 0, got {radius}")
        proven = sum(each > 0 and each >= radius for each in radii)
        return cls(
            radius=radius,
            accuracy=proven / len(radii),
            interval=wilson_interval(proven, len(radii)),
        )


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class CertificationReport(FiledReport):
    """Predictions of a smoothed classifier, and how far each provably holds.

    The smoothed classifier gives the class that the model gives most often when N(0, sigma^2) is
    added to the pixels and each is rounded to the nearest k / 255. For each image separately, with
    probability at least 1 - alpha over the samples: if it did not abstain, its prediction is the
    smoothed classifier's, there and at every real-valued image within its radius.

    Attributes:
        smoothing: Noise, samples and chance of error.
        classes: How many the model tells apart.
        indices: Which images of the data set, [n].
        labels: Their true classes, [n].
        selected: The class chosen for each, [n].
        hits: How many of `smoothing.samples` gave that class, [n].
        seed: What chose the images and the noise.
        images: SHA-256 of the images and labels.
        versions: Of the packages involved.

    Raises:
        EvaluationError: The parts do not fit together.

    Example:
        >>> report = CertificationReport(
        ...     smoothing=Smoothing(sigma=0.25, samples=1000), classes=2,
        ...     indices=(0, 1, 2), labels=(0, 0, 1), selected=(0, 1, 1), hits=(1000, 900, 510),
        ...     seed=0, images="", versions={},
        ... )
        >>> report.verdicts
        ('correct', 'wrong', 'abstained')
        >>> [round(radius, 2) for radius in report.radii]
        [0.62, 0.0, 0.0]
    """

    _CALLED = "a certification"
    _SCHEMA = 1

    smoothing: Smoothing
    classes: int
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    selected: tuple[int, ...]
    hits: tuple[int, ...]
    seed: int
    images: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        rows = (self.labels, self.selected, self.hits)
        if not self.indices or any(len(row) != len(self.indices) for row in rows):
            raise EvaluationError(
                f"expected one label, class and count for each of n >= 1 images, got "
                f"{[len(row) for row in rows]} for {len(self.indices)}"
            )
        if not all(0 <= value < self.classes for value in (*self.labels, *self.selected)):
            raise EvaluationError(f"classes: expected 0 to {self.classes - 1}, got others")
        if not all(0 <= count <= self.smoothing.samples for count in self.hits):
            raise EvaluationError(f"hits: expected 0 to {self.smoothing.samples}, got others")

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{self.verdicts.count(each)} {each}" for each in ("correct", "wrong", "abstained")
        )
        return (
            f"CertificationReport(certified {self.certified(0.0).accuracy:.1%} at radius 0, "
            f"largest radius {self.largest_radius:.3g}; {len(self.indices)} images: {counts}; "
            f"{self.smoothing!r})"
        )

    @cached_property
    def class_radii(self) -> tuple[float, ...]:
        """How far each prediction provably holds, right or wrong; 0 where it abstained, [n]."""
        known = {hits: self.smoothing.radius(hits) for hits in set(self.hits)}
        return tuple(known[hits] for hits in self.hits)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Of each image `correct`, `wrong` or `abstained`, [n]."""
        each = zip(self.class_radii, self.selected, self.labels, strict=True)
        return tuple(
            "abstained" if radius == 0 else "correct" if selected == label else "wrong"
            for radius, selected, label in each
        )

    @property
    def radii(self) -> tuple[float, ...]:
        """How far each image is provably classified correctly; 0 if wrong or abstained, [n]."""
        each = zip(self.verdicts, self.class_radii, strict=True)
        return tuple(radius if verdict == "correct" else 0.0 for verdict, radius in each)

    @property
    def abstention(self) -> float:
        """Share of images on which the smoothed classifier abstained."""
        return self.verdicts.count("abstained") / len(self.indices)

    @property
    def largest_radius(self) -> float:
        """What a class seen in every sample would be given: more needs more samples or noise."""
        return self.smoothing.radius(self.smoothing.samples)

    def certified(self, radius: float) -> CertifiedPoint:
        """The share of images proven correct against every perturbation up to an l2 length.

        At 0 those count whose prediction is right, and on which it was not abstained.
        """
        return CertifiedPoint.of(self.radii, radius)

    def curve(self, points: int = 41) -> tuple[CertifiedPoint, ...]:
        """Certified accuracy at 2 or more equally spaced radii from 0 to `largest_radius`."""
        if points < 2:
            raise EvaluationError(f"points: expected at least 2, got {points}")
        largest = self.largest_radius
        return tuple(self.certified(largest * k / (points - 1)) for k in range(points))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values: what it rests on, and under `summary` its figures."""
        return {
            "schema": self._SCHEMA,
            "norm": "l2",
            "smoothing": asdict(self.smoothing),
            "classes": self.classes,
            "indices": list(self.indices),
            "labels": list(self.labels),
            "selected": list(self.selected),
            "hits": list(self.hits),
            "seed": self.seed,
            "images": self.images,
            "versions": dict(self.versions),
            "summary": {
                "radii": list(self.radii),
                "verdicts": list(self.verdicts),
                "abstention": self.abstention,
                "curve": [
                    [point.radius, point.accuracy, *point.interval] for point in self.curve()
                ],
            },
        }

    @classmethod
    def _built(cls, values: Mapping[str, Any]) -> "CertificationReport":
        return cls(
            smoothing=Smoothing(**values["smoothing"]),
            classes=int(values["classes"]),
            indices=tuple(map(int, values["indices"])),
            labels=tuple(map(int, values["labels"])),
            selected=tuple(map(int, values["selected"])),
            hits=tuple(map(int, values["hits"])),
            seed=int(values["seed"]),
            images=str(values["images"]),
            versions=dict(values["versions"]),
        )
