"""The ways of clipping: each bounds what one example does, and each is paid for."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from privacy import (
    AdaptiveClipping,
    AutomaticClipping,
    DPPlan,
    FlatClipping,
    PerLayerClipping,
    PlanError,
    PrivateTraining,
    SecureGenerator,
    attach,
)
from privacy.clipping import rule_of
from privacy.clipping.factors import Clipping, clipping_of
from privacy.clipping.gradients import Instantiated
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.update import ClippedSum

properties = settings(deadline=None, derandomize=True, max_examples=40)
KEY = bytes(range(32))
CLIPPINGS: dict[str, Clipping] = {
    "flat": FlatClipping(),
    "automatic": AutomaticClipping(),
    "per layer": PerLayerClipping(),
    "per layer, weighted": PerLayerClipping(weights=(("0", 3.0), ("1", 1.0), ("4", 2.0))),
    "adaptive": AdaptiveClipping(),
}
each_clipping = pytest.mark.parametrize("clipping", CLIPPINGS.values(), ids=CLIPPINGS)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Three layers with parameters: `0`, `1` and `4`."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def images_of(examples: int, seed: int = 0) -> torch.Tensor:
    """Drawn images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(examples, 1, 5, 5, generator=generator, dtype=torch.float64)


def losses_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A loss an example whose gradient grows with the images."""
    return model(images).square().sum(1) * images.abs().amax((1, 2, 3))


def tracked(clipping: Clipping, bound: float) -> tuple[nn.Module, ClippedSum]:
    """An installed network and its clipped sum."""
    model, tape = network(), Tape()
    install(model, tape, rule_of)
    named = dict(model.named_parameters())
    return model, ClippedSum(named, tape, max_grad_norm=bound, clipping=clipping)


def added(clipping: Clipping, images: torch.Tensor, bound: float) -> ClippedSum:
    """What the images add."""
    model, clipped = tracked(clipping, bound)
    if len(images):
        clipped.add(losses_of(model, images), torch.ones(len(images), dtype=torch.bool))
    return clipped


def flat(clipped: ClippedSum) -> torch.Tensor:
    """The sum as one vector."""
    return torch.cat([total.flatten() for total in clipped.sums])


def gradients_of(model: nn.Module, images: torch.Tensor) -> list[list[torch.Tensor]]:
    """The definition: one example after the other."""
    parameters = list(model.parameters())
    return [
        list(torch.autograd.grad(losses_of(model, image.unsqueeze(0)).sum(), parameters))
        for image in images
    ]


def norm_of(gradients: Sequence[torch.Tensor]) -> float:
    """Over all of them together."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def moved_by_one(clipping: Clipping, exponents: list[float], bound: float, seed: int) -> float:
    """How far the last of some examples moves the sum."""
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64).view(-1, 1, 1, 1)
    images = images_of(len(exponents), seed) * scales
    whole, without = (added(clipping, some, bound) for some in (images, images[:-1]))
    return float((flat(whole) - flat(without)).norm())


