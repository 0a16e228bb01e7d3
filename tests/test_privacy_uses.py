"""Parameters of people's own modules: followed to where they are used, whatever else is inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gradients import check, close, drawn, filled
from torch import Tensor, nn

from privacy import DPPlan, PrivateTraining, UnsupportedLayer, attach
from privacy.clipping import FallbackRule, rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.clipping.uses import UsesRule

WIDTH, STEPS, EXAMPLES = 4, 3, 5


class Using(nn.Module):
    """Owns a parameter [width], a layer, and uses both as it is told."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...] = (WIDTH,)):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(shape))
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop, self.use = nn.Dropout(0.5), use

    def forward(self, inputs: Tensor) -> Tensor:
        return self.use(self, inputs)


def in_place(module: Any, x: Tensor) -> Tensor:
    hidden = module.inner(x)
    hidden += module.own
    hidden[:, 0] = module.own.sin() * 2
    hidden.mul_(module.own)
    return hidden.cos()


def with_token(module: Any, x: Tensor) -> Tensor:
    token = module.own.view(1, 1, -1).expand(len(x), -1, -1)
    return module.inner(torch.cat([token, x], 1)).sin()


def branching(module: Any, x: Tensor) -> Tensor:
    rows = [row * module.own if row.sum() > 0 else row - module.own for row in x.split(1)]
    return module.inner(torch.cat(rows))


def decided(module: Any, x: Tensor) -> Tensor:
    return module.inner(x) if module.own.sum() > 0 else module.inner(x * module.own)


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum": lambda module, x: module.inner(x + module.own).sin(),
    "product": lambda module, x: module.inner(x).sin() * module.own,
    "twice": lambda module, x: (module.inner(x * module.own) + module.own).sin(),
    "function first": lambda module, x: module.inner(x) * F.softplus(module.own)[None, None] + 1,
    "norm": lambda module, x: F.layer_norm(module.inner(x), (WIDTH,), module.own, module.own * 2),
    "matrix": lambda module, x: module.inner(x) @ torch.outer(module.own, module.own),
    "linear": lambda module, x: F.linear(module.inner(x), module.own.diag(), module.own),
    "token": with_token,
    "repeated": lambda module, x: torch.cat([x, module.own.repeat(len(x), 2, 1)], 1).sin(),
    "in place": in_place,
    "several": lambda module, x: torch.addcmul(module.inner(x), x.sin(), module.own).cos(),
    "named": lambda module, x: torch.add(input=module.inner(x), other=module.own, alpha=2).sin(),
    "indexed": lambda module, x: module.inner(x) * module.own[torch.tensor([1, 0, 3, 3])],
    "bias of attention": lambda module, x: F.scaled_dot_product_attention(
        module.inner(x), x, x, attn_mask=module.own[:STEPS, None] * module.own[None, :STEPS]
    ),
    "convolution": lambda module, x: F.conv1d(x, module.own.expand(2, STEPS, WIDTH)),
    "decided": decided,
}


@pytest.mark.parametrize("kind", USES)
def test_an_own_parameter_has_each_examples_gradient(kind: str) -> None:
    """Beside a layer with a rule of its own, which keeps it; the values are the module's own."""
    model = filled(Using(USES[kind]))
    model.inner.requires_grad_(kind not in ("repeated", "convolution"))
    inputs, recorded = drawn(EXAMPLES, STEPS, WIDTH), copy.deepcopy(model)
    installation = install(recorded, Tape(), rule_of)
    assert isinstance(installation.rules["Using"], UsesRule)
    close(recorded(inputs).detach(), model(inputs).detach())
    check(model, inputs)


class Cell(nn.Module):
    """A layer of two inputs and two outputs, which torch cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gru = nn.LSTMCell(WIDTH, 3), nn.GRUCell(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs[:, 1, :3]
        return self.cell(inputs[:, 0], (state, state))[0] + self.gru(inputs[:, 2], state)


class Several(nn.Module):
    """A bilinear form, a list of parameters, and a dictionary of them."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(WIDTH, WIDTH, 2)
        self.scales = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(()))})

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = self.both(inputs[:, 0], inputs[:, 1]) * self.scales[0]
        return (scaled + self.shifts["a"]).sin() * self.scales[1]


