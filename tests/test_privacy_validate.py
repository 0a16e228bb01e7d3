"""Layers that mix examples are found by type and by probe, and replaced."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privacy import StepError, UnsupportedLayer, check_layers, fix, mixing_layers
from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.probe import probe as probe_of
from privacy.probe import rehearse as rehearse_of
from privacy.trial import Trial
from privacy.validate import check_trainable, trainable_parameters


def probe(model: nn.Module, images: torch.Tensor) -> None:
    probe_of(Trial(model=model, examples=images))


def rehearse(
    model: nn.Module, images: torch.Tensor, named: dict[str, nn.Parameter], tape: Tape
) -> None:
    rehearse_of(Trial(model=model, examples=images), named, tape)


def around(layer: nn.Module) -> nn.Module:
    """A network with the layer at `body.1`."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"body": body})["body"])


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4).requires_grad_(False),
        nn.BatchNorm2d(4, track_running_stats=False).eval(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
    ids=["plain", "no affine", "frozen affine", "batch statistics in eval", "sync", "statistics"],
)
def test_layers_that_mix_examples_are_named(layer: nn.Module) -> None:
    """Whether or not they own a trainable parameter."""
    assert set(mixing_layers(around(layer))) == {"1.1"}
    with pytest.raises(UnsupportedLayer, match=r"^1\.1: \w+Norm2?d? (mixes|keeps)"):
        check_layers(around(layer))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4).eval(),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, track_running_stats=True).eval(),
        nn.LayerNorm(4),
    ],
)
def test_layers_that_do_not_are_not(layer: nn.Module) -> None:
    """Fixed statistics, and statistics of one example."""
    check_layers(around(layer))


def test_all_of_them_are_in_one_message() -> None:
    """So that they are cured at once."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UnsupportedLayer, match=r"^0: .*; 2: .*privacy\.fix"):
        check_layers(model)


def test_fix_replaces_every_batch_norm() -> None:
    """Also nested ones and the model itself; the weights, their device, type and freezing stay."""
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.Sequential(nn.BatchNorm2d(48, eps=1e-3))).double()
    with torch.no_grad():
        model[1][0].weight.copy_(torch.rand(48))
    model[1][0].bias.requires_grad_(False)
    weight = model[1][0].weight.clone()
    assert fix(model) is model
    new = model[1][0]
    assert isinstance(new, nn.GroupNorm)
    assert (new.num_groups, new.num_channels, new.eps) == (24, 48, 1e-3)
    assert torch.equal(new.weight, weight)
    assert new.weight.requires_grad
    assert not new.bias.requires_grad
    check_layers(model)
    probe(model, torch.rand(3, 3, 8, 8, dtype=torch.float64))
    assert isinstance(fix(nn.BatchNorm2d(4, affine=False)), nn.GroupNorm)


def test_fix_keeps_a_shared_layer_shared() -> None:
    """A layer under two names becomes one new layer under both."""
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared), shared)
    fix(model)
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0] is model[1][0] is model[2]


def test_fix_leaves_rows_their_values() -> None:
    """On rows one group a channel would normalise single values to zero."""
    model = fix(nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32)))
    assert model[1].num_groups == 1
    assert model(torch.rand(4, 3)).std() > 0.5


class CentredByBatch(nn.Module):
    """A custom layer that takes the mean over examples away."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - inputs.mean(0, keepdim=True)


class Counting(nn.Module):
    """Keeps a statistic of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(inputs.detach().mean(0), 0.1)
        return inputs - self.mean.clone()


def test_the_probe_finds_a_custom_mixing_layer() -> None:
    """No type tells; changing one example does."""
    with pytest.raises(UnsupportedLayer, match="changing one example moved the output of"):
        probe(nn.Sequential(nn.Linear(4, 4), CentredByBatch()), torch.rand(3, 4))


class Refers(nn.Module):
    """Looks at a certain row, or at the largest value of all, without a gradient."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = inputs.detach()
        seen = {
            "first": lambda: inputs - values[:1],
            "middle": lambda: inputs - values[1:2],
            "last": lambda: inputs - values[-1:],
            "before": lambda: inputs - values.cumsum(0),
            "largest": lambda: inputs / values.abs().amax(),
        }
        return seen[self.what]()


