"""Certified noisy fine-tuning: its curve against sampled pairs, and the steps that are counted."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from privacy import PlanError, SecureGenerator
from privacy.errors import UnlearningError
from privacy.statistics import clopper_pearson
from privacy.unlearning import NoisyFinetuning, noisy_finetune, noisy_finetuning

Numbers = np.ndarray
ERROR = 1e-7
"""Of each bound on a rate; at most four are in a test, which so fails by chance with 4e-7."""


def planned(**changed: Any) -> NoisyFinetuning:
    """A plan of a few steps, with noise."""
    settings = {"initial_norm": 1.0, "gradient_norm": 1.0, "learning_rate": 0.1, "steps": 8}
    return NoisyFinetuning(**{**settings, "noise_deviation": 0.5, **changed})


def noise_as_published(plan: NoisyFinetuning, renyi: float) -> NoisyFinetuning:
    """The published code's noise: Rényi divergence alpha * renyi, with 4 for 2 without decay."""
    rate = plan.learning_rate * plan.weight_decay
    divisor = 2 if rate else 4
    hidden = sum((1 - rate) ** (2 * t) for t in range(plan.steps))
    return planned(
        **{name: getattr(plan, name) for name in ("initial_norm", "gradient_norm", "steps")},
        learning_rate=plan.learning_rate,
        weight_decay=plan.weight_decay,
        noise_deviation=plan.distance / math.sqrt(divisor * renyi * hidden),
    )


def logged_as_published(renyi: float, delta: float) -> float:
    """The epsilon that it logs: the divergence is taken to be the same at all orders to 1,000."""
    return min(renyi + math.log(1 / delta) / (order - 1) for order in range(2, 1001))


def independent_delta(mu: float, epsilon: float) -> float:
    """The area between two normal densities, one times e^epsilon, by summing it up."""
    x = np.linspace(-40, 40 + mu, 200_001)
    above = stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x)
    return float(np.maximum(above, 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-9, 0.5, 9.9])
def test_the_cost_is_that_of_the_best_way_to_hide_the_distance(weight_decay: float) -> None:
    """Shares found by an optimiser that knows no formula, each at most what is left to hide."""
    plan = planned(weight_decay=weight_decay, steps=5, gradient_norm=0.7, initial_norm=0.4)
    kept, apart = 1 - 0.1 * weight_decay, 2 * 0.1 * 0.7

    def left(shares: Numbers) -> Numbers:
        far, found = 2 * 0.4, []
        for share in shares:
            far = kept * far + apart - share
            found.append(far)
        return np.array(found)

    best = optimize.minimize(
        lambda shares: float((shares**2).sum()),
        np.full(5, 0.3),
        jac=lambda shares: 2 * shares,
        constraints=[
            {"type": "eq", "fun": lambda shares: left(shares)[-1]},
            {"type": "ineq", "fun": lambda shares: left(shares)[:-1]},
        ],
        options={"ftol": 1e-14},
    )
    assert best.success
    assert plan.mu == pytest.approx(math.sqrt(best.fun) / 0.5, rel=1e-6)


def test_without_steps_to_shrink_in_the_formulas_are_the_papers() -> None:
    """Of section 3: with and without decay; and a decay of nearly none is none."""
    plan = planned(weight_decay=2.0)
    kept, rate = 0.8**8, 0.2
    assert plan.distance == pytest.approx(2 * kept + 2 / 2.0 * (1 - kept))
    assert plan.mu == pytest.approx(
        plan.distance / math.sqrt(0.25 * (1 - kept**2) / (rate * (2 - rate)))
    )
    without = planned()
    assert without.distance == pytest.approx(2 + 2 * 0.1 * 8)
    assert without.mu == pytest.approx(without.distance / (0.5 * math.sqrt(8)))
    assert planned(weight_decay=1e-12).mu == pytest.approx(without.mu, rel=1e-9)


