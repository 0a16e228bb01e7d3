"""The clipped sum and the noised mean: against an oracle, and against adversarial examples."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from privacy import AdaptiveClipping
from privacy.clipping import rule_of
from privacy.clipping.gradients import Instantiated
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.differentiation import differentiate
from privacy.errors import StepError, UnsupportedLayer
from privacy.noise import SecureGenerator
from privacy.summation import Reduce, alone
from privacy.update import ClippedSum

properties = settings(deadline=None, derandomize=True, max_examples=40)
KEY = bytes(range(32))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network with a convolution, a normalisation and a linear layer."""
    layers = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def images_of(examples: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Drawn images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(examples, 1, 5, 5, generator=generator, dtype=torch.float64).to(dtype)


def losses_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A loss an example whose gradient grows with the images."""
    return model(images).square().sum(1) * images.abs().amax((1, 2, 3))


def tracked(model: nn.Module, bound: float) -> tuple[nn.Module, ClippedSum]:
    """An installed copy of the model, and its clipped sum."""
    model, tape = copy.deepcopy(model), Tape()
    install(model, tape, rule_of)
    return model, ClippedSum(dict(model.named_parameters()), tape, max_grad_norm=bound)


def flat(clipped: ClippedSum) -> torch.Tensor:
    """What was added so far, as one vector."""
    return torch.cat([total.flatten() for total in clipped.sums])


def sum_of(model: nn.Module, images: torch.Tensor, bound: float) -> torch.Tensor:
    """What the images add."""
    copied, clipped = tracked(model, bound)
    if len(images):
        clipped.add(losses_of(copied, images), torch.ones(len(images), dtype=torch.bool))
    return flat(clipped)


def oracle(model: nn.Module, images: torch.Tensor, bound: float) -> torch.Tensor:
    """One example after the other, clipped by the definition, added up."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for i in range(len(images)):
        loss = losses_of(model, images[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, parameters)
        gradient = torch.cat([g.flatten() for g in gradients]).double()
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total


@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e3])
def test_the_sum_is_that_of_the_definition(bound: float) -> None:
    """Where all, some and none of the examples are clipped."""
    model, images = network(), images_of(6)
    expected = oracle(model, images, bound)
    # Norms are rounded up by 1e-5: each clipped example comes out as much shorter.
    assert float((sum_of(model, images, bound) - expected).norm()) <= 6 * 1.1e-5 * bound


def test_an_unclipped_sum_is_the_plain_gradient() -> None:
    """With C out of reach nothing is lost: to 1e-12 the gradient of the summed losses."""
    model, images = network(), images_of(6)
    plain = torch.autograd.grad(losses_of(model, images).sum(), list(model.parameters()))
    expected = torch.cat([g.flatten() for g in plain])
    torch.testing.assert_close(sum_of(model, images, 1e9), expected, rtol=1e-10, atol=1e-12)


