"""Is what is left of the released gradients fresh, independent Gaussian noise of one deviation?

The clipped sums are taken off already: of an honest training every number here is an independent
standard normal one. Each check asks one thing of them, by its exact law. Small tensors are kept
whole, large ones in runs of neighbours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from privacy.audit.report import Check, at_most, joint
from privacy.statistics import (
    Numbers,
    deviations,
    disjoint_pairs,
    extreme,
    lean,
    likeness,
    magnitudes,
    odds,
    scatter,
    smallest,
    squares,
)

__all__ = ["Noise", "check_deviation", "check_freshness", "check_noise_battery", "kept_coordinates"]

_KEPT = 2**16
"""About this many coordinates of each step are kept."""
_RUN = 2048
"""Neighbours that stay together in a tensor of which not all is kept."""
_SPREADS = (0.02, 0.1, 0.3, 0.7, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
"""In deviations: the share of numbers within each is compared with the Gaussian one."""
_TOGETHER = 2**13
"""Numbers whose nearest neighbours are looked at: more would show the rounding of float32."""
_NEAR = 0.1
"""Two neighbours closer than this part of their mean distance are near."""
_LAGS = (*range(1, 17), *(2**k for k in range(5, 17)))
_FEWEST = 1000
"""Products whose sum counts as normal; its p-values are doubled all the same."""
_TOLERANCE = 0.01
"""How far the measured deviation may lie from the plan's beyond chance: rounding, low precision."""


@dataclass(frozen=True)
class Noise:
    """The noise of all steps in its planned deviations, [steps, d]: standard normal if all is well.

    `tensors` are each parameter's columns, and `rows` how long a row of it is: numbers that share
    an output.
    """

    values: Numbers
    tensors: tuple[slice, ...]
    rows: tuple[int, ...]


