"""The three-line loop as a whole, and every known way of voiding its guarantee."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from privacy import (
    BudgetExceeded,
    DPPlan,
    PhysicalBatches,
    PlanError,
    PrivateTraining,
    SecureGenerator,
    StepError,
    Tuner,
    UnsupportedLayer,
    attach,
    epsilon_of,
)
from privacy.sampling import sample_indices

KEY = bytes(range(32))
SAMPLES = 24
PLAN = DPPlan(
    samples=SAMPLES,
    batch_size=8,
    epochs=2,
    max_grad_norm=0.5,
    noise_multiplier=1.5,
    delta=1e-2,
)


def data_of(samples: int = SAMPLES) -> list[tuple[torch.Tensor, int]]:
    """A data set of drawn images."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(1, 6, 6, generator=generator), i % 3) for i in range(samples)]


def network() -> nn.Module:
    """A small network with an in-place operation, the same every time."""
    layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def attached(
    model: nn.Module | None = None,
    plan: DPPlan = PLAN,
    batches: PhysicalBatches | None = None,
    key: bytes = KEY,
) -> PrivateTraining:
    """A private training whose secret is known: only a test may do that."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # A kernel chosen by timing could round differently in two trainings that must be equal.
    private = attach(
        plan,
        model,
        optimizer,
        data_of(plan.samples),
        physical_batches=batches,
        tuner=Tuner(fixed={"0": "grouped"}),
    )
    private._generator = SecureGenerator(key)
    return private


def losses_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss an example."""
    return F.cross_entropy(model(images), labels, reduction="none")


def train(private: PrivateTraining) -> dict[str, torch.Tensor]:
    """The loop of the documentation; the parameters it ends with."""
    for images, labels in private.batches:
        private.step(losses_of(private.model, images, labels))
    return {name: p.detach().clone() for name, p in private.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_loop_takes_the_plans_steps_and_spends_its_epsilon() -> None:
    """Three lines in somebody's own loop; afterwards nothing is left to iterate."""
    private = attached()
    before = copy.deepcopy(private.model.state_dict())
    stepped = [
        private.step(losses_of(private.model, images, labels)) for images, labels in private.batches
    ]
    assert stepped == [True] * PLAN.steps
    assert private.steps == PLAN.steps == 6
    assert private.spent() == PLAN.epsilon()
    assert private.spent(1e-3) == PLAN.epsilon(1e-3)
    assert list(private.batches) == []
    after = private.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in private.model.parameters())


