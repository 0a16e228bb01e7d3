"""Layers beyond convolutions: their rules, a user's rule, whole networks, the printout."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import check, close, drawn, filled, losses_of, one_at_a_time
from torch import nn

import privacy
from privacy.clipping import FallbackRule, Instantiated, register, rule_of
from privacy.clipping.factors import clip_factors
from privacy.clipping.layers import install
from privacy.clipping.linear import LinearRule, _kernels, _most
from privacy.clipping.normalisation import _sums_over_positions
from privacy.clipping.registry import describe
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Choice, Tuner
from privacy.errors import PlanError, UnsupportedLayer

properties = settings(deadline=None, derandomize=True, max_examples=40)


def kind_of(layer: nn.Module) -> str:
    """The name of the rule that a layer gets."""
    return type(rule_of(layer, "layer")).__name__


@properties
@given(
    dimensions=st.integers(1, 3),
    channels=st.integers(1, 4),
    sizes=st.lists(st.integers(2, 4), min_size=3, max_size=3),
    examples=st.integers(1, 3),
    tracking=st.booleans(),
    last=st.booleans(),
)
def test_instance_norm_gives_each_examples_gradient(
    dimensions: int, channels: int, sizes: list[int], examples: int, tracking: bool, last: bool
) -> None:
    """Signals, images and volumes, with statistics of the example or, in eval mode, fixed ones."""
    kind = getattr(nn, f"InstanceNorm{dimensions}d")
    layer = filled(kind(channels, affine=True, track_running_stats=tracking))
    inputs = 3 * drawn(examples, channels, *sizes[:dimensions]) + 2
    if last and dimensions == 2:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if tracking:
        layer.eval()
        layer.running_mean.copy_(drawn(channels))
        layer.running_var.copy_(drawn(channels, seed=2).square() + 0.1)
    assert kind_of(layer) == "InstanceNormRule"
    check(layer, inputs)


def test_instance_norm_refuses_what_has_no_gradient_an_example() -> None:
    """Statistics that are being gathered, and an input without a batch dimension."""
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    with pytest.raises(UnsupportedLayer, match=r"^norm: InstanceNorm2d keeps running statistics"):
        rule_of(layer, "norm").forward(torch.zeros(3, 3, 4, 4))
    with pytest.raises(UnsupportedLayer, match=r"^norm: expected a batch of 4 dimensions"):
        rule_of(layer, "norm").forward(torch.zeros(3, 4, 4))


@properties
@given(
    shape=st.lists(st.integers(2, 4), min_size=2, max_size=4),
    normalised=st.integers(1, 3),
    eps=st.sampled_from([None, 1e-2]),
)
def test_rms_norm_takes_any_normalised_shape(
    shape: list[int], normalised: int, eps: float | None
) -> None:
    """Positions that are not normalised are added up inside the example."""
    layer = filled(nn.RMSNorm(shape[1:][-normalised:], eps=eps))
    assert kind_of(layer) == "RMSNormRule"
    inputs = 2 * drawn(*shape)
    close(rule_of(layer, "norm").forward(inputs)[0].detach(), layer(inputs).detach())
    check(layer, inputs)


@properties
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4), single=st.booleans())
def test_prelu_gives_each_examples_gradient(shape: list[int], single: bool) -> None:
    """One slope for all, and one a channel; zero is on the slope's side."""
    layer = filled(nn.PReLU(1 if single else shape[1]))
    assert kind_of(layer) == "PReLURule"
    inputs = drawn(*shape)
    inputs.flatten()[-1] = 0  # where the losses have a gradient
    check(layer, inputs)


def test_prelu_takes_rows_without_features() -> None:
    """One number an example."""
    check(filled(nn.PReLU()), drawn(5), lambda model, inputs: model(inputs).square())