@pytest.mark.parametrize("what", ["first", "middle", "last", "before", "largest"])
def test_the_probe_finds_what_refers_to_a_certain_row(what: str) -> None:
    """Every image's largest value is one, as it is where it is white somewhere."""
    images = torch.rand(3, 4)
    images[:, 0] = 1.0
    with pytest.raises(UnsupportedLayer, match="changing one example moved the output of"):
        probe(nn.Sequential(Refers(what), nn.Linear(4, 2)), images)


def test_the_probe_asks_with_values_that_a_model_may_not_take() -> None:
    """Control: a row that is not finite then says nothing of the others."""
    probe(nn.Sequential(nn.Threshold(0.0, 0.0), Root(), nn.Linear(4, 2)), torch.rand(3, 4))


class Root(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (1 - inputs).sqrt()


def test_the_probe_finds_what_keeps_statistics() -> None:
    """It names the buffer, and puts it back; in eval mode there is nothing to find."""
    model = nn.Sequential(nn.Linear(4, 4), Counting())
    with pytest.raises(UnsupportedLayer, match=r"writes to 1\.mean: statistics of the examples"):
        probe(model, torch.rand(3, 4))
    assert not model[1].mean.any()
    probe(model.eval(), torch.rand(3, 4))


def test_the_probe_finds_what_writes_to_weights() -> None:
    """An embedding with max_norm rescales the rows it looks up, without noise."""
    model = nn.Embedding(5, 3, max_norm=0.1)
    before = model.weight.detach().clone()
    with pytest.raises(UnsupportedLayer, match="writes to weight"):
        probe(model, torch.tensor([[0, 1], [2, 3]]))
    assert torch.equal(model.weight, before)


def test_the_probe_says_what_to_do_about_spectral_norm() -> None:
    """Its vectors are no statistics of the examples, and eval mode alone does not train it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(40, 40)))
    with pytest.raises(UnsupportedLayer, match=r"_u.*take it off before attach"):
        probe(model, torch.rand(3, 40))


def test_the_probe_leaves_model_and_random_state() -> None:
    """Dropout's coins are the same in both passes, and torch's generator is where it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    probe(model, torch.rand(3, 4))
    torch.set_rng_state(state)
    expected = torch.get_rng_state()
    probe(model, torch.ones(3, 4))
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_probe_takes_indices_and_single_examples() -> None:
    """Whole numbers stay in range; one example has no others."""
    probe(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), torch.tensor([[4, 4], [4, 0]]))
    probe(nn.Linear(4, 2), torch.rand(1, 4))


def test_the_probe_stands_a_broken_image() -> None:
    """A NaN in the data is not a mixing layer."""
    images = torch.rand(3, 4)
    images[1, 2] = torch.nan
    probe(nn.Linear(4, 2), images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(5, 2),
            r"cannot run on the data set's examples, \[3, 4\] torch.float32: Ru",
        ),
        (nn.Flatten(0), r"Flatten: expected outputs with 3 rows.* shape \[12\]"),
        (nn.Threshold(2.0, float("inf")), "Threshold: its output is not finite"),
    ],
    ids=["wrong size", "no rows", "not finite"],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model: nn.Module, message: str) -> None:
    """Never a traceback from inside torch."""
    with pytest.raises(UnsupportedLayer, match=message):
        probe(model, torch.rand(3, 4))


def recorded(model: nn.Module) -> tuple[nn.Module, Tape, dict[str, nn.Parameter]]:
    """The model with its layers writing on a tape."""
    tape = Tape()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    install(model, tape, rule_of)
    return model, tape, named


class Unused(nn.Module):
    """Has a head that its forward forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)


class Borrowing(nn.Module):
    """Uses a layer's weight, and does not call the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(self.second(inputs), self.first.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unused(), r"^head\.weight, head\.bias: trainable, but not used"),
        (Borrowing(), r"^first\.weight: the gradient did not come through the forward of the lay"),
    ],
    ids=["unused", "borrowed"],
)
def test_the_rehearsal_finds_what_would_not_be_trained(model: nn.Module, message: str) -> None:
    """Before any work is done, by dotted name."""
    model, tape, named = recorded(model)
    with pytest.raises(UnsupportedLayer, match=message):
        rehearse(model, torch.rand(3, 4), named, tape)


