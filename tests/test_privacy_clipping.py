"""Per-example gradients of every layer family against one example at a time, in float64."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import check, close, drawn, filled, losses_of, one_at_a_time
from torch import nn

from privacy.clipping import rule_of
from privacy.clipping.factors import clip_factors
from privacy.clipping.gradients import GhostNorm, Instantiated, row_squared_norms
from privacy.clipping.layers import install
from privacy.clipping.linear import LinearRule
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Tuner
from privacy.errors import PrivacyError, StepError, UnsupportedLayer

properties = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def convolutions(draw: st.DrawFn, kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A convolution with drawn settings, and a batch that fits it."""
    dimensions = int(kind[-2])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    several = st.tuples(*[st.integers(1, 3)] * dimensions)
    kernel, stride = draw(several), draw(several)
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dimensions))
    padding: Any = draw(st.tuples(*[st.integers(0, 2)] * dimensions))
    settings: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if kind.startswith("ConvTranspose"):
        settings["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        # An output of no pixel is an error of the layer itself.
        padding = tuple(0 for _ in padding) if min(kernel) == 1 else tuple(p // 2 for p in padding)
    else:
        if draw(st.booleans()):
            padding, stride = "same", 1
        modes = ["zeros", "reflect", "replicate", "circular"]
        settings["padding_mode"] = draw(st.sampled_from(modes))
    layer = getattr(nn, kind)(*channels, kernel, stride=stride, padding=padding, **settings)
    sizes = draw(st.tuples(*[st.integers(5, 6)] * dimensions))
    return layer, drawn(draw(st.integers(1, 3)), channels[0], *sizes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    "kind",
    ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"],
)
@properties
@given(data=st.data())
def test_convolutions_give_each_examples_gradient(kind: str, data: st.DataObject) -> None:
    """Stride, padding and its modes, dilation, groups: all as one example at a time."""
    layer, inputs = data.draw(convolutions(kind))
    check(filled(layer), inputs)


@properties
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    outputs=st.integers(1, 4),
    bias=st.booleans(),
)
def test_linear_takes_any_leading_dimensions(shape: list[int], outputs: int, bias: bool) -> None:
    """Positions between the example and the features are added up inside the example."""
    check(filled(nn.Linear(shape[-1], outputs, bias=bias)), drawn(*shape))


@properties
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    sizes=st.lists(st.integers(2, 4), min_size=0, max_size=3),
    examples=st.integers(1, 3),
)
def test_group_norm_takes_any_positions(
    groups: int, width: int, sizes: list[int], examples: int
) -> None:
    """Rows, signals, images and volumes; rows have no position at all."""
    if not sizes and width == 1:
        width = 2  # one value has no deviation
    inputs = 3 * drawn(examples, groups * width, *sizes) + 2
    check(filled(nn.GroupNorm(groups, groups * width)), inputs)


@properties
@given(
    shape=st.lists(st.integers(2, 4), min_size=2, max_size=4),
    normalised=st.integers(1, 3),
    bias=st.booleans(),
)
def test_layer_norm_takes_any_normalised_shape(
    shape: list[int], normalised: int, bias: bool
) -> None:
    """Positions that are not normalised are added up inside the example."""
    over = shape[1:][-normalised:]
    check(filled(nn.LayerNorm(over, bias=bias)), drawn(*shape))


class Scaled(nn.Module):
    """A layer that owns a parameter and children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * self.inner(inputs) + inputs


class Doubled(nn.Linear):
    """A linear layer by type, and not by what it computes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs).square()


class Looked(nn.Embedding):
    """A subclass with whole-number inputs."""


FALLBACKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "BatchNorm in eval mode": lambda: (nn.BatchNorm2d(4).eval(), drawn(3, 4, 5, 2)),
    "a subclass of Linear": lambda: (Doubled(4, 2), drawn(3, 4)),
    "a parameter and children": lambda: (Scaled(), drawn(3, 4)),
    "a subclass of Embedding": lambda: (Looked(7, 3), torch.tensor([[1, 1, 2], [6, 0, 1]])),
}


