"""Bad input to `attach`, `step` and the plan: a typed error with its cure, nothing lost."""

import copy
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from privacy import (
    AdaptiveClipping,
    AutomaticClipping,
    DPPlan,
    Ledger,
    PlanError,
    PrivacyError,
    PrivateTraining,
    StepError,
    UnsupportedLayer,
    attach,
    epsilon_of,
)
from privacy.accounting import GaussianSteps
from privacy.clipping.factors import PerLayerClipping
from privacy.opacus import PrivacyEngine

SAMPLES = 16
DATA = TensorDataset(torch.rand(SAMPLES, 4), torch.arange(SAMPLES) % 2)


def plan_of(samples: int = SAMPLES, **more: Any) -> DPPlan:
    return DPPlan(
        samples=samples, batch_size=min(8, samples), epochs=4, noise_multiplier=1.0, **more
    )


def attached(
    model: Any = None,
    data: Any = DATA,
    optimizer: Any = None,
    plan: Any = None,
    **settings: Any,
) -> PrivateTraining:
    model = nn.Linear(4, 2) if model is None else model
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return attach(plan or plan_of(), model, optimizer, data, **settings)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Keyed:
    """Has a length, and is not read by numbers."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: str) -> Any:
        return {"a": 1}[key]


DATASETS: dict[str, tuple[Any, str]] = {
    "loader": (DataLoader(DATA, batch_size=1), "its batch_size is 1, the plan's 8.*give loader"),
    "iterable": (Endless(), "read by index"),
    "generator": (iter(DATA), "read by index"),
    "array": (np.zeros((SAMPLES, 4)), "TensorDataset"),
    "tensor": (torch.zeros(SAMPLES, 4), "TensorDataset"),
    "two arrays": ((np.zeros((SAMPLES, 4)), np.zeros(SAMPLES)), "TensorDataset"),
    "mapping": ({i: 0 for i in range(SAMPLES)}, "list of pairs"),
    "text": ("x" * SAMPLES, "list of pairs"),
    "nothing": (None, "read by index"),
    "empty": ([], "has 0"),
    "other length": ([(torch.rand(4), 0)] * 3, "the data set has 3"),
    "keyed": (Keyed(), "could not be read: KeyError"),
    "text labels": (
        [(torch.rand(4), "cat")] * SAMPLES,
        "expected tensors in tuples, dictionaries or dataclasses, got str",
    ),
    "no labels": ([(torch.rand(4), None)] * SAMPLES, "could not be stacked"),
    "dictionaries": (
        [{"image": torch.rand(4), "label": 1}] * SAMPLES,
        r"of type dict, in which nobody .*forward=lambda model, batch: model\(batch\['image'\]\)",
    ),
    "objects": ([(SimpleNamespace(), 0)] * SAMPLES, "could not be stacked"),
    "sparse": (
        [(torch.rand(4).to_sparse(), 0)] * SAMPLES,
        "could not be stacked: Batches of sparse",
    ),
    "nested": (
        [(torch.nested.as_nested_tensor([torch.rand(2)] * 2, layout=torch.jagged), 0)] * SAMPLES,
        "dataset: ",
    ),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_what_is_no_data_set_is_refused(kind: str) -> None:
    """By what it is, and what to give instead."""
    data, message = DATASETS[kind]
    with pytest.raises(PlanError, match=message):
        attached(data=data)


def test_numpy_examples_and_odd_labels_are_taken() -> None:
    """Control: what stacks is an example."""
    for label in (np.int64(1), np.float32(0.5), 1.0, True, torch.tensor(1)):
        attached(data=[(np.zeros(4, dtype="f4"), label)] * SAMPLES)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 2, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.cfloat) @ self.w).abs()


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: nn.Module = torch.jit.trace(nn.Linear(4, 2), torch.rand(1, 4))
    return traced


def with_compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(4, 2), backend="eager"))  # type: ignore[arg-type]


def with_compiled_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2), nn.Identity())
    model[1].forward = torch.compile(model[1].forward, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = nn.Linear(4, 2)
    model.compile(backend="eager")
    return model


def sharded() -> nn.Module:
    """Of the class to which `fully_shard` changes a module's, whose parameters are parts."""
    model = nn.Sequential(nn.Linear(4, 2))
    model.__class__ = type("Sharded", (FSDPModule, nn.Sequential), {})
    return model


