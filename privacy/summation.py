"""How clipped gradients are added up and noised: as floating-point numbers, or as whole numbers.

A sum of floating-point numbers and noise leaks through its last bits (Mironov 2012, CCS, "On
significance of the least significant bits for differential privacy"; for Gaussian noise Holohan and
Braghin 2021, arXiv 2107.10138), and its own rounding depends on every example. `GridSum` has
neither: clipped gradients and noise are rounded to whole multiples of a power of two.

For each sample `clip_to` says how long an example may be, `add` takes the gradients of a batch with
a factor for each example, whole or, if it raises, not at all, and `noised_mean` reduces the sum,
adds the noise, divides, gives the sum away and starts anew.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from privacy.clipping.gradients import PerExampleGradients, in_rows
from privacy.errors import PlanError
from privacy.noise import SecureGenerator

__all__ = ["FloatSum", "GridSum", "Reduce", "Summation", "alone", "grid_of"]

_CHARGE = 2.0**-10
"""Most of the clipping norm that rounding to the grid may take."""
_EXACT = 2.0**53
"""Up to here whole numbers are exact in float64, and far from the end of int64."""
_FARTHEST_NOISE = 9.0
"""No Box-Muller normal of a 53-bit uniform lies this many deviations away."""
_AT_A_TIME = 2**22
"""Numbers of per-example gradients rounded at a time."""

Gradients = Mapping[nn.Parameter, PerExampleGradients]
Factors = Mapping[nn.Parameter, Tensor]
Reduce = Callable[[Tensor], Tensor]
"""Makes of this process's part of a sum the sum over all processes."""


def alone(part: Tensor) -> Tensor:
    """The `Reduce` of one process: its part is the sum."""
    return part


@final
class FloatSum:
    """The sum in float32, or in float64 where a parameter is; a class because it adds up.

    An example moves it by its clipped gradient, up to the rounding of the sum itself.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._dtype = functools.reduce(
            torch.promote_types, (p.dtype for p in parameters), torch.float32
        )
        self._sums: dict[nn.Parameter, Tensor] = {}

    def sums(self) -> list[Tensor]:
        """The tensors themselves, in the memory order of their parameters."""
        for parameter in self._parameters:
            if parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(parameter, dtype=self._dtype)
        return [self._sums[parameter] for parameter in self._parameters]

    def check_range(self, *, examples: int, noise_multiplier: float) -> None:
        """Refuses nothing: floating-point numbers hold everything."""

    def clip_to(self, max_grad_norm: float) -> float:
        """The clipping norm itself."""
        return max_grad_norm

    def add(self, gradients: Gradients, factors: Factors) -> None:
        """Adds by each layer's own weighted sum."""
        # All sums before the first addition: running out of memory must not leave half a batch.
        added = {p: of_p.weighted_sum(factors[p]) for p, of_p in gradients.items()}
        first = {
            p: _laid_out_like(p, of_p, self._dtype)
            for p, of_p in added.items()
            if p not in self._sums
        }
        for parameter in added.keys() - first.keys():
            self._sums[parameter] += added[parameter]
        self._sums |= first

    def noised_mean(
        self,
        generator: SecureGenerator,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        batch_size: int,
        reduce: Reduce = alone,
    ) -> list[Tensor]:
        """Computed in float64, rounded once to the type of the sum, in its place."""
        released = [reduce(part) for part in self.sums()]
        self.reset()
        deviation = noise_multiplier * max_grad_norm
        generator.perturb(released, deviation=deviation, scale=1 / batch_size)
        return released

    def reset(self) -> None:
        """Lets the tensors go."""
        self._sums = {}