def kept_coordinates(sizes: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Which coordinates of a gradient are kept, int64 [k], and each tensor's columns among them."""
    share = min(1.0, _KEPT / max(1, sum(sizes)))
    parts, tensors, first, begin = [], [], 0, 0
    for size in sizes:
        runs = max(1, round(size * share / _RUN))
        part = torch.arange(first, first + size)
        if size > _RUN and share < 1:
            starts = np.unique(np.linspace(0, size - _RUN, runs).astype(int))
            part = torch.from_numpy(np.unique(first + starts[:, None] + np.arange(_RUN)))
        parts.append(part)
        tensors.append(slice(begin, begin + len(part)))
        first, begin = first + size, begin + len(part)
    return torch.cat(parts), tuple(tensors)


def check_deviation(
    residuals: Tensor, *, noise_multiplier: float, error: float
) -> tuple[Check, Check]:
    """The noise may not be less than the plan's, and nothing but it may be in the gradient.

    Noise larger than planned fails too: from outside it looks like something that depends on data.
    `residuals` are what the clipped sums leave unexplained, in clipping norms, [steps, d].
    """
    measured = float(residuals.double().square().mean().sqrt())

    def quantile(probability: float) -> float:
        """Of the root mean square of so many standard normal numbers."""
        count = residuals.numel()
        return math.sqrt(float(stats.chi2.ppf(probability, count)) / count)

    lower = (1 - _TOLERANCE) * noise_multiplier * quantile(error)
    upper = (1 + _TOLERANCE) * noise_multiplier * quantile(1 - error)

    def check(name: str, passed: bool, side: str) -> Check:
        says = f"deviation of what no clipped gradient explains, at {side} the noise multiplier"
        return Check(name=name, passed=passed, measured=measured, limit=noise_multiplier, says=says)

    return (
        check("noise", measured >= lower, "least"),
        check("nothing else", measured <= upper, "most"),
    )


def check_freshness(residuals: Tensor, *, error: float) -> Check:
    """The noise of two steps may not be alike: the difference of the two would be without noise.

    The largest correlation over all pairs of steps; of independent noise each follows Student's
    law, and the bound is corrected for their number.
    """
    steps, size = residuals.shape
    rows = torch.nn.functional.normalize(residuals.double(), dim=1)
    alike = (rows @ rows.T).fill_diagonal_(0.0).abs()
    # By steps so near to no noise at all that rounding is all there is, another check fails.
    measured = float(alike.max()) if steps > 1 else 0.0
    pairs = max(1, steps * (steps - 1) // 2)
    student = float(stats.t.isf(error / (2 * pairs), max(1, size - 1)))
    limit = student / math.sqrt(student**2 + max(1, size - 1))
    return at_most(
        "freshness", measured, limit, says="largest correlation between the noise of two steps"
    )


def check_noise_battery(noise: Noise, *, error: float) -> tuple[Check, ...]:
    """Every check of the noise, each failing an honest one with probability at most `error`."""
    batteries = {
        "noise by tensor": (_by_tensor, "the deviations of each tensor's noise"),
        "noise by step": (_by_step, "the deviations of each step's noise"),
        "noise by tensor and step": (_by_two, "the deviations of each tensor's noise in each step"),
        "noise by parameter": (_by_coordinate, "deviation and mean of each parameter's noise"),
        "noise law": (_law, "the noise being Gaussian, from its middle into its tails"),
        "noise grain": (_grain, "as many numbers that are nearly the same"),
        "noise within a step": (
            _within_a_step,
            "likenesses between a step's parameters and between its tensors",
        ),
        "noise between steps": (_between_steps, "likenesses between the noise of two steps"),
    }
    return tuple(
        joint(name, tests(noise), error=error, says=f"p-value of {words}")
        for name, (tests, words) in batteries.items()
    )


def _by_tensor(noise: Noise) -> dict[str, float]:
    """Every tensor has the plan's noise."""
    sums = np.array([np.square(noise.values[:, part]).sum() for part in noise.tensors])
    degrees = np.array([noise.values[:, part].size for part in noise.tensors])
    one, together = deviations(sums, degrees)
    return {"one tensor": one, "all tensors": together}


def _by_step(noise: Noise) -> dict[str, float]:
    """Every step has the plan's noise, without a trend or a rhythm."""
    steps, size = noise.values.shape
    sums = np.square(noise.values).sum(1)
    one, together = deviations(sums, size)
    scores = squares(sums, size)
    return {
        "one step": one,
        "all steps": together,
        "a trend": lean(scores, np.arange(steps) - (steps - 1) / 2),
        "every other step": lean(scores, (-1.0) ** np.arange(steps)),
    }


def _by_two(noise: Noise) -> dict[str, float]:
    """Every tensor has it in every step."""
    sums = np.stack([np.square(noise.values[:, part]).sum(1) for part in noise.tensors])
    one, together = deviations(sums, [[part.stop - part.start] for part in noise.tensors])
    return {"one tensor in one step": one, "all of them": together}


def _by_coordinate(noise: Noise) -> dict[str, float]:
    """Every single parameter has it, and with mean zero."""
    steps = len(noise.values)
    one, together = deviations(np.square(noise.values).sum(0), steps)
    means = noise.values.sum(0) / np.sqrt(steps)
    return {
        "one parameter": one,
        "all parameters": together,
        "one parameter's mean": extreme(means),
        "all means": scatter(means),
        "the mean of all": lean(means),
    }


def _law(noise: Noise) -> dict[str, float]:
    """The numbers are Gaussian, in the middle and in the tails: all, by tensor, by step."""
    groups = {
        "all": [noise.values],
        "one tensor": [noise.values[:, part] for part in noise.tensors],
        "one step": list(noise.values),
    }
    tests = {f"counts of {name}": _spread_odds(parts) for name, parts in groups.items()}
    uniform = np.sort(special.ndtr(noise.values), axis=None)
    ranks = np.arange(len(uniform) + 1) / len(uniform)
    farthest = max(float((ranks[1:] - uniform).max()), float((uniform - ranks[:-1]).max()))
    tests["Kolmogorov-Smirnov"] = float(stats.kstwo.sf(farthest, len(uniform)))
    return tests


def _spread_odds(parts: list[Numbers]) -> float:
    """P-value of how many numbers lie within each spread, above zero, and far on each side."""
    spreads = np.array(_SPREADS)
    inside = 2 * special.ndtr(spreads) - 1
    p_values = []
    for part in parts:
        sizes = np.sort(np.abs(part), axis=None)
        within = np.searchsorted(sizes, spreads)
        sides = [(part > 0).sum(), (part > 2).sum(), (part < -2).sum()]
        chances = [0.5, special.ndtr(-2.0), special.ndtr(-2.0)]
        p_values.append(odds([*within, *sides], part.size, [*inside, *chances]))
    return smallest(np.concatenate(p_values))


def _grain(noise: Noise) -> dict[str, float]:
    """No number comes twice, not even up to its sign or in another place: no grid, no copies."""
    step = max(1, noise.values.size // _TOGETHER)
    groups = {
        "numbers of all steps": noise.values.ravel()[::step],
        "numbers of the first steps": noise.values.ravel()[:_TOGETHER],
    }
    tests = {}
    for name, values in groups.items():
        tests[name] = _coincidences(values)
        tests[f"magnitudes, {name}"] = _coincidences(magnitudes(values))
    parts = [noise.values[:, part].ravel() for part in noise.tensors]
    each = [_coincidences(part[:: max(1, part.size // _TOGETHER)]) for part in parts]
    return {**tests, "numbers of one tensor": smallest(each)}


def _coincidences(values: Numbers) -> float:
    """P-value of the number of near neighbours; spacings scatter less than independent numbers."""
    uniform = np.sort(special.ndtr(values[:_TOGETHER]))
    near = int((np.diff(uniform) * len(uniform) < _NEAR).sum())
    # Each spacing of n uniform numbers exceeds x / n with probability (1 - x / n)^n.
    chance = 1 - (1 - _NEAR / len(uniform)) ** len(uniform)
    return float(stats.binom.sf(near - 1, len(uniform) - 1, chance)) if near else 1.0


def _within_a_step(noise: Noise) -> dict[str, float]:
    """Nothing in a step's noise is like anything else in it: neighbours, tensors, mirror images."""
    tests = {}
    for what, values in (("", noise.values), ("magnitudes, ", magnitudes(noise.values))):
        tests[f"{what}every distance"] = _by_distance(values)
        scores: dict[str, list[Numbers]] = {"parameters": [], "tensors": []}
        for name, one, other in _pairs(noise, values):
            scores[name].append(_cosines(one, other))
        for name, found in scores.items():
            if found:
                tests[f"{what}{name}, alike"] = smallest([lean(each) for each in found])
                tests[f"{what}{name}, in one step"] = extreme(np.stack(found))
                tests[f"{what}{name}, up to sign"] = smallest([scatter(each) for each in found])
    return tests


def _pairs(noise: Noise, values: Numbers) -> Iterator[tuple[str, Numbers, Numbers]]:
    """Pairs of parts that have no coordinate in common, so that they are independent."""
    size = values.shape[1]
    for lag in sorted({*_LAGS, *noise.rows}):
        for chosen in disjoint_pairs(size, lag):
            if len(chosen) > 2:
                yield "parameters", values[:, chosen], values[:, chosen + lag]
    half = size // 2
    yield "parameters", values[:, :half], values[:, half : 2 * half]
    yield "parameters", values[:, :half], values[:, ::-1][:, :half]
    for one, other in combinations(noise.tensors, 2):
        length = min(one.stop - one.start, other.stop - other.start)
        if length > 2:
            first, second = values[:, one][:, :length], values[:, other][:, :length]
            yield "tensors", first, second


def _by_distance(values: Numbers) -> float:
    """P-value of the largest sum of products at any one distance, over all steps."""
    steps, size = values.shape
    spectrum = np.fft.rfft(values, 2 * size, axis=1)
    products = np.fft.irfft(np.square(np.abs(spectrum)).sum(0), 2 * size)[1:size]
    numbers = steps * (size - np.arange(1, size))
    enough = numbers >= _FEWEST
    return min(1.0, 2 * extreme(products[enough] / np.sqrt(numbers[enough])))


def _between_steps(noise: Noise) -> dict[str, float]:
    """No step's noise is like another's: at no distance in time, in no tensor, not moved along."""
    tests = {}
    for what, values in (("", noise.values), ("magnitudes, ", magnitudes(noise.values))):
        alike = _all_pairs(values)
        steps = len(alike)
        leans, scatters = [], []
        for lag in range(1, steps // 2 + 1):
            for chosen in disjoint_pairs(steps, lag):
                leans.append(lean(alike[chosen, chosen + lag]))
                scatters.append(scatter(alike[chosen, chosen + lag]))
        tests[f"{what}at one distance"] = smallest(leans)
        tests[f"{what}at one distance, up to sign"] = smallest(scatters)
        parts = [values[:, part] for part in noise.tensors if part.stop - part.start > 2]
        upper = np.triu_indices(steps, 1)
        tests[f"{what}one tensor"] = smallest([extreme(_all_pairs(p)[upper]) for p in parts] or 1.0)
    tests["moved along or turned round"] = _moved(noise.values)
    return tests


def _moved(values: Numbers) -> float:
    """P-value of one step's noise being the last one's, shifted in a circle or read backwards."""
    size = values.shape[1]
    spectrum = np.fft.rfft(values, axis=1)
    sizes = np.linalg.norm(values, axis=1)
    found = []
    for other in (np.conj(spectrum[1:]), spectrum[1:]):
        products = np.fft.irfft(spectrum[:-1] * other, size, axis=1)
        cosines = products / np.maximum(sizes[:-1] * sizes[1:], np.finfo(float).tiny)[:, None]
        found.append(likeness(cosines, size))
    return extreme(np.stack(found))


def _all_pairs(values: Numbers) -> Numbers:
    """Normal scores of the likeness of every two steps, [steps, steps]."""
    rows = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(float).tiny)
    return likeness(rows @ rows.T, values.shape[1])


def _cosines(one: Numbers, other: Numbers) -> Numbers:
    """Normal scores of the likeness of two parts, a step each."""
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = np.einsum("td,td->t", one, other) / np.maximum(sizes, np.finfo(float).tiny)
    return likeness(products, one.shape[1])
