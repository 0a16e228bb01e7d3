"""The door: everything is put back, whatever happens inside."""

import gc
import random
import weakref

import pytest
import torch
from numpy.random import mtrand  # the global state is what is under test here
from support.networks import Net, Switched, assert_same, disturbed_net, snapshot
from torch import nn

from defenses import AttackError, attack_scope
from defenses.scope import check_logits


@pytest.fixture(autouse=True)
def default_dtype():
    """What a vandal without the scope would leave to other tests."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def vandalise(net):
    """What a careless attack does."""
    net.train()
    net(torch.rand(4, 1, 8, 8))  # moves the batch statistics
    net.norm.running_var = torch.ones(4)
    net.mean.add_(1)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    net.head.weight.requires_grad_(True)
    torch.manual_seed(0)
    mtrand.seed(0)
    random.seed(0)
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_everything_is_put_back(failure):
    """After vandalism, an exception and a Ctrl-C alike."""
    net = disturbed_net()
    mtrand.normal()  # leaves a cached second draw in numpy's state
    before = snapshot(net)

    def inside():
        with attack_scope(net):
            vandalise(net)
            if failure is not None:
                raise failure

    if failure is None:
        inside()
    else:
        with pytest.raises(failure):
            inside()
    assert_same(before, snapshot(net))


def test_the_vandal_is_noticed_without_the_scope():
    """A control: the comparison above can fail."""
    net = disturbed_net()
    before = snapshot(net)
    vandalise(net)
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(net))


def test_inside_nothing_of_the_model_is_in_reach():
    """Evaluation mode everywhere, no trainable parameter, no gradient to add to."""
    net = disturbed_net()
    with attack_scope(net):
        assert not any(module.training for module in net.modules())
        assert not any(each.requires_grad for each in net.parameters())
        assert all(each.grad is None for each in net.parameters())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_of_the_images_work_where_the_caller_disabled_them(context):
    """Evaluation code runs under no_grad; an attack inside still needs gradients."""
    net = disturbed_net()
    with context():
        images = torch.rand(2, 1, 8, 8)
        with attack_scope(net):
            images = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(images).sum(), images)
        assert not torch.is_grad_enabled()
    assert gradient.abs().sum() > 0


def test_a_pending_backward_survives_a_scope():
    """A graph built before the attack gives the gradients it would have given."""
    torch.manual_seed(1)
    net = Net().train()
    images = torch.rand(4, 1, 8, 8)
    torch.manual_seed(2)
    expected = torch.autograd.grad(net(images).square().sum(), list(net.parameters()))
    torch.manual_seed(2)
    loss = net(images).square().sum()
    with attack_scope(net):
        net(images)
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def draws():
    """One number from each global generator."""
    return torch.rand(()).item(), mtrand.rand(), random.random()


def test_a_seed_repeats_the_randomness_and_none_does_not():
    """The three generators follow the seed; without one each scope differs."""
    net = Net()
    with attack_scope(net, seed=5) as used:
        first = draws()
    with attack_scope(net, seed=5):
        second = draws()
    with attack_scope(net) as fresh:
        third = draws()
    with attack_scope(net, seed=fresh):
        assert third == draws()
    assert used == 5
    assert first == second
    assert not set(first) & set(third)


def test_scopes_nest():
    """An inner scope gives the outer one its state back, and the outer one the caller's."""
    net = disturbed_net()
    before = snapshot(net)
    with attack_scope(net, seed=1):
        inner = snapshot(net)
        with attack_scope(net, seed=2):
            vandalise(net)
        assert_same(inner, snapshot(net))
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("enabled", [True, False])
def test_hooks_go_off_and_return_to_what_they_were(enabled):
    """Also on a part of the model, and without switching on what was off."""
    part = Switched(enabled=enabled)
    with attack_scope(nn.Sequential(nn.Identity(), part)):
        assert not part.hooks_enabled
    assert part.hooks_enabled is enabled


def test_a_recorder_of_trainable_parameters_sees_nothing():
    """A layer that records weight gradients is never asked for one."""
    asked = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, weight):
            ctx.save_for_backward(images, weight)
            return images @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            images, weight = ctx.saved_tensors
            asked.append(ctx.needs_input_grad[1])
            return gradient @ weight, gradient.T @ images if ctx.needs_input_grad[1] else None

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2, 4))

        def forward(self, images):
            return Recorded.apply(images.flatten(1), self.weight)

    layer, images = Layer(), torch.rand(3, 1, 2, 2, requires_grad=True)
    with attack_scope(layer):
        torch.autograd.grad(layer(images).sum(), images)
    assert asked == [False]
    layer(images).sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "1"])
def test_a_bad_seed_is_refused_and_changes_nothing(seed):
    """The refusal comes before anything is borrowed."""
    net = disturbed_net()
    before = snapshot(net)
    with pytest.raises(AttackError, match="seed"), attack_scope(net, seed=seed):
        pass
    assert_same(before, snapshot(net))


def test_what_is_not_a_module_is_refused():
    """A function has no state to give back."""
    with pytest.raises(AttackError, match="Module"), attack_scope(lambda images: images):
        pass


def test_the_scope_keeps_no_reference_to_the_model():
    """A finished scope lets the model be collected."""
    net = Net()
    with attack_scope(net):
        net(torch.rand(1, 1, 8, 8))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda zeros: zeros.to("meta"),
        lambda zeros: torch.quantize_per_tensor(zeros, 0.1, 0, torch.quint8),
        torch.Tensor.to_sparse,
        lambda zeros: zeros.to(torch.complex64),
    ],
    ids=["meta", "quantized", "sparse", "complex"],
)
def test_logits_without_numbers_to_compare_are_refused(make):
    """By their kind, before torch is asked for a value that is not there."""
    logits = make(torch.zeros(2, 3))
    with pytest.raises(AttackError, match="model: expected dense floating-point logits, got"):
        check_logits(logits, count=2, largest_label=1, error=AttackError)