def being_quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        return torch.ao.quantization.prepare_qat(model)  # type: ignore[no-any-return]


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(  # type: ignore[no-any-return]
            nn.Sequential(nn.Linear(4, 2)), {nn.Linear}
        )


class Resizing(nn.Module):
    """Keeps its last batch in a buffer that had another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.mean(0)
        return self.fc(x)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mask", torch.eye(2).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


MODELS: dict[str, tuple[Callable[[], Any], type[PrivacyError], str]] = {
    "no module": (lambda: torch.rand, StepError, "^model: expected a torch.nn.Module"),
    "compiled": (
        lambda: torch.compile(nn.Linear(4, 2), backend="eager"),
        StepError,
        r"the model is compiled: attach and train the module itself .*model\._orig_mod",
    ),
    "compiled part": (with_compiled_part, StepError, "^0: the model is compiled"),
    "compiled forward": (with_compiled_forward, StepError, "^1: the model is compiled"),
    "compiled in place": (compiled_in_place, StepError, "the model is compiled"),
    "script": (scripted, StepError, "the model is compiled"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(4, 2)), StepError, "model.module"),
    "sharded": (sharded, StepError, "^Sharded: .*attach the module before it is wrapped or"),
    "being quantised": (being_quantised, UnsupportedLayer, "is quantised, or being so"),
    "quantised": (quantised, UnsupportedLayer, "^0: .*attach and train the float model"),
    "resizing": (Resizing, UnsupportedLayer, "a forward pass .* writes to last"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), UnsupportedLayer, r"^0\.weight: .*shape yet"),
    "complex": (lambda: nn.Sequential(Complex()), UnsupportedLayer, r"^0\.w: expected real"),
    "meta": (lambda: nn.Linear(4, 2, device="meta"), UnsupportedLayer, r"^weight: .*meta device"),
    "sparse": (Sparse, UnsupportedLayer, "^mask: expected a dense tensor"),
    "nothing": (nn.Flatten, StepError, "no trainable parameter"),
    "other precision": (
        lambda: nn.Linear(4, 2).double(),
        UnsupportedLayer,
        r"cannot run on the data.*parameters are torch\.float64: .* model\.to\(torch\.float32\)",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_attached_is_refused(kind: str) -> None:
    """At attach, with the cure."""
    make, error, message = MODELS[kind]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = make()
    if isinstance(model, nn.Module) and kind not in ("lazy", "nothing", "quantised"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        attached(model, optimizer=optimizer)


class Sharpness(torch.optim.SGD):
    """Wants a closure and says so only when it steps, as implementations of SAM do."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "it needs a closure"


class Wants(torch.optim.SGD):
    """Wants a closure by its signature."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


class Around(torch.optim.Optimizer):
    """Keeps another optimizer inside, beside what torch's own copies keep."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.inside = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        return self.inside.step()


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharpness, Wants, torch.optim.SparseAdam])
def test_an_optimizer_that_needs_more_than_gradients_is_refused(kind: Any) -> None:
    """Before a step is charged, and its parameters are where they were."""
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StepError, match=f"^optimizer: {kind.__name__} cannot step on a noised"):
        attached(model, optimizer=kind(model.parameters()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(StepError, match=r"^optimizer: expected a torch.optim.Optimizer, got str"):
        attached(optimizer="sgd")


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, Around]
)
def test_other_optimizers_are_tried_on_a_copy(kind: Any) -> None:
    """Neither state, parameters nor a schedule's patched `step` is touched; hooks hear nothing."""
    model, heard = nn.Linear(4, 2), []
    optimizer = kind(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.register_step_pre_hook(lambda *_: heard.append(1))
    model.weight.grad = torch.ones(2, 4)
    before, state = model.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    private = attached(model, optimizer=optimizer)
    assert torch.equal(model.weight, before)
    assert str(optimizer.state_dict()) == str(state)
    assert not heard
    for images, labels in private.batches:
        private.step(F.cross_entropy(model(images), labels, reduction="none"))
    assert private.steps == len(heard) == private.plan.steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "plan"}, "^plan: expected a privacy.DPPlan"),
        ({"physical_batches": 8}, "^physical_batches: expected"),
        ({"tuner": "fast"}, "^tuner: expected"),
    ],
)
def test_settings_of_other_types_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        attached(**settings)