def test_epsilon_and_delta_are_a_gaussians() -> None:
    """Against an integral; they are each other's inverse, and never above the Rényi bound's."""
    plan = planned(weight_decay=1.0, noise_deviation=1.0)
    for epsilon in (0.0, 0.5, 3.0):
        assert plan.delta(epsilon) == pytest.approx(independent_delta(plan.mu, epsilon), rel=1e-5)
    assert plan.delta(plan.epsilon(1e-5)) == pytest.approx(1e-5)
    renyi = plan.mu**2 / 2
    assert plan.epsilon(1e-5) < renyi + 2 * math.sqrt(renyi * math.log(1e5))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_calibration_finds_the_least_noise(epsilon: float, weight_decay: float) -> None:
    """A thousandth less would not do."""
    plan = planned(weight_decay=weight_decay).calibrate(epsilon=epsilon, delta=1e-6)
    assert plan.epsilon(1e-6) <= epsilon
    assert plan.noise_deviation is not None
    less = planned(weight_decay=weight_decay, noise_deviation=0.999 * plan.noise_deviation)
    assert less.epsilon(1e-6) > epsilon


def drifting(plan: NoisyFinetuning, side: float, runs: int, *, apart: bool) -> Numbers:
    """Ends of one-dimensional runs that begin at C0 on a side; every gradient leads outwards.

    Where `apart`, away from the other run wherever that is: as far as the bound allows. Else away
    from zero, which one function of the place does, so that this is a training that can be.
    """
    random = np.random.default_rng([7, int(side > 0), int(apart)])
    assert plan.noise_deviation is not None
    x = np.full(runs, side * plan.initial_norm)
    for _ in range(plan.steps):
        outwards = side if apart else np.sign(x)
        x = (1 - plan.learning_rate * plan.weight_decay) * x
        x = x + plan.learning_rate * plan.gradient_norm * outwards
        x = x + plan.noise_deviation * random.standard_normal(runs)
    return x


def delta_bounds(ends: Numbers, others: Numbers, epsilon: float, cut: float) -> tuple[float, float]:
    """Bounds on P(end > cut) - e^epsilon P(other > cut), each wrong with 2e-7 at most."""
    found = clopper_pearson(int((ends > cut).sum()), len(ends), error=ERROR)
    beside = clopper_pearson(int((others > cut).sum()), len(others), error=ERROR)
    factor = math.exp(epsilon)
    return found[0] - factor * beside[1], found[1] - factor * beside[0]


def best_cut(plan: NoisyFinetuning, epsilon: float) -> float:
    """Where two normal ends, `distance` apart around zero, are e^epsilon times as likely."""
    return plan.distance * epsilon / plan.mu**2


