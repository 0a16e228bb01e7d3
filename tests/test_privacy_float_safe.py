"""Clipped sum and noise as whole numbers: no low bits, and a bound without an "up to rounding"."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from privacy import DPPlan, PlanError, SecureGenerator, attach
from privacy.clipping import rule_of
from privacy.clipping.gradients import Instantiated
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.summation import FloatSum, GridSum, grid_of
from privacy.update import ClippedSum

properties = settings(deadline=None, derandomize=True, max_examples=60)
KEY = bytes(range(32))


def parameters_of(*sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Parameters of one layer."""
    return {f"p{i}": nn.Parameter(torch.zeros(n, dtype=dtype)) for i, n in enumerate(sizes)}


def summed(gradients: torch.Tensor, bound: float, *, float_safe: bool = True) -> torch.Tensor:
    """The clipped sum of given gradients [n, d], cut into two parameters; float64 [d]."""
    cut = gradients.shape[1] // 3 + 1
    named = parameters_of(cut, gradients.shape[1] - cut, dtype=gradients.dtype)
    clipped = ClippedSum(named, Tape(), max_grad_norm=bound, float_safe=float_safe)
    pieces = torch.split(gradients, [cut, gradients.shape[1] - cut], dim=1)
    parts = {p: Instantiated([piece]) for p, piece in zip(named.values(), pieces, strict=True)}
    clipped._add_clipped(dict(parts), torch.ones(len(gradients), dtype=torch.bool))
    return torch.cat([part.double() for part in clipped.sums])