class Temperature(nn.Module):
    """A learnable scalar."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.full(shape, 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.t


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("float_safe", [False, True])
def test_a_scalar_parameter_is_trained_as_one_of_one_number(float_safe: bool, copies: int) -> None:
    """The same sum, and the same norm, as with a parameter of shape [1]."""
    sums = []
    for shape in ((), (1,)):
        model = nn.Sequential(nn.Linear(4, 2), Temperature(shape))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(8.0).view(2, 4) / 8)
            model[0].bias.zero_()
        private = attached(model, plan=plan_of(max_grad_norm=0.1, float_safe=float_safe))
        images = torch.arange(12.0).view(3, 4).repeat_interleave(copies, dim=0)
        labels = torch.tensor([0, 1, 0]).repeat_interleave(copies)
        losses = F.cross_entropy(model(images), labels, reduction="none")
        losses = losses.view(3, copies) if copies > 1 else losses
        private._clipped.add(losses, torch.ones(3, dtype=torch.bool))
        sums.append(torch.cat([total.flatten() for total in private._clipped.sums]))
        for images, labels in private.batches:
            private.step(F.cross_entropy(model(images), labels, reduction="none"))
    torch.testing.assert_close(sums[0], sums[1])
    assert sums[0].abs().min() > 0 or sums[0][-1] != 0


LOSSES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a number": (lambda losses: 1.0, "expected a tensor with one loss an example, got float"),
    "a list": (lambda losses: list(losses), "got list"),
    "an array": (lambda losses: losses.detach().numpy(), "got ndarray"),
    "averaged": (lambda losses: losses.mean(), "do not average"),
    "detached": (lambda losses: losses.detach(), "carry no graph"),
    "complex": (lambda losses: losses.to(torch.cfloat), "expected real numbers"),
    "whole": (lambda losses: losses.detach().long(), "expected real numbers"),
    "sparse": (lambda losses: losses.to_sparse(), "dense"),
    "too many dimensions": (lambda losses: losses.view(-1, 1, 1), "expected one loss an example"),
    "of nothing": (lambda losses: losses.view(-1, 1)[:, :0], "expected one loss an example"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_none_are_refused_and_the_batch_can_be_stepped(kind: str) -> None:
    """Nothing is charged and nothing is lost."""
    make, message = LOSSES[kind]
    private = attached()
    images, labels = next(private.batches)
    losses = F.cross_entropy(private.model(images), labels, reduction="none")
    with pytest.raises(StepError, match=message):
        private.step(make(losses))
    assert private.steps == 0
    private.step(F.cross_entropy(private.model(images), labels, reduction="none"))


@pytest.mark.parametrize("linear", [False, True], ids=["cross-entropy", "a critic's sum"])
def test_a_gradient_penalty_is_refused(linear: bool) -> None:
    """It would be clipped without its own part, and with a linear loss pass for a constant."""
    private = attached(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    images, labels = next(private.batches)
    images.requires_grad_()
    logits = private.model(images)
    losses = logits.sum(1) if linear else F.cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), images, create_graph=True)
    with pytest.raises(UnsupportedLayer, match=r"^losses: they contain a gradient of the model"):
        private.step(losses + gradient.square().sum(1))
    assert private.steps == 0


def test_a_penalty_that_is_a_constant_and_an_attack_with_create_graph_work() -> None:
    """Control: what is not differentiated again is harmless."""
    private = attached(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    images, labels = next(private.batches)
    images.requires_grad_()
    losses = F.cross_entropy(private.model(images), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), images, create_graph=True)
    attacked = (images + 0.1 * gradient.sign()).detach()
    losses = F.cross_entropy(private.model(attacked), labels, reduction="none")
    private.step(losses + gradient.detach().square().sum(1))


def test_a_step_under_inference_mode_is_refused() -> None:
    """What it would keep could never be added to again."""
    private = attached()
    images, labels = next(private.batches)
    losses = F.cross_entropy(private.model(images), labels, reduction="none")
    with torch.inference_mode(), pytest.raises(StepError, match="inference_mode"):
        private.step(losses)
    private.step(losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_or_is_refused_by_name(dtype: torch.dtype) -> None:
    """Never a foreign error."""
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)).to(dtype)
    private = attached(model, data=[(torch.rand(4).to(dtype), i % 2) for i in range(SAMPLES)])
    for images, labels in private.batches:
        private.step(F.cross_entropy(model(images).float(), labels, reduction="none"))
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())


WRONG = [-1, 0, True, math.nan, math.inf, -math.inf, "3", None, 1j, [1], 10**400]


@pytest.mark.parametrize("name", ["samples", "batch_size", "epochs", "max_grad_norm"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(value)[:8])
def test_plan_values_out_of_range_are_refused(name: str, wrong: Any) -> None:
    """Whatever their type, by name."""
    values: dict[str, Any] = {"samples": 100, "batch_size": 10, "epochs": 1}
    with pytest.raises(PlanError, match=rf"^{name}: expected "):
        DPPlan(**{**values, name: wrong})


@pytest.mark.parametrize("name", ["noise_multiplier", "delta", "target_epsilon", "float_safe"])
@pytest.mark.parametrize("wrong", [*WRONG[:7], *WRONG[8:]], ids=lambda value: str(value)[:8])
def test_optional_plan_values_out_of_range_are_refused(name: str, wrong: Any) -> None:
    """None is allowed where a value may be given later; a flag is a flag."""
    if name == "float_safe" and wrong is True:
        return
    with pytest.raises(PlanError, match=rf"^{name}: expected "):
        DPPlan(samples=100, batch_size=10, epochs=1, **{name: wrong})


@pytest.mark.parametrize("wrong", [2.5, 10.0, np.float64(10), np.bool_(True)])
def test_a_number_of_examples_is_whole(wrong: Any) -> None:
    for name in ("samples", "batch_size"):
        with pytest.raises(PlanError, match=rf"^{name}: expected "):
            DPPlan(**{"samples": 100, "batch_size": 10, "epochs": 1, name: wrong})


def test_numpys_numbers_become_pythons() -> None:
    """So that the plan is JSON values, and equal to one that was typed."""
    plan = DPPlan(
        samples=np.int64(100),  # type: ignore[arg-type]
        batch_size=np.uint8(10),  # type: ignore[arg-type]
        epochs=np.float32(2),  # type: ignore[arg-type]
        noise_multiplier=np.float64(1.5),
        delta=np.float64(1e-3),
    )
    assert plan == DPPlan(samples=100, batch_size=10, epochs=2, noise_multiplier=1.5, delta=1e-3)
    kinds = {type(value) for value in plan.to_dict().values()}
    assert kinds <= {int, float, bool, str, dict, type(None)}


def test_more_steps_than_anybody_takes_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^epochs: expected at most 1e\+12 steps"):
        DPPlan(samples=100, batch_size=10, epochs=1e300)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, True, "1", 1j])
def test_clippings_refuse_other_numbers(wrong: Any) -> None:
    for make in (
        lambda: AutomaticClipping(gamma=wrong),
        lambda: AdaptiveClipping(quantile=wrong),
        lambda: AdaptiveClipping(learning_rate=wrong),
        lambda: PerLayerClipping(weights=(("fc", wrong),)),
    ):
        with pytest.raises(PlanError):
            make()


@pytest.mark.parametrize("wrong", [-1.0, 0.0, math.nan, math.inf, True, "1", None])
def test_a_budget_that_is_none_is_refused(wrong: Any) -> None:
    plan = DPPlan(samples=100, batch_size=10, epochs=1)
    with pytest.raises(PlanError, match=r"^epsilon: expected"):
        plan.calibrate(epsilon=wrong, delta=1e-3)
    with pytest.raises(PlanError, match=r"^delta: expected"):
        plan.calibrate(epsilon=1.0, delta=wrong if wrong else 0.0)


def test_epsilon_is_never_negative() -> None:
    """With hardly any cost and a large delta both accountants go below 0."""
    for noise, delta in ((1e3, 0.5), (1e4, 0.9), (100.0, 0.99)):
        steps = GaussianSteps(noise_multiplier=noise, sampling_rate=0.01, steps=1)
        assert epsilon_of([steps], delta=delta) >= 0.0


def test_the_forward_that_a_refusal_shows_runs_the_model() -> None:
    """It runs as it stands."""
    data = [{"image": torch.rand(4), "label": i % 2} for i in range(SAMPLES)]
    with pytest.raises(PlanError) as refused:
        attached(data=data)
    found = re.search(r"lambda model, batch: model\(batch\['image'\]\)", str(refused.value))
    assert found is not None
    attached(data=data, forward=eval(found[0]))


HOOKS: dict[str, Callable[[nn.Parameter], Any]] = {
    "tensor": lambda parameter: parameter.register_hook(lambda gradient: 2 * gradient),
    "accumulated": lambda parameter: parameter.register_post_accumulate_grad_hook(
        lambda parameter: parameter.grad.mul_(2)
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_on_a_trainable_gradient_is_refused(kind: str, late: bool) -> None:
    """It would be called without a gradient, and change nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    private = attached(model) if late else None

    def train() -> None:
        training = private or attached(model)
        images, labels = next(training.batches)
        training.step(F.cross_entropy(model(images), labels, reduction="none"))

    handle = HOOKS[kind](model[1].weight)
    with pytest.raises(StepError, match=r"^1\.weight: a hook on its gradient .*handle\.remove\(\)"):
        train()
    handle.remove()
    train()


