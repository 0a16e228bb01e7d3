"""How much of each example's gradient is kept: the deciding lines of DP-SGD, pure and alone.

A clipping is a frozen value in the plan. Whichever it is, one example moves the released sum by at
most C, the clipping norm, in L2 norm over all parameters together; noise in units of C therefore
costs the same under all of them.
"""

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from privacy.errors import PlanError
from privacy.noise import SecureGenerator
from privacy.validate import positive, real, shown

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "FlatClipping",
    "PerLayerClipping",
    "clip_factors",
    "clipping_of",
]

_ROUNDING = 1e-5
"""Relative error allowed for in a norm: each is taken this much larger, so that none passes C."""
_COUNT_GRID = 2.0**-20
"""The noise of a count is a multiple of this: a count of halves and such a number add exactly."""

SMALLEST_NORM, LARGEST_NORM = 1e-12, 1e12
"""An adaptive clipping norm stays in here, so that float32 can hold a clipped gradient."""


class Clipping(ABC):
    """How the gradient of one example is bounded by the clipping norm C."""

    kind: ClassVar[str]

    def shares(self, layers: Sequence[str]) -> list[float]:
        """What is clipped apart, as shares of C whose squares add up to 1 at most.

        One share for the whole gradient, or one a layer; a clipping for other layers is refused.
        """
        return [1.0]

    def factors(self, norms: Tensor, max_grad_norm: Tensor | float) -> Tensor:
        """Factors >= 0 with factor * norm <= C, or its share of it; flat: min(1, C / norm).

        `norms` are upper bounds on the L2 norms of what is clipped, [..., n].
        """
        return (max_grad_norm / norms).clamp(max=1.0)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Noise for the gradients over C, such that a step costs what `noise_multiplier` says.

        Refused where something else that a step releases costs more than that already.
        """
        return noise_multiplier

    def count(self, norms: Tensor, max_grad_norm: float) -> float:
        """What some examples add to the count that a step releases beside its gradient, if it does.

        At most 1/2 in size an example. `norms` are those of whole gradients [n], some perhaps not
        finite.
        """
        return 0.0

    def next_norm(
        self, max_grad_norm: float, count: float, batch_size: int, generator: SecureGenerator
    ) -> float:
        """C of the next step, given this step's and its count: a secret sum over its examples."""
        return max_grad_norm

    def to_dict(self) -> dict[str, Any]:
        """The clipping as plain JSON values; `clipping_of` reads them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **values}


@final
@dataclass(frozen=True, kw_only=True)
class FlatClipping(Clipping):
    """The whole gradient of an example, times min(1, C / norm).

    Source: Abadi et al. 2016, arXiv 1607.00133.

    Example:
        >>> FlatClipping().to_dict()
        {'kind': 'flat'}
    """

    kind: ClassVar[str] = "flat"


@final
@dataclass(frozen=True, kw_only=True)
class AutomaticClipping(Clipping):
    """The whole gradient of an example, times C / (norm + gamma): all count about the same.

    C then only scales the learning rate. An example moves the sum by less than C.

    Source: Bu, Wang, Zha and Karypis 2022, arXiv 2206.07136 (AUTO-S).

    Attributes:
        gamma: Keeps small gradients small, > 0, in units of the gradient.

    Raises:
        PlanError: Gamma is not positive.

    Example:
        >>> AutomaticClipping(gamma=1.0).factors(torch.tensor([0.0, 3.0]), 2.0)
        tensor([2.0000, 0.5000])
    """

    kind: ClassVar[str] = "automatic"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)

    def factors(self, norms: Tensor, max_grad_norm: Tensor | float) -> Tensor:
        """C / (norm + gamma)."""
        return max_grad_norm / (norms + self.gamma)


@final
@dataclass(frozen=True, kw_only=True)
class PerLayerClipping(Clipping):
    """Each layer's part of an example's gradient is clipped by itself, to its share of C.

    The squares of the shares add up to 1, so that the whole has norm C at most: C / sqrt(layers)
    each by default (McMahan et al. 2018, arXiv 1710.06963; He et al. 2023, arXiv 2212.01539).

    Attributes:
        weights: Pairs of a layer's dotted name and its weight, > 0: its share of C is the weight
            over the root of the sum of all squared weights. Every layer or none must be named.

    Raises:
        PlanError: A weight is not positive, or a layer is named twice.

    Example:
        >>> PerLayerClipping().shares(["conv", "norm", "fc1", "fc2"])
        [0.5, 0.5, 0.5, 0.5]
        >>> PerLayerClipping(weights=(("conv", 3.0), ("fc", 4.0))).shares(["conv", "fc"])
        [0.6, 0.8]
    """

    kind: ClassVar[str] = "per-layer"
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # JSON has lists where this value has tuples.
        try:
            pairs = [(str(name), weight) for name, weight in self.weights]
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"weights: expected pairs of a layer's name and its weight: {error}"
            ) from error
        checked = tuple((name, positive(f"weight of {name}", weight)) for name, weight in pairs)
        object.__setattr__(self, "weights", checked)
        if len(dict(self.weights)) != len(self.weights):
            raise PlanError("weights: expected each layer once; a name occurs twice")

    def shares(self, layers: Sequence[str]) -> list[float]:
        """One share a layer."""
        weights = dict(self.weights) or dict.fromkeys(layers, 1.0)
        if set(weights) != set(layers):
            raise PlanError(
                f"weights: expected one for each of the layers {', '.join(sorted(layers))}, got "
                f"{', '.join(sorted(weights))}"
            )
        whole = math.hypot(*weights.values())
        return [weights[layer] / whole for layer in layers]

    def to_dict(self) -> dict[str, Any]:
        """The weights as a list of pairs."""
        return {"kind": self.kind, "weights": [list(pair) for pair in self.weights]}


@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping(Clipping):
    """Flat clipping to a norm that follows a quantile of the examples' norms.

    After each step C becomes C * exp(-learning_rate * (fraction - quantile)), where `fraction` is
    the noised count of examples with a norm up to C over the plan's batch size. Within a step C is
    one number, for clipping and for noise; it starts at the plan's `max_grad_norm`.

    The count is paid for: an example moves it by 1/2 (each counts +1/2 or -1/2), so a step with
    noise z on the gradients and s on the count is one Gaussian mechanism of noise multiplier
    (z^-2 + (2 s)^-2)^(-1/2). That is the plan's `noise_multiplier`; z is solved for.

    Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv 1905.03871, theorem 1.

    Attributes:
        quantile: Share of the examples that C should not clip, in (0, 1).
        learning_rate: Of the logarithm of C, > 0.
        count_noise_multiplier: s, the noise's standard deviation in examples; more than half of the
            plan's noise multiplier.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> clipping = AdaptiveClipping(count_noise_multiplier=10.0)
        >>> round(clipping.gradient_noise_multiplier(1.0), 5)
        1.00125
    """

    kind: ClassVar[str] = "adaptive"
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_multiplier: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < real("quantile", self.quantile) < 1:
            raise PlanError(f"quantile: expected a number in (0, 1), got {shown(self.quantile)}")
        positive("learning_rate", self.learning_rate)
        positive("count_noise_multiplier", self.count_noise_multiplier)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """The z that makes gradients and count together cost `noise_multiplier`."""
        of_count = 2 * self.count_noise_multiplier
        if not noise_multiplier < of_count:
            raise PlanError(
                "count_noise_multiplier: expected more than half of the plan's noise multiplier, "
                f"{noise_multiplier / 2:g}, got {self.count_noise_multiplier:g}: the count alone "
                "would cost more than the plan allows; give it more noise"
            )
        return 1 / math.sqrt(noise_multiplier**-2 - of_count**-2)

    def count(self, norms: Tensor, max_grad_norm: float) -> float:
        """1/2 for a norm up to C, -1/2 for every other."""
        return float((norms <= max_grad_norm).sum()) - len(norms) / 2

    def next_norm(
        self, max_grad_norm: float, count: float, batch_size: int, generator: SecureGenerator
    ) -> float:
        """The geometric update, from the noised count."""
        noise = self.count_noise_multiplier * float(generator.normal(1))
        noised = count + round(noise / _COUNT_GRID) * _COUNT_GRID
        fraction = noised / batch_size + 0.5
        followed = max_grad_norm * math.exp(-self.learning_rate * (fraction - self.quantile))
        return min(max(followed, SMALLEST_NORM), LARGEST_NORM)


_KINDS: Mapping[str, type[Clipping]] = {
    clipping.kind: clipping
    for clipping in (FlatClipping, AutomaticClipping, PerLayerClipping, AdaptiveClipping)
}


def clipping_of(value: object) -> Clipping:
    """A clipping, or what its `to_dict` gave, as the clipping."""
    if isinstance(value, Clipping):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not (isinstance(value, Mapping) and isinstance(kind, str) and kind in _KINDS):
        raise PlanError(
            f"clipping: expected privacy.FlatClipping() or another clipping, or its to_dict(), got "
            f"{shown(value)}"
        )
    settings = {name: setting for name, setting in value.items() if name != "kind"}
    try:
        return _KINDS[kind](**settings)
    except (TypeError, ValueError) as error:
        raise PlanError(f"clipping: the settings of {kind} do not fit: {error}") from error


def clip_factors(
    squared_norms: Tensor, *, max_grad_norm: Tensor | float, clipping: Clipping | None = None
) -> Tensor:
    """The clipping's factors, flat by default, and 0 for a norm that is not finite.

    Guarantee: factor times true norm is at most `max_grad_norm`, C or each part's share of it,
    given squared norms, float [..., n], of what is clipped that are right to one part in 10^5:
    norms are rounded up before the division.
    """
    norms = squared_norms.sqrt() * (1 + _ROUNDING)
    factors = (clipping or FlatClipping()).factors(norms, max_grad_norm)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))
