"""Methods without a guarantee: what each step does, and that a failure changes nothing."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.forgetting import CLASSES, WIDTH, Net, accuracy, drawn, problem, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privacy.errors import UnlearningError
from privacy.unlearning import (
    SCRUB,
    SSD,
    Change,
    FineTuning,
    Heuristic,
    NegGradPlus,
    SalUn,
)
from privacy.unlearning.examples import Examples
from privacy.unlearning.heuristics import fisher
from privacy.unlearning.heuristics.fisher import fisher_diagonal
from privacy.unlearning.heuristics.learner import learning

METHODS: list[Heuristic] = [
    FineTuning(epochs=2, batch_size=32),
    NegGradPlus(epochs=2, batch_size=32, forget_batch_size=16),
    SSD(selection=1.5),
    SCRUB(batch_size=32, forget_batch_size=16),
    SalUn(epochs=2, batch_size=32, forget_batch_size=16),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
DESCENTS = [method for method in METHODS if not isinstance(method, SSD)]
each_descent = pytest.mark.parametrize("method", DESCENTS, ids=lambda m: type(m).__name__)


def fresh(seed: int = 0) -> Net:
    torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    return Net()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


RETAIN, FORGET = drawn(60, 1), drawn(20, 2, wrong=0.5)


@each_method
def test_it_changes_the_model_in_place_and_says_how_far(method: Heuristic) -> None:
    """The norm is that of the difference; modes and gradients are as they were."""
    model = fresh().eval()
    model[1].train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    kept = model[0].weight.grad
    before = state(model)
    change = method(model, [RETAIN], [FORGET])
    moved = sum((state(model)[k].double() - before[k].double()).square().sum() for k in before)
    assert change.weight_change == pytest.approx(math.sqrt(moved), rel=1e-6)
    assert change.weight_change > 0
    assert change.steps >= 1
    assert [module.training for module in model.modules()] == [False, False, True, False]
    assert model[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert model[2].weight.grad is None


def test_steps_are_counted() -> None:
    """Of 60 who stay in batches of 32 and 20 who leave in batches of 16, two epochs."""
    steps = [method(fresh(), [RETAIN], [FORGET]).steps for method in METHODS]
    assert steps == [4, 4, 1, 2 * 2 + 3 * 2, 8]


@each_method
def test_the_seed_fixes_it_and_nothing_else_does(method: Heuristic) -> None:
    """Global generators are neither read nor moved; dropout is drawn from the seed."""

    def result(seed: int, noise: int) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Dropout(0.3), fresh())
        torch.random.set_rng_state(torch.Generator().manual_seed(noise).get_state())
        before = torch.get_rng_state()
        dataclasses.replace(method, seed=seed)(model, [RETAIN], [FORGET])
        assert torch.equal(torch.get_rng_state(), before)
        return state(model)

    assert same(result(5, 1), result(5, 2))
    if not isinstance(method, SSD):
        assert not same(result(5, 1), result(6, 1))


@each_method
@pytest.mark.parametrize("form", ["data set", "loader", "small batches", "arrays"])
def test_the_form_of_the_examples_does_not_matter(method: Heuristic, form: str) -> None:
    """A map-style data set, a loader and lists of batches give the same model."""

    def made(part: tuple[Tensor, Tensor]) -> Any:
        if form == "data set":
            return TensorDataset(*part)
        if form == "loader":
            return DataLoader(TensorDataset(*part), batch_size=7)
        if form == "arrays":
            pairs = zip(part[0].numpy(), part[1].tolist(), strict=True)
            return [(np.array(image), label) for image, label in pairs]
        return list(zip(part[0].split(7), part[1].split(7), strict=True))

    one, other = fresh(), fresh()
    method(one, [RETAIN], [FORGET])
    method(other, made(RETAIN), made(FORGET))
    assert same(state(one), state(other))


class Interrupted(nn.Module):
    """Works for so many calls in training or evaluation, and is then broken off."""

    def __init__(self, error: BaseException, calls: int) -> None:
        super().__init__()
        self.inside, self.error, self.left = fresh(), error, calls
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        self.seen = self.seen + 1  # another tensor each time
        found: Tensor = self.inside(self.norm(images))
        return found


@each_method
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("calls", [0, 3])
def test_broken_off_it_changes_nothing(method: Heuristic, error: BaseException, calls: int) -> None:
    """Weights, statistics, modes; what the model raised is told by name, Ctrl-C comes through."""
    model = Interrupted(error, calls).eval()
    before, modes = state(model), [module.training for module in model.modules()]
    expected = UnlearningError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with pytest.raises(expected):
        method(model, [RETAIN], [FORGET])
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())


@each_method
def test_only_what_is_trained_moves(method: Heuristic) -> None:
    """A frozen layer stays, and so do the statistics of a frozen normalisation."""
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), fresh())
    for weight in (*model[0].parameters(), *model[1][0].parameters()):
        weight.requires_grad_(False)
    before = state(model)
    method(model, [RETAIN], [FORGET])
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved <= {"1.2.weight", "1.2.bias"}
    assert moved


@each_descent
def test_a_trained_normalisation_takes_up_new_statistics(method: Heuristic) -> None:
    """Steps are taken in training mode, whatever the mode was."""
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), fresh()).eval()
    method(model, [RETAIN], [FORGET])
    assert not torch.equal(model[0].running_mean, torch.zeros(WIDTH))
    assert not model[0].training


@each_method
def test_nobody_and_nothing_is_refused(method: Heuristic) -> None:
    """Empty sets, what is no examples, a model that does not fit; nothing is changed."""
    model = fresh()
    before = state(model)
    nobody = (torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.long))
    for retain, forget, told in [
        ([RETAIN], [], "forget: expected at least one"),
        ([RETAIN], [nobody], "forget: expected at least one"),
        ([], [FORGET], "retain: expected at least one"),
        (RETAIN, [FORGET], "retain: expected a map-style data set"),
        (3, [FORGET], "retain: expected a map-style data set"),
        ("people", [FORGET], "retain: expected a map-style data set"),
        ([(RETAIN[0], RETAIN[1][:5])], [FORGET], "retain: expected batches"),
        ([(RETAIN[0], RETAIN[1].float())], [FORGET], "whole numbers"),
        ([RETAIN], [("a", 1)], "forget: expected an image and a label"),
        ([RETAIN], [(FORGET[0], FORGET[1] + CLASSES)], "labels: expected 0 to 2"),
        ([RETAIN], [(FORGET[0][:, :2], FORGET[1])], "model: expected one that takes images"),
        ([RETAIN, (RETAIN[0][:, :2], RETAIN[1])], [FORGET], "of one shape"),
    ]:
        if isinstance(method, FineTuning) and forget[:1] and told.startswith(("labels", "model")):
            continue  # who leaves is not looked at
        with pytest.raises(UnlearningError, match=told):
            method(model, retain, forget)
    assert same(state(model), before)


@each_method
def test_models_that_cannot_forget_are_refused(method: Heuristic) -> None:
    """No module; nothing trained; weights that are not finite; logits that depend on none."""
    with pytest.raises(UnlearningError, match="Module"):
        method(lambda images: images, [RETAIN], [FORGET])  # type: ignore[arg-type]
    frozen = fresh().requires_grad_(False)
    with pytest.raises(UnlearningError, match="unfreeze"):
        method(frozen, [RETAIN], [FORGET])
    broken = fresh()
    with torch.no_grad():
        broken[0].bias[0] = torch.nan
    with pytest.raises(UnlearningError, match=r"0\.bias: expected finite"):
        method(broken, [RETAIN], [FORGET])


@each_method
def test_a_buffer_that_is_not_finite_may_stay(method: Heuristic) -> None:
    """As a mask of attention; only what was finite has to be so afterwards."""
    model = fresh()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert method(model, [RETAIN], [FORGET]).weight_change > 0


class Unmoved(nn.Module):
    """Its logits do not depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :CLASSES] + 0 * self.weight.sum()