def drawn(examples: int, size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(examples, size, generator=generator, dtype=torch.float64)
    exponents = torch.empty(examples, 1, dtype=torch.float64)
    exponents.uniform_(-12, 12, generator=generator)
    return (values * 10**exponents).to(dtype)


@properties
@given(
    examples=st.integers(1, 5),
    size=st.integers(2, 400),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_one_example_moves_the_sum_by_at_most_the_norm_rounding_included(
    examples: int, size: int, bound: float, seed: int, dtype: torch.dtype
) -> None:
    """Without any allowance: the numbers are whole, so the difference is exact."""
    gradients = drawn(examples, size, seed, dtype)
    moved = summed(gradients, bound) - summed(gradients[:-1], bound) if examples > 1 else None
    alone = summed(gradients[-1:], bound)
    assert float(alone.norm()) <= bound
    assert moved is None or torch.equal(moved, alone)


def test_a_sum_that_is_rounded_as_a_float_has_no_such_bound() -> None:
    """Control: among large neighbours a float32 sum moves by something else than the example."""
    gradients = torch.ones(64, 300) * torch.linspace(0.7, 1.3, 300)
    gradients[-1] *= torch.linspace(-1, 1, 300)
    floats = [summed(some, 0.37, float_safe=False) for some in (gradients, gradients[:-1])]
    alone = summed(gradients[-1:], 0.37, float_safe=False)
    assert not torch.equal(floats[0] - floats[1], alone)
    whole = [summed(some, 0.37) for some in (gradients, gradients[:-1])]
    assert torch.equal(whole[0] - whole[1], summed(gradients[-1:], 0.37))


@properties
@given(size=st.integers(1, 10**9), bound=st.floats(1e-6, 1e6))
def test_the_charge_is_the_stated_figure(size: int, bound: float) -> None:
    """The grid is a power of two, and half a cell in every coordinate is 0.05 to 0.1 percent."""
    grid = grid_of(bound, coordinates=size)
    assert math.frexp(grid)[0] == 0.5
    assert 2.0**-11 * (1 - 1e-9) <= math.sqrt(size) * grid / 2 / bound <= 2.0**-10 * (1 + 1e-9)


def test_examples_are_clipped_to_the_rest_of_the_norm() -> None:
    """What the sum says to clip to, plus its rounding, is C; the noise stays in units of C."""
    total = GridSum(list(parameters_of(1000).values()))
    rounding = math.sqrt(1000) * grid_of(0.7, coordinates=1000) / 2
    assert total.clip_to(0.7) + rounding == pytest.approx(0.7, rel=1e-15)


def test_every_number_is_rounded_to_the_nearest_cell() -> None:
    """By half a cell at most, which is what is charged; rounding down would move it by a whole."""
    gradient = drawn(1, 400, 5, torch.float64)
    gradient *= 0.5 / gradient.norm()
    grid = grid_of(1.0, coordinates=400)
    error = (summed(gradient, 1.0) - gradient[0]).abs()
    assert float(error.max()) <= grid / 2 * (1 + 1e-9)
    assert float((torch.floor(gradient[0] / grid) * grid - gradient[0]).abs().max()) > 0.9 * grid


class Liar(Instantiated):
    """Defect: gradients whose norm comes out ten times too small."""

    def squared_norms(self) -> torch.Tensor:
        return super().squared_norms() / 100


@pytest.mark.parametrize("float_safe", [True, False])
def test_a_norm_that_was_wrong_does_not_pass(float_safe: bool) -> None:
    """The whole numbers' own norm is checked; the float sum, as control, believes the kernel."""
    named = parameters_of(50)
    clipped = ClippedSum(named, Tape(), max_grad_norm=1.0, float_safe=float_safe)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1, 50, generator=generator) * 100
    clipped._add_clipped({named["p0"]: Liar([gradient])}, torch.ones(1, dtype=torch.bool))
    norm = float(clipped.sums[0].double().norm())
    assert (0.9 < norm <= 1.0) if float_safe else norm > 9


@properties
@given(seed=st.integers(0, 1000), cuts=st.integers(1, 5))
def test_neither_order_nor_cut_changes_a_bit(seed: int, cuts: int) -> None:
    """Whole numbers add up alike in any order; physical batches leave no trace."""
    gradients = drawn(6, 40, seed, torch.float32)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    whole = summed(gradients, 1.0)
    assert torch.equal(whole, summed(gradients[order], 1.0))
    assert torch.equal(whole, summed(gradients[:cuts], 1.0) + summed(gradients[cuts:], 1.0))


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_how_many_are_rounded_at_a_time_changes_nothing(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory only."""
    gradients = drawn(7, 60, 3, torch.float32)
    expected = summed(gradients, 1.0)
    monkeypatch.setattr("privacy.summation._AT_A_TIME", chunk)
    assert torch.equal(summed(gradients, 1.0), expected)


def network() -> nn.Module:
    """A small network, float64."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def network_sum(**changed: Any) -> torch.Tensor:
    """What some images add on a network, deferred layers and copies among them."""
    model, tape = network(), Tape()
    install(model, tape, rule_of)
    clipped = ClippedSum(dict(model.named_parameters()), tape, max_grad_norm=0.5, **changed)
    generator = torch.Generator().manual_seed(0)
    for copies in (1, 3):
        images = torch.rand(6 * copies, 1, 5, 5, generator=generator, dtype=torch.float64)
        losses = (3 * model(images)).square().sum(1).view(6, copies)
        clipped.add(losses, torch.ones(6, dtype=torch.bool))
    return torch.cat([total.flatten() for total in clipped.sums])


def test_the_sum_is_the_ordinary_one_up_to_the_charge() -> None:
    """On a network: each of twelve examples differs by its rounding at most."""
    difference = network_sum(float_safe=True) - network_sum()
    assert 0 < float(difference.norm()) <= 12 * 2 * 2.0**-10 * 0.5


def released(*, float_safe: bool, sums: float, size: int = 200_000) -> torch.Tensor:
    """A noised sum in float64: what the parameters get, times the batch size."""
    named = parameters_of(size, dtype=torch.float64)
    clipped = ClippedSum(named, Tape(), max_grad_norm=0.7, float_safe=float_safe)
    gradient = torch.full((1, size), sums, dtype=torch.float64)
    clipped._add_clipped({named["p0"]: Instantiated([gradient])}, torch.ones(1, dtype=torch.bool))
    (mean,) = clipped.noised_mean(SecureGenerator(KEY), noise_multiplier=1.3, batch_size=64)
    return mean * 64


@pytest.mark.parametrize("sums", [0.0, 1e-7, 1e3])
def test_bits_below_the_grid_are_zero(sums: float) -> None:
    """Whatever was added; in an ordinary sum, as control, none of them is."""
    grid = grid_of(0.7, coordinates=200_000)
    cells = released(float_safe=True, sums=sums) / grid
    assert torch.equal(cells, cells.round())
    assert float(cells.abs().max()) > 2**20
    plain = released(float_safe=False, sums=sums) / grid
    assert float((plain == plain.round()).double().mean()) < 1e-2


def test_the_noise_has_its_law() -> None:
    """Rounding does not show in the distribution; five percent off is rejected."""
    noise = released(float_safe=True, sums=0.0) / (1.3 * 0.7)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((1.05 * noise).numpy(), "norm").pvalue < 1e-9


def test_the_same_noise_rounded_is_what_is_added() -> None:
    """The result is that of rounding an exact sum plus noise: rounding the noise is free."""
    grid = grid_of(0.7, coordinates=1000)
    total = GridSum(list(parameters_of(1000).values()))
    total.clip_to(0.7)
    total._whole += torch.arange(1000) - 500
    (found,) = total.noised_mean(
        SecureGenerator(KEY), noise_multiplier=1.3, max_grad_norm=0.7, batch_size=1
    )
    exact = (torch.arange(1000) - 500) * grid + 1.3 * 0.7 * SecureGenerator(KEY).normal(1000)
    assert float((found - exact).abs().max()) <= grid / 2 * (1 + 1e-9)


PLAN = DPPlan(samples=24, batch_size=8, epochs=1, noise_multiplier=1.5, delta=1e-2, float_safe=True)


def training(plan: DPPlan) -> Any:
    """A private training on drawn data."""
    data = [(torch.rand(1, 5, 5, dtype=torch.float64), i % 2) for i in range(plan.samples)]
    model = network()
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=1.0), data)