def test_a_hook_on_a_frozen_parameter_is_not_refused() -> None:
    """Control: it has no gradient to change."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.register_hook(lambda gradient: gradient)
    model[0].requires_grad_(False)
    attached(model)


class Own(torch.optim.SGD):
    """An optimizer of one's own, with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Own])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_beside_the_private_one_is_refused(kind: Any, scheduled: bool) -> None:
    """The old habit, which would train nothing in silence; afterwards it is free again."""
    model = nn.Linear(4, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    private = attached(model, optimizer=optimizer)
    images, labels = next(private.batches)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(StepError, match=r"^optimizer\.step\(\) was called beside the private step"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    private.step(F.cross_entropy(model(images), labels, reduction="none"))
    with pytest.raises(StepError, match="beside the private step"):
        optimizer.step()
    private.detach()
    optimizer.step()


def test_an_attachment_that_fails_leaves_the_optimizer_to_its_user() -> None:
    """Where anything was refused, nothing is reserved."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger()
    ledger.close()
    with pytest.raises(PrivacyError):
        attached(model, optimizer=optimizer, data=[(torch.zeros(3), 0)] * 8, ledger=ledger)
    optimizer.step()


class Bare(torch.optim.Optimizer):
    """A wrapper that says nothing to its base class."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.param_groups = inner, inner.param_groups
        self.state, self.defaults = inner.state, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class HooksByHand(Bare):
    """One that has the hooks' places, and never calls them."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()


def dropped_in(model: nn.Module, optimizer: Any) -> Any:
    return PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(DATA, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize("kind", [Bare, HooksByHand])
@pytest.mark.parametrize("drop_in", [False, True])
def test_an_optimizer_that_cannot_be_reserved_is_refused(kind: Any, drop_in: bool) -> None:
    """By name, and the model is free afterwards."""
    model = nn.Linear(4, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StepError, match=rf"^optimizer: {kind.__name__} steps past the hooks"):
        (dropped_in if drop_in else attached)(model, optimizer=kind(inner))
    attached(model, optimizer=inner).detach()