@pytest.mark.parametrize("kind", FALLBACKS)
def test_any_other_layer_goes_through_the_fallback(kind: str) -> None:
    """Layers without a rule of their own are exact too."""
    layer, inputs = FALLBACKS[kind]()
    assert type(rule_of(layer, kind)).__name__ == "UsesRule"
    check(filled(layer), inputs)


class TwiceCalled(nn.Module):
    """One layer called twice in one forward, and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.first(inputs).tanh()))


class TiedWeights(nn.Module):
    """One parameter in two layers of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(4, 3), Doubled(4, 3, bias=False)
        self.back.weight = self.into.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.into(inputs).tanh() + self.back(inputs)


class Residual(nn.Module):
    """In-place ReLU after a layer, and `+=` onto a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm(self.first(inputs)), inplace=True)
        out = self.second(hidden)
        out += hidden
        return self.head(F.relu_(out).mean((2, 3)))


class SkippedLinear(nn.Module):
    """The gradient at a layer's output is also the one at its input's other use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        hidden = hidden + self.second(hidden)
        return hidden


NETS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "called twice": lambda: (TwiceCalled(), drawn(3, 4)),
    "tied weights": lambda: (TiedWeights(), drawn(3, 4)),
    "in-place operations": lambda: (Residual(), drawn(3, 2, 5, 5)),
    "skip around linear": lambda: (SkippedLinear(), drawn(3, 4)),
    "eval mode": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval(), drawn(3, 4)),
    "frozen BatchNorm in eval mode": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval().requires_grad_(False), nn.ReLU(True)
        ),
        drawn(3, 2, 5, 5),
    ),
    "BatchNorm in eval mode, line trained": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(True)),
        drawn(3, 2, 5, 5),
    ),
    "channels last, every image layer": lambda: (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(4)),
            # A bias before it would have no gradient at all.
            *(nn.Conv2d(4, 4, 3, bias=False), nn.InstanceNorm2d(4, affine=True), nn.ReLU(True)),
        ).to(memory_format=torch.channels_last),
        drawn(3, 2, 5, 5).contiguous(memory_format=torch.channels_last),
    ),
    "one PReLU called twice": lambda: (
        (lambda act: nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act))(nn.PReLU()),
        drawn(3, 3),
    ),
    "random layers in eval mode": lambda: (
        nn.Sequential(
            *(nn.Linear(4, 4), nn.Dropout(0.5), nn.RMSNorm(4), nn.RReLU(), nn.PReLU()),
        ).eval(),
        drawn(3, 5, 4),
    ),
    "tokens": lambda: (
        nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.RMSNorm(3)),
        torch.tensor([[1, 1, 2], [6, 0, 1], [3, 3, 3]]),
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_whole_networks_give_each_examples_gradient(kind: str) -> None:
    """What couples layers: shared layers and weights, in-place operations, modes, layouts."""
    model, inputs = NETS[kind]()
    check(filled(model), inputs)


def test_two_forwards_and_one_backward_are_one_gradient() -> None:
    """As in TRADES: clean and shifted images of one example are added before its norm is taken."""

    def objective(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        clean, shifted = model(images), model(images + 0.1)
        return clean.square().sum(1) + (clean.softmax(1) * shifted.log_softmax(1)).sum(1)

    check(filled(Residual()), drawn(3, 2, 5, 5), objective)


def test_frozen_parameters_are_left_out() -> None:
    """A frozen layer, and a layer of which only one parameter is trained."""
    model = filled(Residual())
    model.first.requires_grad_(False)
    model.second.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    check(model, drawn(3, 2, 5, 5))


def test_channels_last_gives_the_same_gradients() -> None:
    """The memory layout changes nothing."""
    model = filled(Residual()).to(memory_format=torch.channels_last)
    check(model, drawn(3, 2, 5, 5).to(memory_format=torch.channels_last))


def test_strided_inputs_give_the_same_gradients() -> None:
    """Normalisation layers read views that are contiguous in no layout."""
    view = drawn(3, 8, 5, 5)[:, ::2].transpose(2, 3)
    check(filled(nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))), view)
    check(filled(nn.LayerNorm(5)), view)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_gradients_are_those_of_opacus() -> None:
    """An independent implementation, in float32, on a small network."""
    opacus = pytest.importorskip("opacus")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 5),
    )
    images = torch.rand(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 3])
    theirs = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    F.cross_entropy(theirs(images), labels, reduction="sum").backward()
    tape = Tape()
    install(model, tape, rule_of)
    with tape.record(examples=4):
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    parts = tape.take()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        close(parts[ours].instantiate(), other.grad_sample, 1e-5)