def test_a_whole_float_safe_training_moves_on_the_grid() -> None:
    """Through attach: with lr 1 and 8 examples a step, parameters move by cells over 8."""
    private = training(PLAN)
    model, grid = private.model, grid_of(1.0, coordinates=86)
    assert sum(p.numel() for p in model.parameters()) == 86
    gradients: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    private.optimizer.register_step_pre_hook(keep)
    for images, labels in private.batches:
        private.step(nn.functional.cross_entropy(model(images), labels, reduction="none"))
    assert len(gradients) == private.steps == 3
    assert private.spent() == PLAN.epsilon()
    for gradient in gradients:
        assert torch.equal(gradient * 8 / grid, (gradient * 8 / grid).round())


def test_what_could_leave_the_exact_numbers_is_refused() -> None:
    """Before training, by the plan; and at the step, by what was really added."""
    with pytest.raises(PlanError, match=r"^float_safe: 24 examples, 86 parameters and a noise"):
        training(replace(PLAN, noise_multiplier=1e13))
    assert training(replace(PLAN, noise_multiplier=1e13, float_safe=False))
    total = GridSum(list(parameters_of(10).values()))
    with pytest.raises(PlanError, match="whole numbers that are exact"):
        total.noised_mean(
            SecureGenerator(KEY), noise_multiplier=1e13, max_grad_norm=1.0, batch_size=1
        )
    total.check_range(examples=10**9, noise_multiplier=1e3)
    FloatSum(list(parameters_of(10).values())).check_range(examples=10**9, noise_multiplier=1e13)


@properties
@given(
    size=st.integers(1, 10**4),
    examples=st.integers(1, 10**12),
    noise=st.floats(0.01, 1e13),
)
def test_whatever_is_not_refused_is_exact(size: int, examples: int, noise: float) -> None:
    """All examples in one coordinate, and the farthest noise on it: still below 2^53 cells."""
    total = GridSum(list(parameters_of(size).values()))
    try:
        total.check_range(examples=examples, noise_multiplier=noise)
    except PlanError:
        return
    largest = (examples + 8.7 * noise) / grid_of(1.0, coordinates=size)
    assert largest < 2**53
