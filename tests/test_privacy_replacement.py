"""`privacy.fix` replaces the normalisation and nothing else, whatever the network."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from privacy import StepError, UnsupportedLayer, check_layers, fix, mixing_layers
from privacy.opacus import PrivacyEngine

CHANNELS = 4
KEPT_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)


class NormAct(nn.BatchNorm2d):
    """As in a widely used model library: a BatchNorm that also holds its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(images))


class Silent(nn.BatchNorm2d):
    """A subclass that looks as if it added nothing."""


class Tracking(nn.InstanceNorm2d):
    """The same of the other kind."""


class Residual(nn.Module):
    """A block with a branch, a norm of its own and an attribute."""

    def __init__(self, body: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.body, self.norm, self.scale = body, norm, 0.5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.scale * self.norm(self.body(images))


def norm(draw) -> nn.Module:
    """One of the layers that are replaced, in any of its settings."""
    kind = draw(st.sampled_from(KEPT_NORMS))
    layer = kind(
        CHANNELS,
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        affine=draw(st.booleans()),
        track_running_stats=kind is nn.InstanceNorm2d or draw(st.booleans()),
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(CHANNELS) + 0.5)
            parameter.requires_grad_(draw(st.booleans()))
    if draw(st.booleans()):
        layer.note = "the user's"
    return layer.train(draw(st.booleans()))


@st.composite
def networks(draw) -> nn.Module:
    """Nested blocks with shared layers, hooks, frozen parameters and mixed modes."""
    shared = [norm(draw), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]

    def layer(depth: int) -> nn.Module:
        kind = draw(st.integers(0, 7 if depth else 5))
        if kind == 0:
            return norm(draw)
        if kind == 1:
            return draw(st.sampled_from(shared))
        if kind == 2:
            return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=draw(st.booleans()))
        if kind == 3:
            return nn.InstanceNorm2d(CHANNELS, affine=draw(st.booleans()))
        if kind in (4, 5):
            other = [nn.ReLU(), nn.Hardtanh(-2, 2), nn.GroupNorm(2, CHANNELS), nn.Identity()]
            return draw(st.sampled_from(other))
        if kind == 6:
            return Residual(layer(depth - 1), layer(depth - 1))
        return nn.Sequential(*(layer(depth - 1) for _ in range(draw(st.integers(1, 3)))))

    model = nn.Sequential(*(layer(2) for _ in range(draw(st.integers(1, 4)))))
    return model.to(draw(st.sampled_from([torch.float32, torch.float64])))


def replaced(layer: nn.Module) -> bool:
    """Whether `fix` has something to do with it."""
    return isinstance(layer, _NormBase) and not (
        isinstance(layer, nn.InstanceNorm2d) and not layer.track_running_stats
    )


def without(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy with nothing where these layers stand."""
    copied = copy.deepcopy(model)
    for name in names:
        copied.set_submodule(name, nn.Identity())
    return copied


@settings(max_examples=60, deadline=None)
@given(networks(), st.data())
def test_fix_keeps_everything_but_the_normalisation(model: nn.Module, data) -> None:
    """Objects, parameters, sharing, names, modes, hooks, notes, and the function of the rest."""
    before = dict(model.named_modules(remove_duplicate=False))
    norms = [name for name, layer in before.items() if replaced(layer)]
    hooked = data.draw(st.sampled_from([layer for layer in before.values() if not replaced(layer)]))
    calls = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name: p.requires_grad for name, p in parameters.items()}
    state = [key for key in model.state_dict() if key.rpartition(".")[2] in ("weight", "bias")]
    modes = {name: layer.training for name, layer in before.items()}
    rest, dtype = without(model, norms), next(model.parameters(), torch.zeros(1)).dtype
    images = torch.rand(3, CHANNELS, 6, 6, dtype=dtype)

    assert fix(model) is model

    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(before)
    for name, layer in before.items():
        assert (after[name] is layer) == (name not in norms)
        assert after[name].training == modes[name]
        for other in before:
            assert (before[other] is layer) == (after[other] is after[name])
        if name in norms:
            assert type(after[name]) is (
                nn.InstanceNorm2d if isinstance(layer, nn.InstanceNorm2d) else nn.GroupNorm
            )
            assert (after[name].eps, after[name].affine) == (layer.eps, layer.affine)
            assert getattr(after[name], "note", None) == getattr(layer, "note", None)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {n: id(p) for n, p in now.items()} == {n: id(p) for n, p in parameters.items()}
    assert {name: p.requires_grad for name, p in now.items()} == frozen
    assert list(model.state_dict()) == state
    assert torch.equal(without(model, norms)(images), rest(images))
    calls.clear()
    model(images)
    assert calls
    check_layers(model)
    again = dict(fix(model).named_modules(remove_duplicate=False))
    assert all(again[name] is layer for name, layer in after.items())


@settings(max_examples=20, deadline=None)
@given(networks())
def test_a_tracking_instance_norm_becomes_one_that_computes_the_same(model: nn.Module) -> None:
    """In training mode, where it normalised by the example's own statistics already."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            model.set_submodule(name, nn.Identity())
    images = torch.rand(2, CHANNELS, 5, 5, dtype=next(model.parameters(), torch.zeros(1)).dtype)
    expected = copy.deepcopy(model).train()(images)
    torch.testing.assert_close(fix(model).train()(images), expected)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output.relu())
    return layer