def test_a_step_is_that_of_the_definition() -> None:
    """One whole step against clipping by hand, with the same sample and the same noise."""
    private = attached()
    images, labels = next(private.batches)
    twin = SecureGenerator(KEY)
    chosen = sample_indices(twin, samples=SAMPLES, sampling_rate=PLAN.sampling_rate)
    data, reference = data_of(), network()
    assert torch.equal(images[: len(chosen)], torch.stack([data[i][0] for i in chosen.tolist()]))
    parameters = list(reference.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters))
    for i in chosen.tolist():
        loss = losses_of(reference, data[i][0].unsqueeze(0), torch.tensor([data[i][1]]))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parameters)])
        total += gradient * min(1.0, PLAN.max_grad_norm / float(gradient.norm()))
    noise = PLAN.noise_multiplier * PLAN.max_grad_norm * twin.normal(total.numel())
    mean = (total + noise.float()) / PLAN.batch_size
    expected = torch.cat([p.detach().flatten() for p in parameters]) - 0.5 * mean
    private.step(losses_of(private.model, images, labels))
    actual = torch.cat([p.detach().flatten() for p in private.model.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_noise_of_whole_steps_has_its_deviation() -> None:
    """Parameters move by sigma C / batch where gradients are zero; five percent off is rejected."""
    plan = dataclasses.replace(PLAN, epochs=10)
    model = nn.Linear(36, 500)
    private = attached(nn.Sequential(nn.Flatten(), model), plan)
    moved, before = [], model.weight.detach().clone()
    for images, _ in private.batches:
        private.step(0 * private.model(images).sum(1))
        moved.append(((model.weight.detach() - before) / 0.5).double())
        before = model.weight.detach().clone()
    deviation = 1.5 * plan.max_grad_norm / plan.batch_size

    def p_value(wanted: float) -> float:
        square = float((torch.stack(moved) / wanted).square().sum())
        law = stats.chi2(len(moved) * model.weight.numel())
        return min(law.cdf(square), law.sf(square))

    assert p_value(deviation) > 1e-4
    assert p_value(1.05 * deviation) < 1e-9
    assert p_value(deviation / 1.05) < 1e-9


def test_physical_batches_change_speed_only() -> None:
    """One large batch or many small ones: the same parameters, up to rounding."""
    whole = train(attached(batches=PhysicalBatches(size=64)))
    for batches in (PhysicalBatches(size=3, multiple=3), PhysicalBatches(size=1, multiple=1)):
        cut = train(attached(batches=batches))
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-5)


def test_an_attack_inside_the_loop_changes_nothing_of_the_step() -> None:
    """Gradients at the images, re-seeded generators, modes toggled: the same bits."""

    def attacked(private: PrivateTraining) -> dict[str, torch.Tensor]:
        model = private.model
        for images, labels in private.batches:
            torch.manual_seed(0)
            model.eval()
            shifted = images.clone().requires_grad_()
            for _ in range(3):
                loss = losses_of(model, shifted, labels).sum()
                (gradient,) = torch.autograd.grad(loss, shifted)
                shifted = (shifted + 0.1 * gradient.sign()).detach().requires_grad_()
            assert not torch.equal(shifted, images)
            losses_of(model, shifted, labels).sum().backward()
            model.train()
            assert all(p.grad is None for p in model.parameters())
            private.step(losses_of(model, images, labels))
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    plain = train(attached())
    assert same(attacked(attached()), plain)
    assert not same(train(attached(key=bytes(32))), plain)


def test_forward_and_backward_outside_of_step_leave_nothing() -> None:
    """An evaluation and a stray backward pass between two batches are no part of the sum."""
    private = attached()
    for images, labels in private.batches:
        losses_of(private.model, torch.rand(5, 1, 6, 6), torch.arange(5) % 3).mean().backward()
        private.step(losses_of(private.model, images, labels))
    assert same({n: p.detach() for n, p in private.model.named_parameters()}, train(attached()))


def test_an_empty_sample_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noised, written down and stepped like any other."""
    private = attached()
    generator = private._generator
    monkeypatch.setattr(generator, "bernoulli", lambda n, p: torch.zeros(n, dtype=torch.bool))
    before = copy.deepcopy(private.model.state_dict())
    train(private)
    assert private.steps == PLAN.steps
    assert private.spent() == PLAN.epsilon()
    after = private.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_tiny_rate_draws_empty_samples_of_itself() -> None:
    """With one example expected in a sample, a third of the samples is empty."""
    plan = DPPlan(samples=SAMPLES, batch_size=1, epochs=2, noise_multiplier=1.0)
    private = attached(plan=plan)
    pending = []
    for images, labels in private.batches:
        pending.append(len(private._pending.indices))
        private.step(losses_of(private.model, images, labels))
    assert private.steps == plan.steps == 48
    assert 0 in pending
    assert max(pending) > 0


def test_broken_examples_are_counted_and_contribute_nothing() -> None:
    """A NaN image poisons neither the model nor its batch."""
    data = data_of()
    data[0][0][0, 3, 3] = torch.nan
    model = network()
    private = attach(PLAN, model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    private._generator = SecureGenerator(KEY)
    train(private)
    assert 0 < private.non_finite <= PLAN.steps
    assert all(p.isfinite().all() for p in model.parameters())


class Halved(nn.Module):
    """A custom layer that mixes examples."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - 0.5 * inputs.mean(0)


def with_layer(layer: nn.Module) -> nn.Module:
    """A network with the layer at `1`."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(64, 3))


class Forgetful(nn.Module):
    """Has a parameter that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = network(), nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)