@each_clipping
@properties
@given(
    exponents=st.lists(st.floats(-30, 60), min_size=1, max_size=3),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_one_example_moves_the_sum_by_at_most_the_norm(
    clipping: Clipping, exponents: list[float], bound: float, seed: int
) -> None:
    """Whatever the clipping, however large the gradient."""
    assert moved_by_one(clipping, exponents, bound, seed) <= bound * (1 + 1e-12 * len(exponents))


class EachLayerToTheWhole(Clipping):
    """Defect: every layer may use all of C."""

    kind = "defect"

    def shares(self, layers: Sequence[str]) -> list[float]:
        return [1.0] * len(layers)


class NotAtAll(Clipping):
    """Defect: nothing is clipped."""

    kind = "defect"

    def factors(self, norms: torch.Tensor, max_grad_norm: torch.Tensor | float) -> torch.Tensor:
        return torch.ones_like(norms)


class GammaOnTheWrongSide(Clipping):
    """Defect: what should keep a gradient small lets it grow."""

    kind = "defect"

    def factors(self, norms: torch.Tensor, max_grad_norm: torch.Tensor | float) -> torch.Tensor:
        return max_grad_norm / (norms - 0.01).abs()


@pytest.mark.parametrize("defect", [EachLayerToTheWhole, NotAtAll, GammaOnTheWrongSide])
def test_a_clipping_that_does_not_bound_is_caught(defect: type[Clipping]) -> None:
    """Control: the property above fails for each planted defect."""
    assert moved_by_one(defect(), [0.0, 2.0], 1.0, 0) > 1 + 1e-6


@each_clipping
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_contributes_nothing(clipping: Clipping, bad: float) -> None:
    """It is counted, and the others are added as if it were not there."""
    images = images_of(4)
    spoiled = images.clone()
    spoiled[1, 0, 2, 2] = bad
    model, clipped = tracked(clipping, 0.5)
    assert clipped.add(losses_of(model, spoiled), torch.ones(4, dtype=torch.bool)) == 1
    torch.testing.assert_close(flat(clipped), flat(added(clipping, images[[0, 2, 3]], 0.5)))


@each_clipping
def test_masked_rows_count_nothing(clipping: Clipping) -> None:
    """Neither in the sum nor in an adaptive clipping's count."""
    images, mask = images_of(5), torch.tensor([True, True, True, False, False])
    model, clipped = tracked(clipping, 0.5)
    clipped.add(losses_of(model, images), mask)
    alone = added(clipping, images[:3], 0.5)
    torch.testing.assert_close(flat(clipped), flat(alone))
    assert clipped._count == alone._count


def test_automatic_clipping_is_that_of_the_definition() -> None:
    """C / (norm + gamma) times each gradient, in float64."""
    images, bound, gamma = images_of(5) * 3, 0.7, 0.05
    expected = torch.zeros(sum(p.numel() for p in network().parameters()), dtype=torch.float64)
    for gradients in gradients_of(network(), images):
        whole = torch.cat([g.flatten() for g in gradients])
        expected += whole * bound / (norm_of(gradients) + gamma)
    found = flat(added(AutomaticClipping(gamma=gamma), images, bound))
    assert float((found - expected).norm()) <= 5 * 1.1e-5 * bound


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_per_layer_clipping_is_that_of_the_definition(weights: tuple[float, ...]) -> None:
    """Weight and bias of a layer together, each layer to its share of C."""
    images, bound = images_of(5) * 3, 0.1
    named = tuple(zip(["0", "1", "4"], weights, strict=True))
    clipping = PerLayerClipping(weights=named) if len(set(weights)) > 1 else PerLayerClipping()
    expected = [torch.zeros_like(p) for p in network().parameters()]
    for gradients in gradients_of(network(), images):
        for layer, weight in enumerate(weights):
            of_layer = gradients[2 * layer : 2 * layer + 2]
            share = bound * weight / math.hypot(*weights)
            factor = min(1.0, share / norm_of(of_layer))
            for total, gradient in zip(expected[2 * layer :], of_layer, strict=False):
                total += factor * gradient
    found = flat(added(clipping, images, bound))
    expected_flat = torch.cat([total.flatten() for total in expected])
    assert float((found - expected_flat).norm()) <= 5 * 1.1e-5 * bound


@pytest.mark.parametrize("layers", [("0", "1"), ("0", "1", "4", "7"), ("0", "1", "5")])
def test_weights_for_other_layers_are_refused(layers: tuple[str, ...]) -> None:
    """A layer without a weight would have no bound."""
    clipping = PerLayerClipping(weights=tuple((layer, 1.0) for layer in layers))
    with pytest.raises(PlanError, match=r"^weights: expected one for each of the layers 0, 1, 4"):
        tracked(clipping, 1.0)


@properties
@given(noise=st.floats(1e-2, 19.9), count_noise=st.floats(0.1, 1e3))
def test_gradients_and_count_together_cost_what_the_plan_says(
    noise: float, count_noise: float
) -> None:
    """(z^-2 + (2 s)^-2)^(-1/2) is the plan's multiplier; where it cannot be, it is refused."""
    clipping = AdaptiveClipping(count_noise_multiplier=count_noise)
    if noise >= 2 * count_noise:
        with pytest.raises(PlanError, match=r"^count_noise_multiplier: expected more than half"):
            clipping.gradient_noise_multiplier(noise)
        return
    z = clipping.gradient_noise_multiplier(noise)
    assert (z**-2 + (2 * count_noise) ** -2) ** -0.5 == pytest.approx(noise, rel=1e-6)
    assert z > noise


class CountsWithoutHalf(Clipping):
    """Defect: a count of ones and zeros, whose sensitivity is twice as large."""

    kind = "defect"

    def count(self, norms: torch.Tensor, max_grad_norm: float) -> float:
        return float((norms <= max_grad_norm).sum())


def whitened_move(clipping: Clipping, images: torch.Tensor) -> float:
    """How far one example moves gradients and count together, in deviations of their noise."""
    whole, without = added(clipping, images, 0.5), added(clipping, images[:-1], 0.5)
    of_sum = float((flat(whole) - flat(without)).norm()) / (1.25 * 0.5)
    # 1.25 and 1.0 are one mechanism of multiplier (1.25^-2 + (2 * 1.0)^-2)^(-1/2) = 1.06.
    return math.hypot(of_sum, (whole._count - without._count) / 1.0)


@properties
@given(exponents=st.lists(st.floats(-10, 10), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_one_example_moves_gradients_and_count_by_one_deviation_of_the_plan(
    exponents: list[float], seed: int
) -> None:
    """As the one Gaussian mechanism that the accountant is told of."""
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64).view(-1, 1, 1, 1)
    images = images_of(len(exponents), seed) * scales
    together = (1.25**-2 + 2.0**-2) ** 0.5
    assert whitened_move(AdaptiveClipping(), images) <= together * (1 + 1e-9)


def test_a_count_of_ones_would_cost_more() -> None:
    """Control: an example that is just within C moves such a count by 1."""
    together = (1.25**-2 + 2.0**-2) ** 0.5
    image = images_of(1)
    scale = 0.49999 / norm_of(gradients_of(network(), image)[0])
    model, tape = network(), Tape()
    install(model, tape, rule_of)
    clipping = CountsWithoutHalf()
    named = dict(model.named_parameters())
    clipped = ClippedSum(named, tape, max_grad_norm=0.5, clipping=clipping)
    clipped.add(scale * losses_of(model, image), torch.ones(1, dtype=torch.bool))
    moved = math.hypot(float(flat(clipped).norm()) / (1.25 * 0.5), clipped._count)
    assert moved > 1.3 * together


@properties
@given(cuts=st.lists(st.integers(1, 6), max_size=3, unique=True))
def test_the_norm_adapts_once_a_sample_to_the_noised_count(cuts: list[int]) -> None:
    """However the sample is cut; by the definition, with the public batch size and our noise."""
    clipping = AdaptiveClipping(quantile=0.3, learning_rate=0.4, count_noise_multiplier=2.0)
    images, bound, batch_size = images_of(7) * 2, 0.5, 16
    norms = torch.tensor([norm_of(g) for g in gradients_of(network(), images)])
    bound = float(norms.median()) * 1.001
    model, clipped = tracked(clipping, bound)
    for start, stop in pairwise([0, *sorted(cuts), 7]):
        mask = torch.ones(stop - start, dtype=torch.bool)
        clipped.add(losses_of(model, images[start:stop]), mask)
        assert clipped.max_grad_norm == bound
    clipped.noised_mean(SecureGenerator(KEY), noise_multiplier=1.0, batch_size=batch_size)
    twin = SecureGenerator(KEY)
    twin.normal(flat(clipped).numel())
    noise = 2.0 * float(twin.normal(1))
    within = int((norms <= bound).sum())
    fraction = (within - 7 / 2 + noise) / batch_size + 1 / 2
    assert within == 4
    assert clipped.max_grad_norm == pytest.approx(
        bound * math.exp(-0.4 * (fraction - 0.3)), rel=1e-5
    )
    assert clipped._count == 0


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_norm_comes_to_its_quantile(quantile: float) -> None:
    """From far above and from far below; with little noise on the count."""
    norms = torch.linspace(1, 11, 101, dtype=torch.float64)
    clipping = AdaptiveClipping(quantile=quantile, count_noise_multiplier=0.5)
    for bound in (0.01, 1000.0):
        generator = SecureGenerator(KEY)
        for _ in range(400):
            bound = clipping.next_norm(bound, clipping.count(norms, bound), 101, generator)
        assert bound == pytest.approx(1 + 10 * quantile, rel=0.1)


def test_the_count_is_noised_from_the_secure_generator() -> None:
    """Its deviation is the multiplier; no seed moves it; twenty percent off is rejected."""
    clipping = AdaptiveClipping(learning_rate=1.0, count_noise_multiplier=3.0)
    generator = SecureGenerator(KEY)
    logs = []
    for draw in range(10_000):
        if draw % 100 == 0:
            torch.manual_seed(0)
        logs.append(math.log(clipping.next_norm(1.0, 0.0, 100, generator)))
    noise = -torch.tensor(logs, dtype=torch.float64) * 100 / 3.0
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((1.2 * noise).numpy(), "norm").pvalue < 1e-6


def rejected(values: torch.Tensor, deviation: float) -> bool:
    """Whether a chi-square test rejects that the values are normal with this deviation."""
    statistic = float((values.double() / deviation).square().sum())
    tail = stats.chi2(values.numel())
    return min(tail.cdf(statistic), tail.sf(statistic)) < 1e-6


def test_noise_and_clipping_use_one_norm_in_every_step() -> None:
    """After the norm has moved, noise moves with it; the norm of before is rejected."""
    clipping = AdaptiveClipping(learning_rate=5.0, count_noise_multiplier=2.0)
    parameter, generator = nn.Parameter(torch.zeros(100_000)), SecureGenerator(KEY)
    clipped = ClippedSum({"w": parameter}, Tape(), max_grad_norm=1.0, clipping=clipping)
    z, seen = clipping.gradient_noise_multiplier(1.5), []
    for _ in range(4):
        norm = clipped.max_grad_norm
        seen.append(norm)
        (mean,) = clipped.noised_mean(generator, noise_multiplier=1.5, batch_size=10)
        assert not rejected(mean, z * norm / 10)
        assert rejected(mean, z * clipped.max_grad_norm / 10)
    assert len(set(seen)) == 4


@pytest.mark.parametrize("float_safe", [False, True])
@pytest.mark.parametrize("quantile", [0.01, 0.99])
def test_clipping_follows_the_norm_that_the_noise_follows(
    quantile: float, float_safe: bool
) -> None:
    """Falling or rising: in every step a large gradient is cut to that step's norm."""
    clipping = AdaptiveClipping(quantile=quantile, learning_rate=1.0, count_noise_multiplier=1.0)
    parameter, generator = nn.Parameter(torch.zeros(100)), SecureGenerator(KEY)
    clipped = ClippedSum(
        {"w": parameter}, Tape(), max_grad_norm=1.0, clipping=clipping, float_safe=float_safe
    )
    seen = []
    for _ in range(4):
        seen.append(clipped.max_grad_norm)
        part = Instantiated([torch.full((1, 100), 1e6)])
        clipped._add_clipped({parameter: part}, torch.ones(1, dtype=torch.bool))
        norm = float(clipped.sums[0].double().norm())
        assert 0.998 * seen[-1] <= norm <= seen[-1]
        clipped.noised_mean(generator, noise_multiplier=0.5, batch_size=10)
    assert min(seen[-1] / seen[0], seen[0] / seen[-1]) < 0.9


@each_clipping
@pytest.mark.parametrize("float_safe", [False, True])
def test_a_plan_with_any_clipping_survives_json(clipping: Clipping, float_safe: bool) -> None:
    """Its values are plain, and two plans that clip differently are not equal."""
    plan = DPPlan(samples=100, batch_size=10, epochs=1, clipping=clipping, float_safe=float_safe)
    read = json.loads(json.dumps(plan.to_dict()))
    assert read == plan.to_dict()
    assert DPPlan(**read) == DPPlan.from_dict(read) == plan
    assert hash(DPPlan(**read)) == hash(plan)
    assert plan != replace(plan, clipping=AutomaticClipping(gamma=7.0))
    assert plan != replace(plan, float_safe=not float_safe)


def test_a_plan_of_before_is_flat() -> None:
    """What it did not say has its default."""
    old = {"samples": 100, "batch_size": 10, "epochs": 1, "max_grad_norm": 1.0}
    assert DPPlan.from_dict(old) == DPPlan(samples=100, batch_size=10, epochs=1)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "gamma": (lambda: AutomaticClipping(gamma=0.0), r"^gamma: expected a finite number > 0"),
    "weight": (lambda: PerLayerClipping(weights=(("a", -1.0),)), r"^weight of a: expected"),
    "twice": (lambda: PerLayerClipping(weights=(("a", 1.0), ("a", 2.0))), "occurs twice"),
    "quantile": (lambda: AdaptiveClipping(quantile=1.0), r"^quantile: expected a number in"),
    "rate": (lambda: AdaptiveClipping(learning_rate=0.0), r"^learning_rate: expected"),
    "count": (lambda: AdaptiveClipping(count_noise_multiplier=math.nan), r"^count_noise_mul"),
    "kind": (lambda: clipping_of({"kind": "harsh"}), r"^clipping: expected privacy\.Flat"),
    "unhashable kind": (lambda: clipping_of({"kind": []}), r"^clipping: expected privacy\.Flat"),
    "text": (lambda: clipping_of("flat"), r"^clipping: expected privacy\.FlatClipping"),
    "setting": (lambda: clipping_of({"kind": "flat", "gamma": 1}), r"^clipping: the settings of"),
    "value": (lambda: clipping_of({"kind": "automatic", "gamma": "x"}), r"^clipping: the settin"),
    "no plan": (lambda: DPPlan.from_dict(None), r"^plan: expected the values of"),
    "not a plan's": (lambda: DPPlan.from_dict({"rows": 1}), r"^plan: expected the values of"),
    "too little on the count": (
        lambda: DPPlan(
            samples=9, batch_size=3, epochs=1, noise_multiplier=20.0, clipping=AdaptiveClipping()
        ),
        r"^count_noise_multiplier: expected more than half of the plan's noise multiplier, 10",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_refused_by_name(kind: str) -> None:
    """One error with the name of the value."""
    make, message = BAD[kind]
    with pytest.raises(PlanError, match=message):
        make()


def attached(**changed: Any) -> PrivateTraining:
    """A private training on drawn data whose secret is known."""
    data = [(image.float(), i % 2) for i, image in enumerate(images_of(24))]
    plan = DPPlan(
        samples=24, batch_size=8, epochs=1, noise_multiplier=1.5, delta=1e-2, max_grad_norm=0.5
    )
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = attach(replace(plan, **changed), model, optimizer, data)
    private._generator = SecureGenerator(KEY)
    return private


def step(private: PrivateTraining, batches: Any) -> None:
    """One step on the next batch."""
    images, labels = next(batches)
    losses = nn.functional.cross_entropy(private.model(images), labels, reduction="none")
    assert private.step(losses)


@each_clipping
@pytest.mark.parametrize("float_safe", [False, True])
def test_a_whole_training_spends_the_plans_epsilon(clipping: Clipping, float_safe: bool) -> None:
    """The same for every clipping: what differs is inside of the sensitivity."""
    private = attached(clipping=clipping, float_safe=float_safe)
    batches = private.batches
    for _ in range(private.plan.steps):
        step(private, batches)
    assert private.spent() == private.plan.epsilon() == attached().plan.epsilon()
    assert all(p.isfinite().all() for p in private.model.parameters())
    changes = private.max_grad_norm != private.plan.max_grad_norm
    assert changes == isinstance(clipping, AdaptiveClipping)


def test_an_adapted_norm_is_resumed() -> None:
    """From the state, through JSON; not from the plan."""
    private = attached(clipping=AdaptiveClipping())
    step(private, private.batches)
    state = json.loads(json.dumps(private.state_dict()))
    resumed = attached(clipping=AdaptiveClipping())
    resumed.load_state_dict(state)
    assert resumed.max_grad_norm == private.max_grad_norm != 0.5
    assert resumed.steps == 1


@pytest.mark.parametrize("norm", [None, 0.0, -1.0, math.nan, math.inf, "0.5"])
def test_a_state_without_its_norm_is_refused(norm: object) -> None:
    """An adaptive clipping cannot start anew, and nothing else is changed by the attempt."""
    private = attached(clipping=AdaptiveClipping())
    step(private, private.batches)
    resumed = attached(clipping=AdaptiveClipping())
    with pytest.raises(PlanError, match=r"^max_grad_norm: expected the clipping norm that"):
        resumed.load_state_dict({**private.state_dict(), "max_grad_norm": norm})
    assert (resumed.steps, resumed.max_grad_norm) == (0, 0.5)


def test_a_fixed_norm_cannot_be_moved_by_a_state() -> None:
    """A state of before has none; one with another than the plan's is damaged."""
    private = attached()
    state = private.state_dict()
    del state["max_grad_norm"]
    private.load_state_dict(state)
    with pytest.raises(PlanError, match=r"^max_grad_norm: "):
        private.load_state_dict({**state, "max_grad_norm": 0.4})


def test_a_state_of_another_clipping_is_refused() -> None:
    """The plan says how it clips."""
    state = attached(clipping=AutomaticClipping()).state_dict()
    with pytest.raises(PlanError, match=r"^plan: the checkpoint was trained under.*automatic"):
        attached().load_state_dict(state)