def holding(layer: nn.Module) -> nn.Module:
    layer.act = nn.ReLU()
    return layer


def buffered(layer: nn.Module) -> nn.Module:
    layer.register_buffer("mask", torch.ones(4))
    return layer


def rebound(layer: nn.Module) -> nn.Module:
    layer.forward = lambda images: images.relu()
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (NormAct(4), "NormAct is more than.*GroupNorm"),
        (Silent(4), "Silent is more than"),
        (Tracking(4, track_running_stats=True), "Tracking is more than"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d has no channels yet"),
        (nn.LazyInstanceNorm2d(track_running_stats=True), "LazyInstanceNorm2d has no channels yet"),
        (hooked(nn.BatchNorm2d(4)), "holds _forward_hooks"),
        (holding(nn.BatchNorm2d(4)), "holds act"),
        (buffered(nn.BatchNorm2d(4)), "holds mask"),
        (rebound(nn.BatchNorm2d(4)), "holds forward"),
        (torch.nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4)), "is more than"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_would_lose_more_than_its_statistics_is_refused(layer, message, alone) -> None:
    """By name, with the cure, before anything was replaced."""
    model = layer if alone else nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer))
    with pytest.raises(UnsupportedLayer, match=message) as refused:
        fix(model)
    if not alone:
        assert str(refused.value).startswith("1.0: ")
        assert type(model[0]) is nn.BatchNorm2d
        assert model[1][0] is layer


def test_a_lazy_layer_is_replaced_once_it_knows_its_channels() -> None:
    """Control: what the refusal proposes works."""
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.rand(2, 6, 4, 4))
    assert fix(model)[0].num_channels == 6


def test_an_optimizer_built_before_still_trains_the_new_layer() -> None:
    """The parameters are the old ones, not copies."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fix(model)
    model(torch.rand(2, 4, 3, 3)).square().sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_bias_or_none_is_kept_as_it_is() -> None:
    """A BatchNorm without bias gets no bias."""
    layer = nn.BatchNorm2d(4, bias=False)
    assert fix(nn.Sequential(layer))[0].bias is None


def test_the_drop_in_keeps_weights_and_refuses_what_it_cannot_keep() -> None:
    """`get_compatible_module` copies, and loses neither weights nor an activation."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.Flatten())
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(4))
    fixed = PrivacyEngine.get_compatible_module(model)
    assert torch.equal(fixed[1].weight, model[1].weight)
    assert fixed[1].eps == 1e-2
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(UnsupportedLayer, match="1: NormAct"):
        PrivacyEngine.get_compatible_module(nn.Sequential(nn.Conv2d(1, 4, 3), NormAct(4)))


@pytest.mark.parametrize("act", [fix, check_layers, mixing_layers])
@pytest.mark.parametrize("wrong", [None, "model", nn.Linear])
def test_what_is_no_module_is_refused(act: object, wrong: object) -> None:
    with pytest.raises(StepError, match=r"^model: expected a torch\.nn\.Module, got "):
        act(wrong)  # type: ignore[operator]