MIXING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm": (lambda: with_layer(nn.BatchNorm2d(4)), "^1: BatchNorm2d mixes examples"),
    "BatchNorm without affine": (lambda: with_layer(nn.BatchNorm2d(4, affine=False)), "^1: Batch"),
    "BatchNorm with frozen affine": (
        lambda: with_layer(nn.BatchNorm2d(4).requires_grad_(False)),
        "^1: BatchNorm2d mixes",
    ),
    "custom layer": (lambda: with_layer(Halved()), "changing one example moved the output"),
    "positions as rows": (
        lambda: nn.Sequential(
            nn.Flatten(0, 2), nn.Linear(6, 2), nn.Unflatten(0, (3, 6)), nn.Flatten()
        ),
        "^1: expected 3 rows, one an example as in the losses, got 18",
    ),
    "unused layer": (Forgetful, r"^spare\.weight, spare\.bias: trainable, but not used"),
    "wrong size": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "cannot run on the data"),
}


@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_cannot_be_private_is_refused(kind: str) -> None:
    """At attach, by dotted name, and the model is given back as it was."""
    make, message = MIXING[kind]
    model = make()
    with pytest.raises(UnsupportedLayer, match=message):
        attached(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_batch_norm_that_went_back_to_training_is_refused_at_the_step() -> None:
    """Attack libraries set the whole model to train mode; the next step notices."""
    model = with_layer(nn.BatchNorm2d(4))
    model[1].eval()
    private = attached(model)
    batches = private.batches
    images, labels = next(batches)
    private.step(losses_of(model, images, labels))
    model.train()
    images, labels = next(batches)
    with pytest.raises(UnsupportedLayer, match=r"^1: BatchNorm2d mixes examples"):
        private.step(losses_of(model, images, labels))
    assert private.steps == 1


def test_a_parameter_that_became_trainable_later_is_refused() -> None:
    """The optimizer would step it by its raw gradient."""
    model = network()
    model[0].weight.requires_grad_(False)
    private = attached(model)
    frozen = model[0].weight.detach().clone()
    images, labels = next(private.batches)
    model[0].weight.requires_grad_(True)
    with pytest.raises(StepError, match=r"^0\.weight: trainable when the model was attached or"):
        private.step(losses_of(model, images, labels))
    assert torch.equal(model[0].weight, frozen)


def test_gradients_from_before_do_not_reach_a_frozen_parameter() -> None:
    """A raw gradient that was left behind in the optimizer is dropped, not applied."""
    model = network()
    images = torch.stack([image for image, _ in data_of()])
    model(images).square().sum().backward()
    model[4].requires_grad_(False)
    frozen = model[4].weight.detach().clone()
    train(attached(model))
    assert torch.equal(model[4].weight, frozen)


def test_an_averaged_loss_is_refused_and_the_batch_can_still_be_stepped() -> None:
    """Nothing is lost by the mistake."""
    private = attached()
    images, labels = next(private.batches)
    with pytest.raises(StepError, match=r"reduction=\"none\""):
        private.step(F.cross_entropy(private.model(images), labels))
    assert private.step(losses_of(private.model, images, labels))


def test_losses_of_another_batch_are_refused() -> None:
    """By their number, or because they were used before."""
    private = attached(batches=PhysicalBatches(size=4, multiple=4))
    batches = private.batches
    images, labels = next(batches)
    with pytest.raises(StepError, match=r"expected one loss an example, shape \[4\], got \[2\]"):
        private.step(losses_of(private.model, images[:2], labels[:2]))
    used = losses_of(private.model, images, labels)
    private.step(used)
    next(batches)
    with pytest.raises(StepError, match="differentiated before"):
        private.step(used)


def test_a_batch_is_stepped_once() -> None:
    """A second step on it would count its examples twice."""
    private = attached()
    images, labels = next(private.batches)
    losses = losses_of(private.model, images, labels)
    private.step(losses)
    with pytest.raises(StepError, match="there is no batch to step on"):
        private.step(losses_of(private.model, images, labels))
    with pytest.raises(StepError, match="there is no batch to step on"):
        attached().step(losses)


def test_a_skipped_batch_is_refused() -> None:
    """A sample counts whole or not at all."""
    private = attached()
    with pytest.raises(StepError, match=r"was not given to private.step"):
        for _ in private.batches:
            pass
    assert private.steps == 0


def test_two_iterations_do_not_mix_their_samples() -> None:
    """An example in both would count twice against noise for one."""
    private = attached(batches=PhysicalBatches(size=2, multiple=2))
    old, new = private.batches, private.batches
    images, labels = next(old)
    private.step(losses_of(private.model, images, labels))
    images, labels = next(new)
    private.step(losses_of(private.model, images, labels))
    with pytest.raises(StepError, match=r"another iteration of private.batches was begun"):
        next(old)


def test_an_abandoned_sample_is_dropped() -> None:
    """What was added of it does not reach the next one."""
    private = attached(batches=PhysicalBatches(size=2, multiple=2))
    images, labels = next(private.batches)
    private.step(losses_of(private.model, images, labels))
    assert any(total.any() for total in private._clipped.sums)
    next(private.batches)
    assert not any(total.any() for total in private._clipped.sums)
    assert private.steps == 0


def test_no_step_is_taken_beyond_the_plan() -> None:
    """Where the ledger is full, the pending batch is not stepped and nothing moves."""
    private = attached()
    images, labels = next(private.batches)
    private.ledger.record(PLAN.event())
    before = copy.deepcopy(private.model.state_dict())
    with pytest.raises(BudgetExceeded, match="the plan's 6 steps are spent"):
        private.step(losses_of(private.model, images, labels))
    after = private.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_must_fit_and_have_its_noise() -> None:
    """Another data set, no noise, or a target that the plan no longer keeps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="the plan is for 24, the data set has 23"):
        attach(PLAN, model, optimizer, data_of(23))
    with pytest.raises(PlanError, match=r"no noise yet: call plan.calibrate"):
        attach(dataclasses.replace(PLAN, noise_multiplier=None), model, optimizer, data_of())
    longer = dataclasses.replace(PLAN.calibrate(epsilon=2.0, delta=1e-2), epochs=20)
    with pytest.raises(PlanError, match=r"^target_epsilon: the plan's 60 steps cost .* calibrate"):
        attach(longer, model, optimizer, data_of())


def test_the_optimizer_must_hold_the_models_parameters() -> None:
    """One of a copy would train nothing; what it lacks is named."""
    other = network()
    with pytest.raises(StepError, match=r"^optimizer: .*lacks 0\.weight.*holds 6 that are not"):
        attach(PLAN, network(), torch.optim.SGD(other.parameters(), lr=0.1), data_of())


def test_a_model_is_attached_once() -> None:
    """The first training goes on undisturbed; after `detach` another one may begin."""
    private = attached()
    with pytest.raises(StepError, match=r"^0: its forward is already replaced"):
        attached(private.model)
    expected = train(attached())
    assert same(train(private), expected)
    private.detach()
    attached(private.model)


@pytest.mark.parametrize("anew", [False, True])
def test_after_detach_nothing_goes_on(anew: bool) -> None:
    """The model's gradients are raw again, or another training's; that is said first of all."""
    private = attached()
    batches = private.batches
    images, labels = next(batches)
    private.detach()
    newer = attached(private.model) if anew else None
    state = private.state_dict()
    calls: list[Callable[[], Any]] = [
        lambda: private.step(losses_of(private.model, images, labels)),
        lambda: next(batches),
        lambda: next(private.batches),
        lambda: private.step(torch.zeros(1)),
        lambda: private.load_state_dict(state),
    ]
    for call in calls:
        with pytest.raises(StepError, match=r"^this training was detached: .*; attach the model"):
            call()
    assert all(p.grad is None for p in private.model.parameters())
    assert private.steps == 0
    if newer is not None:
        assert same(train(newer), train(attached()))


def test_a_loop_may_detach_after_the_last_step() -> None:
    """It ends as it would have; what was spent can still be read."""
    private = attached()
    for images, labels in private.batches:
        if private.step(losses_of(private.model, images, labels)) and private.steps == PLAN.steps:
            private.detach()
    assert private.spent() == PLAN.epsilon()
    with pytest.raises(StepError, match=r"^this training was detached"):
        next(private.batches)


def test_a_copy_of_an_attached_model_is_a_plain_model() -> None:
    """An average of the weights, say: it has its own, and they can be evaluated alone."""
    private = attached()
    average = torch.optim.swa_utils.AveragedModel(private.model)
    train(private)
    images = torch.rand(3, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(average(images), network()(images))
        assert not torch.equal(average(images), private.model(images))


def interrupted() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of a training that stopped after two of six steps, as a checkpoint keeps it."""
    private = attached()
    for images, labels in private.batches:
        private.step(losses_of(private.model, images, labels))
        if private.steps == 2:
            break
    return json.loads(json.dumps(private.state_dict())), private.model.state_dict()


def test_a_resumed_training_goes_on_where_it_stopped() -> None:
    """The remaining steps and no more; epsilon goes on rising to the plan's."""
    state, weights = interrupted()
    private = attached(key=bytes(32))
    private.model.load_state_dict(weights)
    private.load_state_dict(state)
    assert private.steps == 2
    assert private.spent() == epsilon_of([PLAN.event(2)], 1e-2)
    train(private)
    assert private.steps == PLAN.steps
    assert private.spent() == PLAN.epsilon()
    assert len(private.ledger.events) == 1


def test_a_resumed_training_drops_the_sample_that_was_begun() -> None:
    """A batch drawn before the state was loaded cannot be stepped on, nor its iteration go on."""
    state, _ = interrupted()
    private = attached()
    batches = private.batches
    images, labels = next(batches)
    private.load_state_dict(state)
    with pytest.raises(StepError, match="there is no batch"):
        private.step(losses_of(private.model, images, labels))
    with pytest.raises(StepError, match="or a state loaded"):
        next(batches)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 1.4}, {"max_grad_norm": 1.0}, {"epochs": 3}, {"batch_size": 9}]
)
def test_a_state_of_another_plan_is_refused(change: dict[str, float]) -> None:
    """Noise, clipping, steps and rate must be the checkpoint's."""
    state, _ = interrupted()
    with pytest.raises(PlanError, match=r"^plan: the checkpoint was trained under"):
        attached(plan=dataclasses.replace(PLAN, **change)).load_state_dict(state)