def test_a_plain_backward_leaves_no_gradient_behind() -> None:
    """Outside the private step neither `.grad` nor the tape sees anything; images do."""
    model, images = filled(Residual()), drawn(3, 2, 5, 5)
    plain = copy.deepcopy(model)
    tape = Tape()
    install(model, tape, rule_of)
    attacked, reference = (images.clone().requires_grad_() for _ in range(2))
    losses_of(model, attacked).sum().backward()
    losses_of(plain, reference).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tape.take() == {}
    close(attacked.grad, reference.grad)


def test_without_gradients_the_layers_are_their_own() -> None:
    """Evaluation computes exactly what the plain model computes."""
    model, images = filled(Residual()), drawn(3, 2, 5, 5)
    plain = copy.deepcopy(model)
    install(model, Tape(), rule_of)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


def test_a_deep_copy_is_a_plain_model_again() -> None:
    """An averaged or exported copy computes with its own weights and has ordinary gradients."""
    model, images = filled(Scaled()), drawn(3, 4)
    install(model, Tape(), rule_of)
    other = copy.deepcopy(copy.deepcopy(model))
    with torch.no_grad():
        other.scale.zero_()
        torch.testing.assert_close(other(images), images)
    losses_of(other, images).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    install(other, Tape(), rule_of).remove()


def test_removing_gives_every_layer_its_forward_back() -> None:
    """After `remove` the model is as it was, and can be installed again."""
    model = filled(Residual())
    installation = install(model, Tape(), rule_of)
    installation.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    install(model, Tape(), rule_of)


def test_a_layer_is_installed_once() -> None:
    """A second installation would count every gradient twice; it is refused by name."""
    model = filled(Residual())
    install(model, Tape(), rule_of)
    with pytest.raises(StepError, match="first: its forward is already replaced"):
        install(model, Tape(), rule_of)


class Inside(nn.Module):
    """A layer inside another one that is recorded as a whole, and used by itself too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled()
        self.again = self.block.inner[0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.again(self.block(inputs))


def test_a_layer_is_not_recorded_both_alone_and_inside_another() -> None:
    """It would be counted twice; both names are in the message."""
    with pytest.raises(UnsupportedLayer, match="again: it is used by itself and inside block"):
        install(Inside(), Tape(), partial(rule_of, whole=("block",)))


class Cell(nn.Module):
    """A layer with two inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(len(inputs), 3)
        return self.cell(inputs[:, 0], (state, state))[0]


