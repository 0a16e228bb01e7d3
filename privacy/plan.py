"""The plan: sampling rate, steps, clipping norm and noise in one frozen value.

The sampler, the clipping, the noise and the accountant all read the same plan, so that they agree
by construction. What only changes speed (physical batch size, kernels) is deliberately not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from privacy.accounting import (
    GaussianSteps,
    Unit,
    checked_unit,
    epsilon_of,
    noise_multiplier_for,
)
from privacy.clipping.factors import Clipping, FlatClipping, clipping_of
from privacy.errors import PlanError
from privacy.validate import positive, real, shown, whole

__all__ = ["DPPlan"]

_MOST_STEPS = 1e12
_USUAL_IMAGES = 8
_SAMPLED, _ON_ALL = "PRV and RDP, the smaller bound", "the Gaussian mechanism, exactly"
"""How epsilon is counted, of steps on samples and of steps on everybody."""


@dataclass(frozen=True, kw_only=True)
class DPPlan:
    """What a private training will do, fixed before it starts.

    Guarantee: training that follows the plan (each step's batch drawn by Poisson sampling, each
    example's gradient clipped to `max_grad_norm` in the manner of `clipping`, Gaussian noise of
    standard deviation `noise_multiplier * max_grad_norm` added to their sum) is (`epsilon(delta)`,
    delta)-differentially private under adding or removing one example (Abadi et al. 2016, arXiv
    1607.00133). `samples` is taken to be public.

    Where `unit` is `person`, all of this is of persons in the place of examples: a step samples
    persons, takes up to `images_per_person` examples of each, averages their gradients and clips
    that mean, so that one person with all their examples moves the sum by the clipping norm at most
    (user-level sampling: Charles et al. 2024, arXiv 2407.07737).

    Attributes:
        samples: Number of training examples, n; of persons where they are the unit.
        batch_size: Expected size of a Poisson batch, in [1, samples]; the sampling rate is
            batch_size / samples.
        epochs: Expected passes over the data, > 0; the number of steps is `round(epochs * samples /
            batch_size)`, at least 1.
        max_grad_norm: The L2 norm C to which each example's gradient is clipped, > 0; of the first
            step where the clipping is adaptive.
        noise_multiplier: Noise over C of everything that a step releases together, > 0; None until
            given or calibrated.
        delta: The delta that epsilon is stated at, in (0, 1 / samples); None until given or
            calibrated.
        target_epsilon: The budget that `calibrate` was asked for; None when the noise was given.
        clipping: How C bounds an example: `FlatClipping()`, `AutomaticClipping()`,
            `PerLayerClipping()` or `AdaptiveClipping()`, or what its `to_dict` gave.
        float_safe: Whether clipped sum and noise are added as whole multiples of a power of two, so
            that no low bits leak (Mironov 2012, CCS; Holohan and Braghin 2021, arXiv 2107.10138).
            The clipping norm is lowered by at most 2^-10 of itself, which pays for the rounding;
            every example's gradient is formed, which takes time.
        unit: What is protected as one: an `example`, or a `person`, whose examples `attach` is told
            by its `groups`.
        images_per_person: Most examples of one person in a step, drawn anew each time: more cost
            time, never privacy. 8 by default where the unit is a person, else None.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> plan = DPPlan(samples=60_000, batch_size=2048, epochs=20, max_grad_norm=1.0)
        >>> plan = plan.calibrate(epsilon=3.0, delta=1e-5)
        >>> plan.steps, plan.epsilon() <= 3.0
        (586, True)
    """

    samples: int
    batch_size: int
    epochs: float
    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    delta: float | None = None
    target_epsilon: float | None = None
    clipping: Clipping = field(default_factory=FlatClipping)
    float_safe: bool = False
    unit: Unit = "example"
    images_per_person: int | None = None

    def __post_init__(self) -> None:
        samples = whole("samples", self.samples)
        self._set(
            samples=samples,
            unit=checked_unit(self.unit),
            images_per_person=self._checked_images(),
            batch_size=self._checked_batch_size(samples),
            epochs=positive("epochs", self.epochs),
            max_grad_norm=positive("max_grad_norm", self.max_grad_norm),
            clipping=clipping_of(self.clipping),
        )
        if not isinstance(self.float_safe, bool):
            raise PlanError(f"float_safe: expected True or False, got {shown(self.float_safe)}")
        if not self.epochs * samples / self.batch_size <= _MOST_STEPS:
            raise PlanError(
                f"epochs: expected at most {_MOST_STEPS:g} steps, got {self.epochs:g} epochs of "
                f"{samples / self.batch_size:g} steps"
            )
        if self.noise_multiplier is not None:
            self._set(noise_multiplier=positive("noise_multiplier", self.noise_multiplier))
            self.clipping.gradient_noise_multiplier(self.noise_multiplier)
        if self.delta is not None:
            self._set(delta=self._checked_delta(self.delta))
        if self.target_epsilon is not None:
            self._set(target_epsilon=positive("target_epsilon", self.target_epsilon))

    def _set(self, **values: object) -> None:
        """Sets fields of a frozen value while it is made: numpy's numbers become Python's."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _checked_images(self) -> int | None:
        images = self.images_per_person
        if self.unit == "person":
            return whole("images_per_person", _USUAL_IMAGES if images is None else images)
        if images is not None:
            raise PlanError(
                f'images_per_person: expected unit="person" with it, got {shown(images)} and the '
                "unit example; leave it out"
            )
        return None

    def _checked_batch_size(self, samples: int) -> int:
        try:
            return whole("batch_size", self.batch_size, most=samples)
        except PlanError as error:
            raise PlanError(
                f"batch_size: expected 1 to {samples} (the number of {self._samples}), got "
                f"{shown(self.batch_size)}: a sampling rate above 1 has no meaning"
            ) from error

    @property
    def sampling_rate(self) -> float:
        """Probability q with which each example, or person, is in a step's batch."""
        return self.batch_size / self.samples

    @property
    def steps(self) -> int:
        """Number of noised steps."""
        return max(1, round(self.epochs * self.samples / self.batch_size))

    @property
    def _samples(self) -> str:
        """What `samples` counts, for a message."""
        return "persons" if self.unit == "person" else "samples"

    @property
    def calibrated(self) -> bool:
        """Whether the plan has its noise."""
        return self.noise_multiplier is not None

    def calibrate(self, *, epsilon: float, delta: float) -> "DPPlan":
        """A new plan with the least noise whose whole training costs at most `epsilon` at `delta`.

        `delta` is in (0, 1 / samples); what no noise reaches raises `PlanError`.
        """
        epsilon, delta = positive("epsilon", epsilon), self._checked_delta(delta)
        noise_multiplier = noise_multiplier_for(
            epsilon=epsilon, delta=delta, sampling_rate=self.sampling_rate, steps=self.steps
        )
        return replace(self, noise_multiplier=noise_multiplier, delta=delta, target_epsilon=epsilon)

    def event(self, steps: int | None = None) -> GaussianSteps:
        """The plan's first `steps` steps, by default all, as an accountant's event."""
        if self.noise_multiplier is None:
            raise PlanError(
                "the plan has no noise yet: call plan.calibrate(epsilon=..., delta=...) or give "
                "DPPlan a noise_multiplier"
            )
        return GaussianSteps(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps if steps is None else steps,
            unit=self.unit,
        )

    def epsilon(self, delta: float | None = None) -> float:
        """What the whole training costs, at `delta` or at the plan's own."""
        return epsilon_of([self.event()], self.delta_or_own(delta))

    def delta_or_own(self, delta: float | None) -> float:
        """`delta`, or the plan's own where it is None."""
        chosen = self.delta if delta is None else delta
        if chosen is None:
            raise PlanError("delta: the plan has none; give one below 1 / samples")
        return self._checked_delta(chosen)

    def conditions(self) -> dict[str, Any]:
        """What any ε of this plan must be told with, as plain JSON values, in these words."""
        persons = {"images_per_person": self.images_per_person} if self.unit == "person" else {}
        return {
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "sampling_rate": self.sampling_rate,
            "unit": self.unit,
            **persons,
            "relation": f"add or remove one {self.unit}",
            "accountant": _SAMPLED if self.sampling_rate < 1 else _ON_ALL,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "clipping": self.clipping.to_dict()}

    @classmethod
    def from_dict(cls, values: object) -> "DPPlan":
        """Reads back what `to_dict` gave; fields that an earlier version lacked take defaults."""
        if not isinstance(values, Mapping):
            raise PlanError(f"plan: expected the values of plan.to_dict(), got {shown(values)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise PlanError(f"plan: expected the values of plan.to_dict(): {error}") from error

    def _checked_delta(self, delta: float) -> float:
        """A delta small enough that it does not allow publishing somebody's record outright."""
        number = real("delta", delta)
        if not 0 < number < 1 / self.samples:
            raise PlanError(
                f"delta: expected a probability below 1 / samples = {1 / self.samples:.3g}, got "
                f"{shown(delta)}: a larger delta would permit publishing one {self.unit} in the "
                "clear"
            )
        return number