def test_epsilon_never_falls() -> None:
    """A checkpoint of fewer steps than were taken here is refused, and nothing is forgotten."""
    state, _ = interrupted()
    private = attached()
    train(private)
    with pytest.raises(PlanError, match="6 steps were taken here, the checkpoint knows 2"):
        private.load_state_dict(state)
    assert private.steps == 6


@pytest.mark.parametrize("damage", ["plan", "ledger"])
def test_a_damaged_state_is_refused(damage: str) -> None:
    """Whatever is missing."""
    state, _ = interrupted()
    del state[damage]
    with pytest.raises(PlanError, match=f"^{damage}: "):
        attached().load_state_dict(state)


def test_no_secret_leaves() -> None:
    """Neither the state nor the text of the training holds the key, and it cannot be copied."""
    key = b"a key that nobody must ever see!"
    private = attached(key=key)
    shown = repr(private) + json.dumps(private.state_dict())
    assert key.decode() not in shown
    assert key.hex() not in shown
    assert set(private.state_dict()) == {"plan", "ledger", "max_grad_norm"}
    with pytest.raises(StepError, match="cannot be copied"):
        copy.deepcopy(private)


def test_an_objective_must_say_that_it_is_per_example() -> None:
    """One that mixes examples, or does not say, is refused by name."""
    private = attached()

    def mixup(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return losses_of(model, images, labels)

    with pytest.raises(StepError, match=r"^mixup: expected an objective with per_example = True"):
        private.check_objective(mixup)
    mixup.reason = "it mixes two images"  # type: ignore[attr-defined]
    with pytest.raises(StepError, match="per_example = True: it mixes two images"):
        private.check_objective(mixup)
    mixup.per_example = True  # type: ignore[attr-defined]
    private.check_objective(mixup)


def test_an_attached_model_is_not_pickled_and_the_cure_is_said() -> None:
    """What stands for its layers' forward belongs to this training; copies and states are free."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    plan = DPPlan(samples=8, batch_size=4, epochs=1, noise_multiplier=1.0)
    data = [(torch.rand(1, 6, 6), 0)] * 8
    private = attach(plan, model, torch.optim.SGD(model.parameters()), data)
    with pytest.raises(StepError, match=r"^0: .* save model\.state_dict\(\)"):
        pickle.dumps(model)
    pickle.dumps(model.state_dict())
    pickle.dumps(copy.deepcopy(model))
    private.detach()
    pickle.dumps(model)