@final
class GridSum:
    """The sum as whole multiples of a power of two, exact; a class because it adds up.

    Guarantee: an example moves the sum by at most the clipping norm, rounding included. Rounding a
    clipped gradient to the grid makes its norm grow by at most sqrt(d) * grid / 2; examples are
    clipped to that much less, 0.05 to 0.1 percent of the clipping norm. The sum of whole numbers
    has no rounding, and noise rounded to the same grid costs nothing: the result is that of
    rounding an exact sum plus noise. To round the sum once instead would be wrong: two neighbouring
    sums may be rounded apart (sqrt(d) * grid), and the float rounding before it depends on all
    examples.

    What stays: an example's gradient must not depend on its companions in the batch, not even in
    its last bits, and the noise comes from 53-bit uniforms.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._examples = 0
        self._grid, self._limit = 0.0, 0.0
        coordinates, device = sum(p.numel() for p in parameters), parameters[0].device
        self._whole = torch.zeros(coordinates, device=device, dtype=torch.int64)

    def sums(self) -> list[Tensor]:
        """The whole numbers times the grid, float64."""
        return _split_like(self._whole.double() * self._grid, self._parameters)

    def check_range(self, *, examples: int, noise_multiplier: float) -> None:
        """Refuses what could leave the whole numbers that float64, and so int64, holds exactly."""
        norm_in_cells = math.sqrt(len(self._whole)) / _CHARGE
        if (examples + _FARTHEST_NOISE * noise_multiplier) * norm_in_cells >= _EXACT:
            raise PlanError(
                f"float_safe: {examples} examples, {len(self._whole)} parameters and a noise "
                f"multiplier of {noise_multiplier:g} could leave the whole numbers that are exact; "
                "expected fewer or less, or train with float_safe=False"
            )

    def clip_to(self, max_grad_norm: float) -> float:
        """The clipping norm less what rounding adds to a gradient's norm."""
        self._grid = grid_of(max_grad_norm, coordinates=len(self._whole))
        self._limit = (max_grad_norm / self._grid) ** 2 * (1 - 1e-12)
        return max_grad_norm - math.sqrt(len(self._whole)) * self._grid / 2

    def add(self, gradients: Gradients, factors: Factors) -> None:
        """Every gradient is formed, scaled and rounded, a few examples at a time.

        The norms of what is added are found exactly: a gradient longer than the clipping norm,
        because its factor came from an inexact norm, is made shorter.
        """
        scales = {p: of_p / self._grid for p, of_p in factors.items()}
        added, squares = self._rounded(gradients, scales)
        while bool((too_long := squares > self._limit).any()):
            shorter = torch.where(too_long, 0.99, 1.0)
            scales = {p: of_p * shorter for p, of_p in scales.items()}
            added, squares = self._rounded(gradients, scales)
        parts = _split_like(self._whole, self._parameters)
        for parameter, total in zip(self._parameters, parts, strict=True):
            if parameter in added:
                total += added[parameter].view(parameter.shape)
        self._examples += len(squares)

    def noised_mean(
        self,
        generator: SecureGenerator,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        batch_size: int,
        reduce: Reduce = alone,
    ) -> list[Tensor]:
        """Whole numbers added to whole numbers, times the grid: exact in float64."""
        self.clip_to(max_grad_norm)
        total, examples = reduce(self._whole), int(reduce(torch.tensor(self._examples)))
        self.check_range(examples=examples, noise_multiplier=noise_multiplier)
        released = torch.empty_like(total, dtype=torch.float64)
        deviation, start = noise_multiplier * max_grad_norm / self._grid, 0
        for noise in generator.normal_blocks(len(released)):
            part = slice(start, start + len(noise))
            whole = noise.mul_(deviation).round_().to(torch.int64).to(released.device)
            released[part] = whole.add_(total[part])
            start = part.stop
        self.reset()
        return _split_like(released.mul_(self._grid).div_(batch_size), self._parameters)

    def reset(self) -> None:
        """Zeroes the buffer."""
        self._whole.zero_()
        self._examples = 0

    def _rounded(
        self, gradients: Gradients, scales: Factors
    ) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """Each parameter's sum of rounded gradients, int64, and the examples' squared norms."""
        found, squares = {}, torch.zeros(1, dtype=torch.float64, device=self._whole.device)
        for parameter, of_parameter in gradients.items():
            found[parameter], of_examples = _rounded(
                of_parameter, scales[parameter], size=parameter.numel()
            )
            squares = squares + of_examples
        return found, squares


def _rounded(gradients: PerExampleGradients, scales: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """The sum of rounded gradients of one parameter, int64 [size], and their squared norms [n]."""
    total = torch.zeros(size, dtype=torch.int64, device=scales.device)
    squares = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
    rows = torch.arange(len(scales), device=scales.device)
    for some in torch.split(rows, max(1, _AT_A_TIME // size)) if len(rows) else ():
        formed = in_rows(gradients.select(some).instantiate())
        formed = formed.to(torch.promote_types(formed.dtype, torch.float32))
        whole = (formed * scales[some].to(formed.dtype)[:, None]).round_()
        squares[some] = torch.linalg.vector_norm(whole, dim=1, dtype=torch.float64).square()
        # Whole numbers below 2^53: float64 adds them without rounding, in any order.
        total += whole.sum(0, dtype=torch.float64).to(torch.int64)
    return total, squares


def grid_of(max_grad_norm: float, *, coordinates: int) -> float:
    """The power of two whose rounding takes between 2^-11 and 2^-10 of the clipping norm."""
    largest = 2 * _CHARGE * max_grad_norm / math.sqrt(coordinates)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def _laid_out_like(parameter: nn.Parameter, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in the memory layout of the parameter; a copy only if they are not."""
    laid_out = torch.empty_like(parameter, dtype=dtype)
    if values.dtype == dtype and values.stride() == laid_out.stride():
        return values
    return laid_out.copy_(values)


def _split_like(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A flat tensor as one view for each parameter, of its shape."""
    parts = torch.split(flat, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


Summation = FloatSum | GridSum