class Vision(nn.Module):
    """A transformer of images as people write it: a token, positions and a scale at the root."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, STEPS + 1, WIDTH))
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=dropout, batch_first=True)
        self.memory = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], 1)
        hidden = self.body(self.drop(hidden + self.positions))
        return self.head(self.memory(hidden)[0][:, -1]) * self.scale.exp()


@pytest.mark.parametrize("make", [Cell, Several, lambda: Vision(dropout=0.0)])
def test_whole_networks_have_each_examples_gradient(make: Callable[[], nn.Module]) -> None:
    """An unrelated parameter of the root decides nothing."""
    check(filled(make()), drawn(EXAMPLES, STEPS, WIDTH))


def attached(model: nn.Module, samples: int = 12) -> PrivateTraining:
    data = [(drawn(STEPS, WIDTH, seed=i), i % 3) for i in range(samples)]
    plan = DPPlan(samples=samples, batch_size=samples, epochs=1, noise_multiplier=1.0)
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), data)


def test_a_root_with_parameters_may_hold_dropout() -> None:
    """It was run again as a whole, where no random number may be drawn."""
    private = attached(Vision(dropout=0.1).double())
    described = private.describe()
    assert described.count("SLOW PATH") == 1
    assert "Vision" in next(line for line in described.splitlines() if "SLOW PATH" in line)
    for images, labels in private.batches:
        losses = F.cross_entropy(private.model(images), labels, reduction="none")
        assert private.step(losses)


class Elsewhere(torch.autograd.Function):
    """Torch does not tell of what goes in here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, own: Tensor) -> Tensor:
        return x * own

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, own = ctx.saved_tensors
        return gradients[0] * own, (gradients[0] * x).flatten(0, -2).sum(0)


WHOLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function that is not followed": lambda module, x: module.inner(
        Elsewhere.apply(x, module.own)
    ),
    "steps first": lambda module, x: (module.inner(x).transpose(0, 1) * module.own).transpose(0, 1),
    "into a layer": lambda module, x: x * module.inner(module.own),
    "written to": lambda module, x: module.inner(x) * module.own.clone().add_(1),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_followed_runs_again_as_a_whole(kind: str) -> None:
    """As every module that owned a parameter did; its gradients are exact there too."""
    model = Using(lambda module, x: WHOLE[kind](module, x).flatten(1)).double()
    with torch.no_grad():
        model.own.fill_(0.5)
    private = attached(model)
    assert private.describe().count("SLOW PATH: torch.func runs it again") == 1
    assert "inner" not in private.describe()
    for images, labels in private.batches:
        losses = F.cross_entropy(private.model(images), labels, reduction="none")
        assert private.step(losses)


def test_what_neither_way_can_record_is_refused_by_name() -> None:
    """Steps in dimension 0, and a dropout inside: the parameter's owner and what to do."""
    model = Using(
        lambda module, x: (
            (module.drop(module.inner(x)).transpose(0, 1) * module.own).transpose(0, 1).flatten(1)
        )
    ).double()
    with pytest.raises(
        UnsupportedLayer, match=r"^Using: .*whole: Using: .*random numbers.*move own into"
    ):
        attached(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_weight_norm_is_one_layer_with_what_makes_its_weight() -> None:
    """With a bias and without one, which decided before."""
    for bias in (True, False):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3, bias=bias))
        model = nn.Sequential(layer, nn.Tanh()).double()
        assert isinstance(rule_of(layer, "0"), FallbackRule)
        check(model, drawn(EXAMPLES, WIDTH))


def test_rows_of_others_are_still_found() -> None:
    """A batch of three whose parameter was spread over three steps: not taken for examples."""

    def use(module: Any, x: Tensor) -> Tensor:
        spread = module.own.expand(STEPS, WIDTH)
        return (module.inner(x) * spread.unsqueeze(0)).flatten(1)

    model = Using(use).double()
    with torch.no_grad():
        model.own.fill_(0.5)
    private = attached(model)
    for images, labels in private.batches:
        private.step(F.cross_entropy(private.model(images), labels, reduction="none"))