@each_method
def test_weights_that_do_not_move_are_an_error(method: Heuristic) -> None:
    """Also by the identity: a published row was once of a method that did nothing."""
    with pytest.raises(UnlearningError, match="moved"):
        method(Unmoved(), [RETAIN], [FORGET])


def test_a_method_that_does_nothing_is_an_error() -> None:
    """Control: a rate so small that float32 weights stay."""
    model = fresh()
    before = state(model)
    with pytest.raises(UnlearningError, match="moved"):
        FineTuning(learning_rate=1e-29, weight_decay=0.0)(model, [RETAIN], [FORGET])
    assert same(state(model), before)


@each_descent
def test_divergence_is_an_error_and_changes_nothing(method: Heuristic) -> None:
    """A rate at which weights run away."""
    model = fresh()
    before = state(model)
    wild = dataclasses.replace(method, learning_rate=1e29)  # type: ignore[call-arg]
    with pytest.raises(UnlearningError, match="finite"):
        wild(model, [RETAIN], [FORGET])
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (FineTuning, "epochs", (0, 1.5, True, "3")),
        (FineTuning, "learning_rate", (0, -1.0, math.nan, math.inf, "1", None)),
        (FineTuning, "momentum", (1.0, -0.1, math.nan, "0")),
        (FineTuning, "weight_decay", (-1e-9, math.inf)),
        (FineTuning, "batch_size", (0, 2.0)),
        (FineTuning, "seed", (-1, 0.5)),
        (NegGradPlus, "alpha", (0, 1, math.nan)),
        (NegGradPlus, "gradient_norm", (0, math.inf)),
        (NegGradPlus, "forget_batch_size", (0,)),
        (SSD, "selection", (0, -1)),
        (SSD, "dampening", (0, math.nan)),
        (SSD, "exponent", (0,)),
        (SSD, "batch_size", (0,)),
        (SSD, "seed", (-1,)),
        (SCRUB, "gamma", (-0.1, "x")),
        (SCRUB, "alpha", (-0.1,)),
        (SCRUB, "temperature", (0,)),
        (SCRUB, "max_epochs", (0,)),
        (SCRUB, "decay", (0, 1.1)),
        (SCRUB, "decay_after", ([3], (0,), 3)),
        (SalUn, "share", (0, 1.01, math.nan)),
        (SalUn, "forget_batch_size", (0,)),
    ],
)
def test_bad_settings_are_refused_at_construction(kind: Any, name: str, values: Any) -> None:
    for value in values:
        with pytest.raises(UnlearningError, match=f"^{name}: expected"):
            kind(**{name: value})