class DroppingOut(nn.Module):
    """Owns a parameter and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.dropout(inputs * self.scale, 0.5, training=True)


@pytest.mark.parametrize(
    ("layer", "name"),
    [(Cell(), "0.cell"), (DroppingOut(), "0")],
    ids=["two inputs", "random"],
)
def test_what_cannot_be_recorded_is_refused_by_name(layer: nn.Module, name: str) -> None:
    """Run again as a whole: not one tensor to one tensor, or not the same when it runs again."""
    model, tape = nn.Sequential(layer), Tape()
    install(model, tape, partial(rule_of, whole=(name,)))
    with pytest.raises(UnsupportedLayer, match=f"^{name}: "), tape.record(examples=2):
        model(torch.rand(2, 3, 4)).sum().backward()


def test_rows_that_are_not_examples_are_refused() -> None:
    """A layer that sees patches of examples as rows cannot be clipped by example."""
    model, tape = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 1)), Tape()
    install(model, tape, rule_of)
    with (
        pytest.raises(UnsupportedLayer, match=r"1: expected 2 rows.* got 6"),
        tape.record(examples=2),
    ):
        model(torch.rand(2, 3, 4)).sum().backward()


def test_one_recording_at_a_time() -> None:
    """A private backward pass inside another one is refused."""
    tape = Tape()
    with tape.record(examples=1), pytest.raises(PrivacyError, match="already running"):
        tape.record(examples=1).__enter__()


@properties
@given(
    norms=st.lists(st.floats(0, 1e150), min_size=1, max_size=5),
    bound=st.floats(1e-6, 1e6),
)
def test_no_factor_lets_a_norm_pass_the_bound(norms: list[float], bound: float) -> None:
    """Factors are in [0, 1], bound the norm, and spare what is well below it."""
    squared = torch.tensor(norms, dtype=torch.float64).square()
    factors = clip_factors(squared, max_grad_norm=bound)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert (factors * torch.tensor(norms, dtype=torch.float64) <= bound).all()
    assert (factors[squared.sqrt() < 0.99 * bound] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_gets_factor_zero(bad: float) -> None:
    """It contributes nothing, rather than everything."""
    assert clip_factors(torch.tensor([bad, 0.0]), max_grad_norm=1.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("value", [0.1, 1e-12, 1e15])
def test_norms_of_large_layers_are_not_underestimated(value: float) -> None:
    """Ten million equal gradients: float32 alone comes out one percent short."""
    rows = torch.full((1, 10_000_019), value)
    exact = rows[0, :1].double().square() * rows.shape[1]
    assert float(row_squared_norms(rows) / exact - 1) == pytest.approx(0, abs=1e-5)


def test_float32_alone_would_underestimate_them() -> None:
    """The control of the test above: it can fail."""
    rows = torch.full((1, 10_000_019), 0.1)
    plain = torch.linalg.vector_norm(rows, dim=1).double().square()
    assert abs(float(plain / (rows[0, :1].double().square() * rows.shape[1])) - 1) > 1e-3


def test_vanishing_squares_do_not_hide_a_norm() -> None:
    """Inputs whose squares underflow, times huge output gradients, still have a norm."""
    layer = nn.Linear(500, 1)
    inputs, output_gradient = torch.full((1, 500), 5e-24), torch.full((1, 1), 1e19)
    (_, part), _ = LinearRule(layer, "fc", Tuner()).per_example_gradients(
        inputs, (), output_gradient
    )
    true = part.instantiate().double().square().sum()
    assert part.squared_norms().item() >= true.item() > 0


def test_half_precision_does_not_round_factors_up() -> None:
    """Gradients in bfloat16 are clipped in float32: 0.334 would round up by a thousandth."""
    gradients = torch.ones(4, 9, dtype=torch.bfloat16)
    inputs, output_gradients = torch.ones(4, 9).bfloat16(), torch.ones(4, 1).bfloat16()
    deferred = GhostNorm(
        torch.full((4,), 9.0), inputs, output_gradients, lambda x, dy: dy.mT @ x, torch.mul
    )
    for part in (Instantiated([gradients]), deferred):
        factors = clip_factors(part.squared_norms(), max_grad_norm=1.002)
        assert part.weighted_sum(factors / 4).norm().item() <= 1.002


def test_autocast_is_clipped_within_the_bound() -> None:
    """Under bfloat16 autocast gradients are near the exact ones, and each stays within C."""
    model = filled(Residual()).float()
    images = drawn(3, 2, 5, 5).float()
    expected, _ = one_at_a_time(copy.deepcopy(model), images, losses_of)
    tape = Tape()
    install(model, tape, rule_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, images)
    with tape.record(examples=3):
        losses.sum().backward()
    parts = tape.take()
    for name, parameter in model.named_parameters():
        close(parts[parameter].instantiate().float(), expected[name], 0.1)
    squared = torch.stack([part.squared_norms() for part in parts.values()]).sum(0)
    factors = clip_factors(squared, max_grad_norm=0.1)
    for row in range(3):
        alone = factors * (torch.arange(3) == row)
        with torch.no_grad():
            sums = [part.weighted_sum(alone).double().square().sum() for part in parts.values()]
        assert float(torch.stack(sums).sum().sqrt()) <= 0.1