@pytest.mark.parametrize("renyi", [0.5, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_the_worst_pair_lies_on_our_curve_and_far_above_what_the_published_code_logs(
    renyi: float, weight_decay: float
) -> None:
    """Sampled ends of runs as far apart as allowed; the noise is that of the published code.

    Exact Clopper-Pearson bounds: it fails by chance with a probability of 4e-7 at most.
    """
    plan = noise_as_published(planned(weight_decay=weight_decay), renyi)
    epsilon = logged_as_published(renyi, 1e-5)
    ends, others = (drifting(plan, side, 100_000, apart=True) for side in (1.0, -1.0))
    low, high = delta_bounds(ends, others, epsilon, best_cut(plan, epsilon))
    assert low <= plan.delta(epsilon) <= high
    assert low > 1_000 * 1e-5


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_a_training_that_can_be_lies_below_our_curve_and_above_the_published_one(
    weight_decay: float,
) -> None:
    """One loss for both runs, that leads outwards. Fails by chance with 4e-7 at most."""
    plan = noise_as_published(planned(weight_decay=weight_decay), 1.0)
    epsilon = logged_as_published(1.0, 1e-5)
    ends, others = (drifting(plan, side, 100_000, apart=False) for side in (1.0, -1.0))
    low, _ = delta_bounds(ends, others, epsilon, best_cut(plan, epsilon))
    assert 1_000 * 1e-5 < low <= plan.delta(epsilon)


def test_the_published_code_logs_a_sixth_of_what_its_noise_costs() -> None:
    """The table of our notes: epsilon at delta = 1e-5 of the Gaussian that its noise makes."""
    for renyi, decayed, without in ((0.1, 1.76, 2.59), (1.0, 6.57, 10.0), (10.0, 28.4, 46.2)):
        for weight_decay, true in ((1.0, decayed), (0.0, without)):
            plan = noise_as_published(planned(weight_decay=weight_decay), renyi)
            assert plan.epsilon(1e-5) == pytest.approx(true, rel=5e-3)
            assert logged_as_published(renyi, 1e-5) < 1.2 * renyi


class Place(nn.Module):
    """One weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.weight


def outwards(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """A loss whose gradient, of length 100, leads away from zero."""
    found: Tensor = -100 * model(images).abs()
    return found


@pytest.mark.secret
def test_our_own_steps_lie_on_the_curve_and_above_the_published_one() -> None:
    """The worst training of one step, by `noisy_finetune`, reaches the curve.

    Weights begin far outside of the ball and the gradient is far too long, so that both clippings
    count. It fails by chance with a probability of 4e-7 at most.
    """
    plan = noise_as_published(planned(weight_decay=1.0, steps=1), 1.0)
    epsilon = logged_as_published(1.0, 1e-5)

    def ends(side: float) -> Numbers:
        found = []
        for _ in range(1_000):
            model = Place(50 * side)
            noisy_finetune(model, [(torch.ones(1), torch.ones(1))], outwards, plan)
            found.append(float(model.weight.detach()))
        return np.array(found)

    low, high = delta_bounds(ends(1.0), ends(-1.0), epsilon, best_cut(plan, epsilon))
    assert 1e-5 < low <= plan.delta(epsilon) <= high


def net() -> nn.Sequential:
    """Weights of two layers."""
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """A loss an image."""
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


BATCHES = [(torch.linspace(-3, 3, 30).reshape(6, 5) * k, torch.arange(6) % 3) for k in (1, 2, 3)]
DOUBLE = [(images.double(), labels) for images, labels in BATCHES]


def test_the_steps_are_those_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out: clipped weights, then clipped gradients, decay and the generator's numbers."""
    key = bytes(range(32))
    monkeypatch.setattr(noisy_finetuning, "SecureGenerator", lambda: SecureGenerator(key))
    plan = planned(weight_decay=0.5, steps=5, gradient_norm=0.05, noise_deviation=0.01)
    model = net().double()
    twin = net().double()
    twin.load_state_dict(model.state_dict())
    noisy_finetune(model, DOUBLE, cross_entropy, plan)
    generator, count = SecureGenerator(key), sum(p.numel() for p in twin.parameters())
    x = nn.utils.parameters_to_vector(twin.parameters()).detach()
    x = x / max(1.0, float(x.norm()))
    for step in range(5):
        nn.utils.vector_to_parameters(x.clone(), twin.parameters())
        twin.zero_grad()
        cross_entropy(twin, *DOUBLE[step % 3]).mean().backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
        gradient = gradient * min(1.0, 0.05 / float(gradient.norm()))
        x = x - 0.1 * (gradient + 0.5 * x) + 0.01 * generator.normal(count)
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(model.parameters()).detach(), x, rtol=1e-7, atol=1e-9
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.secret
def test_no_seed_moves_the_noise_and_the_noise_moves_no_generator() -> None:
    """Two runs from one seed differ, and torch draws what it would have drawn.

    By chance they agree with a probability below 1e-6: 39 numbers of 24 bits.
    """
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        model = net()
        expected = torch.get_rng_state()
        noisy_finetune(model, BATCHES, cross_entropy, planned())
        assert torch.equal(torch.get_rng_state(), expected)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert not torch.equal(*ends)


def test_named_parameters_alone_are_trained() -> None:
    """What is frozen stays, bit for bit, and does not count in the norms."""
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(1e6)
    model[0].requires_grad_(False)
    before = model[2].weight.detach().clone()
    plan = planned(initial_norm=100.0, noise_deviation=1e-6, learning_rate=1e-6)
    noisy_finetune(model, BATCHES, cross_entropy, plan, trained=["2.weight"])
    assert (model[0].weight == 1e6).all()
    assert 0 < float((model[2].weight.detach() - before).norm()) < 1e-3


def test_it_forgets_and_it_learns() -> None:
    """From weights of a norm far outside of the ball to a model that is right about who stays."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    images = torch.eye(5)[torch.arange(60) % 3]
    data = [(images, torch.arange(60) % 3)]
    plan = planned(
        initial_norm=2.0, gradient_norm=5.0, learning_rate=0.5, steps=60, noise_deviation=0.01
    )
    noisy_finetune(model, data, cross_entropy, plan)
    assert (model(images).argmax(1) == data[0][1]).all()


def infinite(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """No finite gradient."""
    return model(images).sum() * math.inf


class Counting(nn.Module):
    """Keeps a number of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        found: Tensor = self.layer(images)
        return found


def diverged() -> nn.Module:
    """A weight that is not finite."""
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


REFUSED = {
    "no module": (lambda: "net", BATCHES, cross_entropy, None, "expected a torch.nn.Module"),
    "weights": (diverged, BATCHES, cross_entropy, None, "expected finite weights"),
    "no loss": (net, BATCHES, "loss", None, "loss: expected a function"),
    "a loss of text": (net, BATCHES, lambda *_: "1", None, "loss: expected a tensor"),
    "a constant": (net, BATCHES, lambda *_: torch.ones(2), None, "depends on the trained"),
    "infinite": (net, BATCHES, infinite, None, "expected a finite gradient, .* in step 1"),
    "no batch": (net, [], cross_entropy, None, "batches: expected one for each step"),
    "too few": (net, iter(BATCHES), cross_entropy, None, "batches: expected one for each step"),
    "no pairs": (net, [torch.ones(2, 5)], cross_entropy, None, "expected pairs of images"),
    "no batches": (net, 3, cross_entropy, None, "expected pairs of images"),
    "statistics": (Counting, BATCHES, cross_entropy, None, "seen: expected a model that keeps"),
    "names": (net, BATCHES, cross_entropy, ["3.weight"], r"names of the model's .* \['3.weight'\]"),
    "no name": (net, BATCHES, cross_entropy, [], "names of the model's"),
    "a text": (net, BATCHES, cross_entropy, "0.weight", "expected names of parameters"),
    "frozen": (
        *(lambda: net().requires_grad_(False), BATCHES, cross_entropy, ["0.bias"]),
        "0.bias: expected parameters that are trained",
    ),
}


@pytest.mark.parametrize(
    ("make", "batches", "loss", "trained", "says"), REFUSED.values(), ids=REFUSED
)
def test_what_cannot_be_promised_is_refused_and_nothing_changed(
    make: Any, batches: Any, loss: Any, trained: Any, says: str
) -> None:
    """In our words."""
    model = make()
    state = {k: v.clone() for k, v in getattr(model, "state_dict", dict)().items()}
    with pytest.raises(UnlearningError, match=says):
        noisy_finetune(model, batches, loss, planned(), trained=trained)
    for name, value in state.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_an_error_of_the_callers_own_passes_and_nothing_is_changed() -> None:
    """Late, in the third step; Ctrl-C too."""

    def interrupted() -> Any:
        yield from BATCHES[:2]
        raise KeyboardInterrupt

    model = net()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with pytest.raises(KeyboardInterrupt):
        noisy_finetune(model, interrupted(), cross_entropy, planned())
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_norm": 0.0},
        {"gradient_norm": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": "0.1"},
        {"weight_decay": 10.0},
        {"weight_decay": -0.1},
        {"steps": 0},
        {"steps": 2.5},
        {"noise_deviation": 0.0},
    ],
    ids=str,
)
def test_a_plan_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    """By the name of its value."""
    with pytest.raises(PlanError, match=next(iter(wrong))):
        planned(**wrong)


def test_a_plan_without_noise_promises_nothing() -> None:
    """Nor does one that was asked for what no noise gives."""
    plan = planned(noise_deviation=None)
    with pytest.raises(PlanError, match="no noise yet"):
        plan.epsilon(1e-5)
    with pytest.raises(PlanError, match="no noise yet"):
        noisy_finetune(net(), BATCHES, cross_entropy, plan)
    for epsilon, delta in ((0.0, 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PlanError, match="expected"):
            plan.calibrate(epsilon=epsilon, delta=delta)