@properties
@given(
    exponents=st.lists(st.floats(-30, 60), min_size=1, max_size=4),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_one_example_moves_the_sum_by_at_most_the_bound(
    exponents: list[float], bound: float, seed: int
) -> None:
    """However large its gradient is, adding or removing an example moves the sum by C at most."""
    model = network()
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    images = images_of(len(exponents), seed=seed) * scales.view(-1, 1, 1, 1)
    moved = sum_of(model, images, bound) - sum_of(model, images[:-1], bound)
    rounding = 1e-12 * bound * len(exponents)
    assert float(moved.norm()) <= bound + rounding


@properties
@given(exponents=st.lists(st.floats(-10, 38), min_size=1, max_size=4), bound=st.floats(1e-3, 1e3))
def test_one_example_moves_a_float32_sum_by_at_most_the_bound(
    exponents: list[float], bound: float
) -> None:
    """The same in the precision of training, up to the rounding of the sum."""
    model = network(torch.float32)
    scales = torch.tensor([10.0**e for e in exponents]).view(-1, 1, 1, 1)
    images = images_of(len(exponents), torch.float32) * scales
    moved = sum_of(model, images, bound) - sum_of(model, images[:-1], bound)
    assert moved.isfinite().all()
    assert float(moved.double().norm()) <= bound * (1 + 1e-6 * len(exponents))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_counts_as_zero(bad: float) -> None:
    """The others are added as if it were not there; it is reported."""
    model, images = network(), images_of(4)
    spoiled = images.clone()
    spoiled[1, 0, 2, 2] = bad
    copied, clipped = tracked(model, 0.5)
    assert clipped.add(losses_of(copied, spoiled), torch.ones(4, dtype=torch.bool)) == 1
    torch.testing.assert_close(flat(clipped), sum_of(model, images[[0, 2, 3]], 0.5))


def test_a_batch_of_nothing_finite_adds_nothing() -> None:
    """All rows bad: the sum stays zero."""
    copied, clipped = tracked(network(), 0.5)
    images = torch.full((3, 1, 5, 5), torch.nan, dtype=torch.float64)
    assert clipped.add(losses_of(copied, images), torch.ones(3, dtype=torch.bool)) == 3
    assert not flat(clipped).any()


@pytest.mark.parametrize("filling", [0.0, 1.0, 1e30, float("nan")])
def test_masked_rows_contribute_nothing(filling: float) -> None:
    """Whatever stands in them, and they are not reported either."""
    model, images = network(), images_of(3)
    filled = torch.cat([images, torch.full((2, 1, 5, 5), filling, dtype=torch.float64)])
    copied, clipped = tracked(model, 0.5)
    mask = torch.tensor([True, True, True, False, False])
    assert clipped.add(losses_of(copied, filled), mask) == 0
    torch.testing.assert_close(flat(clipped), sum_of(model, images, 0.5))


@properties
@given(cuts=st.lists(st.integers(1, 6), max_size=3, unique=True))
def test_physical_batches_add_up_to_the_logical_one(cuts: list[int]) -> None:
    """Where a sample is cut changes nothing."""
    model, images = network(), images_of(7)
    copied, clipped = tracked(model, 0.5)
    edges = [0, *sorted(cuts), 7]
    for start, stop in pairwise(edges):
        losses = losses_of(copied, images[start:stop])
        clipped.add(losses, torch.ones(stop - start, dtype=torch.bool))
    torch.testing.assert_close(flat(clipped), sum_of(model, images, 0.5))


def rejected(values: torch.Tensor, deviation: float) -> bool:
    """Whether a chi-square test rejects that the values are normal with this deviation."""
    statistic = float((values.double() / deviation).square().sum())
    tail = stats.chi2(values.numel())
    return min(tail.cdf(statistic), tail.sf(statistic)) < 1e-6


def test_the_noised_mean_has_the_promised_noise() -> None:
    """Deviation sigma C / batch around the clipped sum / batch; five percent off is rejected."""
    parameter = nn.Parameter(torch.zeros(200_000))
    clipped = ClippedSum({"w": parameter}, Tape(), max_grad_norm=0.7)
    clipped.sums[0].copy_(torch.linspace(-1, 1, 200_000))
    (mean,) = clipped.noised_mean(SecureGenerator(KEY), noise_multiplier=1.3, batch_size=50)
    noise = mean - torch.linspace(-1, 1, 200_000) / 50
    deviation = 1.3 * 0.7 / 50
    assert not rejected(noise, deviation)
    assert rejected(noise, 1.05 * deviation)
    assert rejected(noise, deviation / 1.05)


@pytest.mark.parametrize("float_safe", [False, True])
def test_the_sum_over_processes_is_noised_once(float_safe: bool) -> None:
    """What `reduce` adds is in the mean and in the count; the noise is that of one process."""

    def released(reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor, float]:
        model, tape = network(), Tape()
        install(model, tape, rule_of)
        clipped = ClippedSum(
            dict(model.named_parameters()),
            tape,
            max_grad_norm=0.5,
            clipping=AdaptiveClipping(),
            float_safe=float_safe,
        )
        clipped.add(losses_of(model, images_of(4)), torch.ones(4, dtype=torch.bool))
        sums = flat(clipped).clone()
        means = clipped.noised_mean(
            SecureGenerator(KEY), noise_multiplier=1.0, batch_size=8, reduce=reduce
        )
        return sums, torch.cat([mean.flatten() for mean in means]), clipped.max_grad_norm

    sums, mean, norm = released(alone)
    _, of_three, norm_of_three = released(lambda part: 3 * part)
    torch.testing.assert_close(of_three - mean, 2 * sums / 8, rtol=1e-9, atol=1e-12)
    assert sums.any()
    assert norm != norm_of_three


def test_no_half_of_a_batch_is_added_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second gradient finds no room: the first one is not in the sum either."""
    named = {name: nn.Parameter(torch.zeros(2)) for name in ("a", "b")}
    clipped = ClippedSum(named, Tape(), max_grad_norm=1.0)
    parts = {p: Instantiated([torch.ones(1, 2)]) for p in named.values()}

    def full(parameter: nn.Parameter, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if parameter is named["b"]:
            raise MemoryError
        return values

    monkeypatch.setattr("privacy.summation._laid_out_like", full)
    with pytest.raises(MemoryError):
        clipped._add_clipped(dict(parts), torch.ones(1, dtype=torch.bool))
    assert not any(bool(total.any()) for total in clipped.sums)


def test_noise_is_independent_of_the_sum_and_drawn_anew() -> None:
    """Two releases of the same sum differ by fresh noise, and the sum starts at zero again."""
    clipped = ClippedSum({"w": nn.Parameter(torch.zeros(1000))}, Tape(), max_grad_norm=1.0)
    generator = SecureGenerator(KEY)
    clipped.sums[0].fill_(1e3)
    first = clipped.noised_mean(generator, noise_multiplier=1.0, batch_size=1)[0]
    second = clipped.noised_mean(generator, noise_multiplier=1.0, batch_size=1)[0]
    assert abs(float(second.mean())) < 1 < float(first.mean())
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_come_in_the_parameters_type(dtype: torch.dtype) -> None:
    """The sum is kept in float32 or better; what is handed out fits the parameter."""
    clipped = ClippedSum({"w": nn.Parameter(torch.zeros(3, dtype=dtype))}, Tape(), max_grad_norm=1)
    assert clipped.sums[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    (mean,) = clipped.noised_mean(SecureGenerator(KEY), noise_multiplier=1.0, batch_size=1)
    assert mean.dtype == dtype


def test_a_default_type_of_low_precision_does_not_reach_the_sum() -> None:
    """The global default dtype decides nothing about the guarantee."""
    parameter = nn.Parameter(torch.zeros(3))
    torch.set_default_dtype(torch.float16)
    try:
        clipped = ClippedSum({"w": parameter}, Tape(), max_grad_norm=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert clipped.sums[0].dtype == torch.float32


def test_a_batch_that_fails_half_way_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeating a step after running out of memory must not count an example twice."""
    copied, clipped = tracked(network(), 0.5)
    original, calls = Instantiated.weighted_sum, []

    def failing(self: Instantiated, factors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return original(self, factors)

    monkeypatch.setattr(Instantiated, "weighted_sum", failing)
    with pytest.raises(MemoryError):
        clipped.add(losses_of(copied, images_of(3)), torch.ones(3, dtype=torch.bool))
    assert not flat(clipped).any()


def test_earlier_gradients_stay_where_they_were() -> None:
    """`.grad` belongs to the user until the noised gradient is released."""
    copied, clipped = tracked(network(), 0.5)
    kept = [torch.ones_like(p) for p in copied.parameters()]
    for parameter, gradient in zip(copied.parameters(), kept, strict=True):
        parameter.grad = gradient
    clipped.add(losses_of(copied, images_of(3)), torch.ones(3, dtype=torch.bool))
    for parameter, gradient in zip(copied.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert (gradient == 1).all()


class UsesAnothersWeight(nn.Module):
    """Takes a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(inputs @ self.body.weight)


@pytest.mark.parametrize("frozen", [False, True], ids=["beside others", "alone"])
def test_a_parameter_used_outside_of_its_layer_is_refused(frozen: bool) -> None:
    """Its gradient would be the raw one; it is named, and `.grad` is left clean."""
    model, tape = UsesAnothersWeight(), Tape()
    model.head.requires_grad_(not frozen)
    install(model, tape, rule_of)
    losses = model(torch.rand(3, 4)).sum(1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(UnsupportedLayer, match=r"^body\.weight: the gradient did not come through"):
        differentiate(losses, named, tape, examples=3)
    assert all(p.grad is None for p in model.parameters())


def test_an_averaged_loss_is_refused() -> None:
    """A number instead of one loss an example: the shape and the cure are in the message."""
    copied, clipped = tracked(network(), 0.5)
    with pytest.raises(StepError, match=r"shape \[3\], got \[\].*reduction=\"none\""):
        clipped.add(losses_of(copied, images_of(3)).mean(), torch.ones(3, dtype=torch.bool))


def test_losses_without_a_graph_are_refused() -> None:
    """Computed under no_grad, there is nothing to clip."""
    copied, clipped = tracked(network(), 0.5)
    with torch.no_grad():
        losses = losses_of(copied, images_of(3))
    with pytest.raises(StepError, match="they carry no graph"):
        clipped.add(losses, torch.ones(3, dtype=torch.bool))


def test_losses_on_another_device_are_refused() -> None:
    """A model that was moved after it was attached."""
    _, clipped = tracked(network(), 0.5)
    losses = torch.ones(3, device="meta", requires_grad=True)
    with pytest.raises(StepError, match=r"expected device cpu, got meta; move the model before"):
        clipped.add(losses, torch.ones(3, dtype=torch.bool))


def test_losses_of_another_model_are_refused() -> None:
    """A graph that leads elsewhere would be a step on nothing."""
    _, clipped = tracked(network(), 0.5)
    other = network()
    with pytest.raises(StepError, match="reaches no trainable layer of the attached model"):
        clipped.add(losses_of(other, images_of(3)), torch.ones(3, dtype=torch.bool))


def test_losses_are_used_once() -> None:
    """The second time torch has no graph any more; the error is ours and says what to give."""
    copied, clipped = tracked(network(), 0.5)
    losses = losses_of(copied, images_of(3))
    clipped.add(losses, torch.ones(3, dtype=torch.bool))
    before = flat(clipped).clone()
    with pytest.raises(StepError, match="differentiated before"):
        clipped.add(losses, torch.ones(3, dtype=torch.bool))
    assert torch.equal(flat(clipped), before)


def test_reset_forgets() -> None:
    """A dropped sample leaves nothing behind."""
    copied, clipped = tracked(network(), 0.5)
    clipped.add(losses_of(copied, images_of(3)), torch.ones(3, dtype=torch.bool))
    assert flat(clipped).any()
    clipped.reset()
    assert not flat(clipped).any()