def test_methods_are_frozen_values() -> None:
    assert SCRUB() == SCRUB()
    with pytest.raises(dataclasses.FrozenInstanceError):
        SSD().selection = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Change(weight_change=1.0, steps=1).steps = 2  # type: ignore[misc]


@pytest.mark.parametrize("kind", [FineTuning, NegGradPlus, SSD, SCRUB, SalUn])
def test_each_says_that_it_has_no_guarantee(kind: type) -> None:
    assert "No guarantee" in (kind.__doc__ or "")


def by_hand(model: nn.Module, part: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Mean squares of gradients, one example after the other."""
    weights = list(model.parameters())
    sums = [torch.zeros_like(each, dtype=torch.float64) for each in weights]
    for image, label in zip(*part, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        for total, found in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += found.double() ** 2
    return [total / len(part[1]) for total in sums]


class Unvectorised(Net):
    """Looks at its values, which no vectorised pass may."""

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = super().forward(images)
        return found * 2 if float(images.sum()) > 1e9 else found


@pytest.mark.parametrize("kind", [Net, Unvectorised])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_fisher_information_is_of_each_example(kind: type[Net], size: int) -> None:
    """Against one example after the other, whatever the batch size, vectorised or not."""
    model = kind()
    with learning(model, seed=0) as learner:
        found = fisher_diagonal(learner, Examples.of("forget", [FORGET]), batch_size=size)
    for one, other in zip(found, by_hand(model, FORGET), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_squares_of_a_batchs_mean_gradient_are_no_fisher_information() -> None:
    """Control: what published code takes for it is less than half as much."""
    model = fresh()
    loss = nn.functional.cross_entropy(model(FORGET[0]), FORGET[1])
    mean = torch.autograd.grad(loss, list(model.parameters()))
    published = sum(float(each.square().sum()) for each in mean)
    assert published < 0.5 * sum(float(each.sum()) for each in by_hand(model, FORGET))


def test_vectorised_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient at a time is only for models that need it."""
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return autograd(*arguments, **named)

    autograd = torch.autograd.grad
    monkeypatch.setattr(fisher.torch.autograd, "grad", counted)
    for kind in (Net, Unvectorised):
        with learning(kind(), seed=0) as learner:
            fisher_diagonal(learner, Examples.of("forget", [FORGET]), batch_size=8)
        calls.append(0)
    assert calls.index(0) < 5
    assert sum(calls) >= len(FORGET[1])


def test_ssd_does_not_depend_on_its_batch_size() -> None:
    results = []
    for size in (1, 5, 64):
        model = fresh()
        SSD(selection=1.5, batch_size=size)(model, [RETAIN], [FORGET])
        results.append(model)
    for model in results[1:]:
        for one, other in zip(results[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_ssd_dampens_by_its_formula() -> None:
    """Chosen weights alone, by (lambda I_D / I_f)^e, never up."""
    model = fresh()
    before = [each.detach().clone() for each in model.parameters()]
    own, other = by_hand(model, FORGET), by_hand(model, RETAIN)
    SSD(selection=1.5, dampening=1.2, exponent=2.0)(model, [RETAIN], [FORGET])
    chosen = 0
    for weight, start, one, two in zip(model.parameters(), before, own, other, strict=True):
        everybody = (20 * one + 60 * two) / 80
        factor = torch.where(one > 1.5 * everybody, (1.2 * everybody / one) ** 2, 1.0).clamp(max=1)
        torch.testing.assert_close(weight.double(), start.double() * factor, rtol=1e-4, atol=1e-7)
        chosen += int((factor < 1).sum())
    assert 0 < chosen < sum(each.numel() for each in before)


def test_ssd_refuses_a_share_that_can_choose_no_weight() -> None:
    """A tenth or more at a selection of 10; said before anything is computed."""
    with pytest.raises(UnlearningError, match="choose a selection below 4"):
        SSD()(fresh(), [RETAIN], [FORGET])


def test_salun_moves_the_salient_weights_alone() -> None:
    """The half with the largest gradients of who leaves; the rest is bit for bit what it was."""
    model = fresh()
    before = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    loss = nn.functional.cross_entropy(model(FORGET[0]), FORGET[1])
    sizes = torch.cat(
        [each.abs().reshape(-1) for each in torch.autograd.grad(loss, list(model.parameters()))]
    )
    SalUn(epochs=1, share=0.3)(model, [RETAIN], [FORGET])
    after = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    moved = after != before
    cut = sizes.sort(descending=True).values[round(0.3 * len(sizes))]
    assert bool((sizes[moved] >= cut * 0.999).all())
    assert int(moved.sum()) >= 0.95 * round(0.3 * len(sizes))


def test_methods_that_forget_lower_the_accuracy_of_who_leaves() -> None:
    """Half of who leaves is known by memory alone; strangers are answered as before."""
    parts = problem()
    model = trained([parts.retain, parts.forget], seed=0)
    assert accuracy(model, parts.forget) > 0.95
    for method in (
        FineTuning(learning_rate=0.1, epochs=6, batch_size=32),
        NegGradPlus(learning_rate=0.05, alpha=0.8, epochs=6, batch_size=32, forget_batch_size=40),
        SalUn(learning_rate=0.1, epochs=6, batch_size=32),
        SCRUB(learning_rate=0.05, max_epochs=3, batch_size=32),
        SSD(selection=1.5),
    ):
        own = copy.deepcopy(model)
        method(own, [parts.retain], [parts.forget])
        assert accuracy(own, parts.forget) < 0.8
        assert accuracy(own, parts.test) > 0.7