@properties
@given(
    trailing=st.lists(st.integers(1, 4), max_size=2),
    rows=st.integers(2, 6),
    width=st.integers(1, 3),
    padding=st.sampled_from([None, 0, -1]),
    examples=st.integers(1, 4),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 99),
)
def test_embedding_gives_each_examples_gradient(
    trailing: list[int],
    rows: int,
    width: int,
    padding: int | None,
    examples: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """A row looked up twice in an example is added before its norm; the padding moves nothing."""
    layer = filled(nn.Embedding(rows, width, padding_idx=padding))
    assert kind_of(layer) == "EmbeddingRule"
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(rows, (examples, *trailing), generator=generator, dtype=dtype)
    check(layer, indices)


@pytest.mark.parametrize("setting", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_embedding_settings_that_void_the_guarantee_are_refused(setting: str) -> None:
    """By the layer's dotted name, with the reason and the cure."""
    layer = nn.Embedding(5, 3, **{setting: 1.0 if setting == "max_norm" else True})
    model = nn.Sequential(layer, nn.Flatten())
    with pytest.raises(UnsupportedLayer, match=f"^0: Embedding with {setting} .*without {setting}"):
        install(model, Tape(), rule_of)


def test_embedding_keeps_large_indices_whole() -> None:
    """Beyond 2^24 neighbouring indices are one number in float32."""
    layer = nn.Embedding(2**24 + 2, 1)
    indices = torch.tensor([2**24, 2**24 + 1])
    ((_, part),) = rule_of(layer, "words").per_example_gradients(indices, (), torch.ones(2, 1))
    total = part.weighted_sum(torch.ones(2))
    assert total[-2:].flatten().tolist() == [1.0, 1.0]


def test_embedding_does_not_underestimate_a_norm_of_what_cancels() -> None:
    """One row looked up a thousand times, by gradients that nearly add up to nothing."""
    dy = drawn(4, 1000, 3) * 1e3
    dy = (dy - dy.mean(1, keepdim=True) + 1e-3).float()
    layer, indices = nn.Embedding(2, 3), torch.zeros(4, 1000, dtype=torch.int64)
    ((_, part),) = rule_of(layer, "words").per_example_gradients(indices, (), dy)
    true = dy.double().sum(1).norm(dim=1)
    assert (part.squared_norms().sqrt() >= true).all()


class TiedTable(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Embedding(6, 3, padding_idx=1), nn.Linear(3, 6)
        self.back.weight = self.into.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.back(self.into(inputs).tanh())


def test_a_table_tied_to_a_linear_layer_is_one_parameter() -> None:
    """Both uses are added before the norm is taken."""
    check(filled(TiedTable()), torch.tensor([[0, 1, 1], [5, 5, 2]]))


def positions_loop(
    layer: nn.Linear, inputs: torch.Tensor, output_gradient: torch.Tensor
) -> torch.Tensor:
    """The truth: autograd on one example at a time, [n, *weight.shape]."""
    rows = [
        torch.autograd.grad(layer(x), layer.weight, dy)[0]
        for x, dy in zip(inputs, output_gradient, strict=True)
    ]
    return torch.stack(rows)


@properties
@given(
    examples=st.integers(1, 9),
    positions=st.integers(1, 6),
    features=st.integers(1, 5),
    outputs=st.integers(1, 5),
)
def test_every_linear_kernel_equals_the_per_example_loop(
    examples: int, positions: int, features: int, outputs: int
) -> None:
    """Norms, clipped sum and gradients, for kept gradients, deferred ones and Gram matrices."""
    layer = nn.Linear(features, outputs, bias=False).double()
    x, dy = drawn(examples, positions, features), drawn(examples, positions, outputs, seed=2)
    truth = positions_loop(layer, x, dy)
    factors = torch.rand(examples, dtype=torch.float64)
    kernels = _kernels(x, dy)
    assert [k.name for k in kernels] == ["product", "product, then native", "gram, then native"]
    for kernel in kernels:
        part = kernel.run(x, dy)
        squares, scale = part.squared_norms(), _most(x, dy).square()
        expected = truth.flatten(1).square().sum(1)
        assert ((squares - expected).abs() <= 1e-9 * scale).all(), kernel.name
        close(part.weighted_sum(factors), torch.tensordot(factors, truth, 1))
        close(part.instantiate(), truth)


@pytest.mark.parametrize("number", range(3))
def test_no_linear_kernel_underestimates_a_norm_of_what_cancels(number: int) -> None:
    """Nearly constant inputs and output gradients that add up to nothing: the norm is rounded up.

    A plain Gram product comes out several percent short here, the control below.
    """
    x = (drawn(64, 64, 8) * 1e-3 + 1).float()
    dy = drawn(64, 64, 8, seed=2) * 100
    dy = (dy - dy.mean(1, keepdim=True)).float()
    true = torch.bmm(dy.double().mT, x.double()).flatten(1).norm(dim=1)
    kernel = _kernels(x, dy)[number]
    allowed = 1 - 1e-5 if number else 1 - 1e-3  # what is kept is its own truth
    assert (kernel.run(x, dy).squared_norms().sqrt() >= allowed * true).all()
    plain = (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).flatten(1).sum(1).clamp(min=0).sqrt()
    assert (plain < 0.99 * true).any()


def test_linear_on_rows_needs_no_choice() -> None:
    """Without positions the norm is a product of two norms: the tuner is not asked."""
    tuner = Tuner()
    rule = LinearRule(nn.Linear(4, 3), "fc", tuner)
    rule.per_example_gradients(torch.rand(16, 4), (), torch.rand(16, 3))
    assert tuner.choices == ()
    rule.per_example_gradients(torch.rand(16, 5, 4), (), torch.rand(16, 5, 3))
    assert [choice.layer for choice in tuner.choices] == ["fc"]


@properties
@given(
    examples=st.integers(1, 70),
    channels=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=2),
    layouts=st.tuples(*[st.sampled_from([torch.contiguous_format, torch.channels_last])] * 2),
    values=st.sampled_from([1, 64, 1000]),
)
def test_sums_over_positions_are_right_in_every_layout(
    examples: int,
    channels: int,
    sizes: list[int],
    layouts: tuple[torch.memory_format, ...],
    values: int,
) -> None:
    """The kernel's way, and image rows in slices with a rest, equal the plain product."""
    x, dy = (drawn(examples, channels, *sizes, seed=seed) for seed in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.clipping.normalisation._CACHE", 0)
        patch.setattr("privacy.clipping.normalisation._SLICE", values)
        product, total = _sums_over_positions(
            x.contiguous(memory_format=layouts[0]), dy.contiguous(memory_format=layouts[1])
        )
    close(product, (x * dy).sum((2, 3)), 1e-11 * (1 + x.numel()))
    close(total, dy.sum((2, 3)), 1e-11 * (1 + x.numel()))


OF_OPACUS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "InstanceNorm1d": lambda: (nn.InstanceNorm1d(4, affine=True), torch.rand(3, 4, 5)),
    "InstanceNorm2d": lambda: (nn.InstanceNorm2d(4, affine=True), torch.rand(3, 4, 5, 2)),
    "InstanceNorm3d": lambda: (nn.InstanceNorm3d(4, affine=True), torch.rand(3, 4, 5, 2, 2)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 4), torch.rand(3, 4, 5, 2)),
    "LayerNorm": lambda: (nn.LayerNorm(4), torch.rand(3, 5, 4)),
    "RMSNorm": lambda: (nn.RMSNorm(4), torch.rand(3, 5, 4)),
    "Embedding": lambda: (nn.Embedding(7, 3), torch.tensor([[1, 1, 2], [6, 0, 1]])),
    "Linear with positions": lambda: (nn.Linear(4, 3), torch.rand(3, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", OF_OPACUS)
def test_the_gradients_are_those_of_opacus(kind: str) -> None:
    """An independent implementation in float32, for every layer here that it supports."""
    opacus = pytest.importorskip("opacus")
    model, inputs = OF_OPACUS[kind]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    theirs = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    losses_of(theirs, inputs).sum().backward()
    parts = recorded(model, inputs)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        close(parts[ours].instantiate(), other.grad_sample, 1e-4)


def recorded(model: nn.Module, inputs: torch.Tensor, tuner: Tuner | None = None) -> dict:
    """Per-example gradients of a model that is installed for it."""
    tape = Tape()
    installation = install(model, tape, lambda layer, name: rule_of(layer, name, tuner))
    losses = losses_of(model, inputs)
    with tape.record(examples=len(inputs)):
        losses.sum().backward()
    installation.remove()
    return tape.take()


class Power(nn.Module):
    """A user's layer: each feature to a trained power."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.ones(features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs.square() + 1) ** self.exponent


class PowerRule:
    """A user's rule for it."""

    def __init__(self, layer: Power, name: str) -> None:
        self.layer, self.name = layer, name
        self.parameters = (layer.exponent,)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output = (inputs.square() + 1) ** self.layer.exponent
        return output, (output,)

    def input_gradient(self, inputs, saved, output_gradient):
        base = inputs.square() + 1
        return output_gradient * saved[0] * self.layer.exponent * 2 * inputs / base

    def per_example_gradients(self, inputs, saved, output_gradient):
        gradient = output_gradient * saved[0] * (inputs.square() + 1).log()
        return [(self.layer.exponent, Instantiated([gradient]))]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The process's added rules, emptied and put back afterwards."""
    rules: dict = {}
    monkeypatch.setattr("privacy.clipping.registry._ADDED", rules)
    return rules


def test_a_user_adds_a_layer(added: dict) -> None:
    """Slow and exact before, by the user's rule and as exact afterwards; subclasses stay slow."""
    assert kind_of(Power(4)) == "UsesRule"
    check(filled(Power(4)), drawn(3, 4))
    assert register(Power, PowerRule) is None
    assert kind_of(Power(4)) == "PowerRule"
    assert kind_of(type("Other", (Power,), {})(4)) == "UsesRule"
    check(filled(nn.Sequential(nn.Linear(3, 4), Power(4), nn.Linear(4, 2))), drawn(3, 3))


def test_a_rule_is_not_replaced_by_accident(added: dict) -> None:
    """Neither one of ours nor a user's earlier one, unless it is said."""
    for layer_type in (nn.Linear, Power):
        if layer_type is Power:
            register(Power, PowerRule)
        with pytest.raises(UnsupportedLayer, match=f"^{layer_type.__name__}: .*replace=True"):
            register(layer_type, PowerRule)
    register(nn.Linear, FallbackRule, replace=True)
    assert kind_of(nn.Linear(2, 2)) == "FallbackRule"
    check(filled(nn.Linear(4, 2)), drawn(3, 4))


def test_a_rule_is_registered_for_a_type(added: dict) -> None:
    """A layer in a type's place is refused."""
    with pytest.raises(UnsupportedLayer, match=r"^layer_type: expected a subclass of torch\.nn"):
        register(nn.Linear(2, 2), PowerRule)
    assert added == {}


def test_two_forwards_and_one_backward_are_one_gradient() -> None:
    """As in TRADES, through layers whose norms are known without their gradients."""

    def objective(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        clean, shifted = model(inputs), model(inputs * 0.9 - 0.1)
        return (clean.softmax(-1) * shifted.log_softmax(-1)).flatten(1).sum(1)

    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.PReLU(), nn.Linear(4, 3))
    check(filled(model), drawn(3, 5, 4), objective)


def resnet18() -> nn.Module:
    """The one of torchvision, made fit for private training."""
    models = pytest.importorskip("torchvision.models")
    return privacy.fix(models.resnet18(num_classes=10))


def out_of_place(model: nn.Module) -> nn.Module:
    """The same function without in-place operations, which module hooks cannot follow."""
    blocks = pytest.importorskip("torchvision.models.resnet")

    class Block(blocks.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(out + (x if self.downsample is None else self.downsample(x)))

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        elif type(module) is blocks.BasicBlock:
            module.__class__ = Block
    return model


def test_resnet18_gives_each_examples_gradient() -> None:
    """In-place ReLU and `+=` included: one example at a time in float64, to 1e-9."""
    model, images = resnet18().double(), drawn(4, 3, 32, 32)
    expected, at_inputs = one_at_a_time(copy.deepcopy(model), images, losses_of)
    images.requires_grad_()
    parts = recorded(model, images)
    named = dict(model.named_parameters())
    assert set(parts) == set(named.values())
    for name, parameter in named.items():
        close(parts[parameter].instantiate(), expected[name])
        squares = expected[name].flatten(1).square().sum(1)
        close(parts[parameter].squared_norms(), squares)
    close(images.grad, at_inputs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_resnet18_gives_the_gradients_of_opacus() -> None:
    """Opacus' hooks in float32, on the same network without its in-place operations."""
    opacus = pytest.importorskip("opacus")
    model, images = resnet18(), drawn(4, 3, 32, 32).float()
    theirs = opacus.GradSampleModule(out_of_place(copy.deepcopy(model)), loss_reduction="sum")
    losses_of(theirs, images).sum().backward()
    parts = recorded(model, images)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        error = (parts[ours].instantiate() - other.grad_sample).norm() / other.grad_sample.norm()
        assert error < 1e-4


HALF: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "images": lambda: (
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(True)),
            *(nn.Conv2d(8, 8, 3, stride=2), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)),
            *(nn.Flatten(), nn.Linear(128, 5)),
        ),
        torch.rand(8, 2, 9, 9),
    ),
    "tokens": lambda: (
        nn.Sequential(
            *(nn.Embedding(7, 16), nn.Linear(16, 16), nn.RMSNorm(16), nn.PReLU()),
            *(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)),
        ),
        torch.randint(7, (8, 12)),
    ),
}


@pytest.mark.parametrize("number", range(3), ids=["product", "product, deferred", "gram"])
@pytest.mark.parametrize("kind", HALF)
def test_autocast_is_clipped_within_the_bound(kind: str, number: int) -> None:
    """Under bfloat16 autocast the true norm of what each example adds never exceeds C."""
    names = ["product", "product, then native", "gram, then native"]
    model, inputs = HALF[kind]()
    fixed = dict.fromkeys(["1", "4", "6"], names[number]) if kind == "tokens" else {}
    tape, tuner = Tape(), Tuner(fixed=fixed)
    install(model, tape, lambda layer, name: rule_of(layer, name, tuner))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, inputs)
    with tape.record(examples=8):
        losses.sum().backward()
    parts = tape.take()
    squared = torch.stack([part.squared_norms() for part in parts.values()]).sum(0)
    assert squared.dtype == torch.float64
    factors = clip_factors(squared, max_grad_norm=0.1)
    assert (factors < 1).all()
    for row in range(8):
        alone = factors * (torch.arange(8) == row)
        with torch.no_grad():
            sums = [part.weighted_sum(alone) for part in parts.values()]
        assert all(total.dtype == torch.float32 for total in sums)
        norm = torch.stack([total.double().square().sum() for total in sums]).sum().sqrt()
        assert 0.0999 <= float(norm) <= 0.1