def test_the_rehearsal_leaves_nothing() -> None:
    """No gradient, no entry on the tape, no random number used up."""
    model, tape, named = recorded(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)))
    images, state = torch.rand(3, 4), torch.get_rng_state()
    rehearse(model, images, named, tape)
    assert torch.equal(torch.get_rng_state(), state)
    assert tape.take() == {}
    assert all(p.grad is None for p in model.parameters())


def test_the_optimizer_must_hold_exactly_the_trainable_parameters() -> None:
    """Too few, too many, none: each by name or number."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(StepError, match=r"it lacks 1\.weight, 1\.bias and holds 0"):
        trainable_parameters(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    both = [*model.parameters(), *nn.Linear(2, 2).parameters()]
    with pytest.raises(StepError, match="lacks none and holds 2 that are not the model's"):
        trainable_parameters(model, torch.optim.SGD(both, lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    assert sorted(trainable_parameters(model, optimizer)) == ["1.bias", "1.weight"]
    with pytest.raises(StepError, match="no trainable parameter"):
        trainable_parameters(model.requires_grad_(False), optimizer)


def test_a_model_on_two_devices_is_refused() -> None:
    """Both are named."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(StepError, match="expected one device, got cpu, meta"):
        trainable_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_what_is_trainable_may_not_change() -> None:
    """Frozen, unfrozen, replaced and added parameters are named."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trainable(model, named)
    model[0].weight.requires_grad_(True)
    model[1] = nn.Linear(3, 2)
    model.append(nn.Linear(2, 2, bias=False))
    with pytest.raises(StepError, match=r"^0\.weight, 1\.bias, 1\.weight, 2\.weight: trainable"):
        check_trainable(model, named)


class MixStyle(nn.Module):
    """Gives examples the statistics of others, in some passes (Zhou et al. 2021)."""

    def __init__(self, p: float, coin: Callable[[], float]) -> None:
        super().__init__()
        self.p, self.coin = p, coin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.coin() >= self.p:
            return x
        mean, spread = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1e-6
        other = torch.randperm(len(x))
        return ((x - mean) / spread * spread[other] + mean[other]).detach()


def of_torch() -> float:
    return float(torch.rand(()))


def of_numpy() -> float:
    return float(np.random.mtrand.random_sample())


@pytest.mark.parametrize("coin", [of_torch, of_numpy, random.random])
@pytest.mark.parametrize("p", [0.5, 0.2, 0.1])
def test_layers_that_mix_in_some_passes_are_refused(p: float, coin: Callable[[], float]) -> None:
    """Whatever the state of the generators; at one pass in ten it fails to with 1 of 10000."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), MixStyle(p, coin), nn.Flatten(), nn.Linear(64, 2))
    for _ in range(3):
        images = torch.rand(3, 1, 6, 6)
        before = torch.get_rng_state(), random.getstate()
        with pytest.raises(UnsupportedLayer, match=r"moved the output of the others"):
            probe(model, images)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        torch.rand(3)
    probe(model.eval(), torch.rand(3, 1, 6, 6))


class SkipsAtRandom(nn.Module):
    """Stochastic depth by a coin of the batch, and dropout by function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, 0.3, self.training)
        return x if random.random() < 0.5 else x.tanh()


def test_layers_that_draw_and_do_not_mix_pass() -> None:
    """Control; torch's own dropout costs no passes more."""
    model = nn.Sequential(nn.Flatten(), SkipsAtRandom(), nn.Linear(4, 3))
    probe(model, torch.rand(3, 1, 2, 2))
    passes = []
    dropped = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, 3))
    dropped[2].register_forward_hook(lambda *_: passes.append(1))
    probe(dropped, torch.rand(3, 1, 2, 2))
    assert len(passes) < 20
    assert dropped[1].training


def test_whole_numbers_for_a_model_of_real_ones_come_with_a_cure() -> None:
    """The loop scales them, and attach sees the data set alone."""
    images = torch.zeros(3, 1, 6, 6, dtype=torch.uint8)
    with pytest.raises(UnsupportedLayer, match=r"image\.float\(\) / 255"):
        probe(nn.Conv2d(1, 4, 3), images)