def test_autocast_reaches_convolutions() -> None:
    """A convolution behind a layer that autocast runs in bfloat16."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Conv2d(2, 3, 3))
    install(model, Tape(), rule_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.rand(2, 2, 5, 5)).dtype == torch.bfloat16


def several() -> tuple[nn.Module, torch.Tensor]:
    """Several layers that the tuner chooses for, one that it does not, and one on the slow path."""
    model = nn.Sequential(
        nn.Unflatten(1, (2, 12, 12)),
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.Linear(100, 8),
        Power(8),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    return model, torch.rand(16, 288)


def attached(tuner: Tuner) -> tuple[privacy.PrivateTraining, torch.Tensor]:
    """A private training of that network that has taken one step."""
    model, images = several()
    plan = privacy.DPPlan(samples=16, batch_size=16, epochs=2, noise_multiplier=1.0, delta=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(image, 0) for image in images]
    private = privacy.attach(plan, model, optimizer, data, tuner=tuner)
    batch, _ = next(private.batches)
    private.step(private.model(batch).square().flatten(1).sum(1))
    return private, images


def test_the_printout_says_what_runs_at_each_layer() -> None:
    """Kernel and milliseconds of what was timed, and that the fallback is the slow path."""
    private, _ = attached(Tuner())
    lines = {line.split()[0]: line for line in private.describe().splitlines()}
    assert list(lines) == ["layer", "1", "2", "4", "5", "7"]
    assert lines["layer"].split() == ["layer", "type", "input", "kernel", "ms"]
    assert re.match(r"1 +Conv2d +2x12x12 +\S.* \d+\.\d\d$", lines["1"])
    assert re.match(r"2 +GroupNorm +- +the layer's own +-$", lines["2"])
    assert re.match(r"4 +Linear +4x100 +(product|gram).* \d+\.\d\d$", lines["4"])
    assert re.match(r"5 +Power +- +SLOW PATH: ", lines["5"])
    assert re.match(r"7 +Linear +- +the layer's own +-$", lines["7"])  # rows: nothing to choose
    private.detach()
    assert private.describe().split() == ["layer", "type", "input", "kernel", "ms"]


def test_the_printout_does_not_tell_a_samples_size() -> None:
    """How many examples a Poisson sample had is not covered by epsilon."""
    model, images = several()
    texts = []
    for rows in (13, 16):
        tape, tuner = Tape(), Tuner(fixed={"1": "grouped", "4": "product"})
        find = lambda layer, name, tuner=tuner: rule_of(layer, name, tuner)  # noqa: E731
        installation = install(model, tape, find)
        with tape.record(examples=rows):
            model(images[:rows]).sum().backward()
        texts.append(describe(installation))
        installation.remove()
    assert texts[0] == texts[1]
    assert texts[0].count("not timed") == 2


def test_choices_can_be_saved_and_fixed() -> None:
    """What one training timed, the next one takes: untimed, the same kernels."""
    first = Tuner()
    attached(first)
    saved = {choice.layer: choice.kernel for choice in first.choices}
    assert set(saved) == {"1", "4"}
    second = Tuner(fixed=saved)
    attached(second)
    assert {choice.layer: choice.kernel for choice in second.choices} == saved
    assert all(isinstance(choice, Choice) and not choice.seconds for choice in second.choices)
    with pytest.raises(PlanError, match="4: expected one of the kernels product"):
        attached(Tuner(fixed={"4": "columns"}))


def test_the_linear_kernel_changes_only_rounding() -> None:
    """The clipped sum is one to float32 rounding, whichever kernel is fixed."""
    torch_generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, 6, 5, generator=torch_generator)
    dy = torch.rand(16, 6, 4, generator=torch_generator)
    sums = []
    for kernel in _kernels(x, dy):
        part = kernel.run(x, dy)
        factors = clip_factors(part.squared_norms(), max_grad_norm=1.0)
        sums.append(part.weighted_sum(factors))
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-4, atol=1e-5)
    assert F.mse_loss(sums[0], torch.zeros_like(sums[0])) > 0
