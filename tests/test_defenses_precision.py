"""Attacks with convolutions in bfloat16: what is rounded, and that nothing else is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.objectives import PerExample, batch, seen_images
from support.searched import LINF, digits
from torch import nn

from defenses import (
    AdversarialTraining,
    AttackError,
    Mart,
    adversarial_objective,
    check_per_example,
)
from defenses.training.objective import convolutions_in


def convolution(images, kernels, dtype):
    """Its result and both gradients of the sum of its squares, in a dtype."""
    images, kernels = (each.to(dtype).requires_grad_() for each in (images, kernels))
    result = F.conv2d(images, kernels, padding=1)
    return result, *torch.autograd.grad(result.square().sum(), (images, kernels))


def test_convolutions_are_rounded_and_their_results_are_float32():
    """What goes in and what comes out has eight bits, forth and back; sums are not cut short."""
    images, kernels = torch.rand(2, 16, 9, 9), torch.randn(8, 16, 3, 3)
    exact = convolution(images.bfloat16(), kernels.bfloat16(), torch.float64)
    with convolutions_in("bfloat16"):
        rounded = convolution(images, kernels, torch.float32)
    for ours, true in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours.bfloat16().float())
        assert (ours - true).abs().max() < 2**-7 * true.abs().max()
    full = convolution(images, kernels, torch.float32)[0]
    assert not torch.equal(rounded[0], full)
    assert torch.equal(convolution(images, kernels, torch.float32)[0], full)


def test_whatever_is_no_convolution_of_float32_is_left_alone():
    """Other dtypes, dense layers, and everything at `float32`."""
    images, kernels = torch.rand(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    wide = F.conv2d(images.double(), kernels.double())
    full, dense = F.conv2d(images, weight=kernels), F.linear(images, torch.ones(1, 5))
    with convolutions_in("bfloat16"):
        assert torch.equal(F.conv2d(images.double(), kernels.double()), wide)
        assert torch.equal(F.linear(images, torch.ones(1, 5)), dense)
        assert not torch.equal(F.conv2d(images, weight=kernels), full)
    with convolutions_in("float32"):
        assert torch.equal(F.conv2d(images, weight=kernels), full)


def attacked(objective, model, images, labels):
    """The adversarial images of a call, its losses, and the gradient of the first weights."""
    twin = copy.deepcopy(model)
    seen = seen_images(twin)
    losses = objective(twin, images, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), next(iter(twin.parameters())))
    return seen[-2] if isinstance(objective, Mart) else seen[-1], losses, gradient


@pytest.mark.parametrize("name", ["n-fgsm", "pgd", "mart"])
def test_only_the_attack_is_rounded(name):
    """The losses are those of the images that it found, at full precision, gradients too."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch(16)
    found = {}
    for precision in ("float32", "bfloat16"):
        objective = adversarial_objective(name, LINF, seed=3, precision=precision)
        adversarial, losses, gradient = attacked(objective, model, images, labels)
        assert LINF.contains(images, adversarial).all() or name == "n-fgsm"
        assert objective.settings["precision"] == precision
        found[precision] = adversarial
        if name in ("n-fgsm", "pgd"):
            expected = F.cross_entropy(model(adversarial), labels, reduction="none")
            torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
            (full,) = torch.autograd.grad(expected.sum(), next(iter(model.parameters())))
            torch.testing.assert_close(gradient, full)
    assert not torch.equal(found["float32"], found["bfloat16"])
    other = attacked(adversarial_objective(name, LINF, seed=4), model, images, labels)[0]
    full = found["float32"]
    near, far = ((full - each).abs().mean() for each in (found["bfloat16"], other))
    assert near < far / 2  # another random start is another attack


@pytest.mark.parametrize("steps", [1, 10])
def test_it_fools_as_many(steps):
    """A trained network, within two of sixty images; noise alone fools far fewer."""
    model, images, labels = digits()
    fooled = {}
    for precision in ("float32", "bfloat16"):
        found = {}
        hook = model.register_forward_pre_hook(lambda _, given, kept=found: kept.update(x=given[0]))
        AdversarialTraining(LINF, "pgd", steps=steps, precision=precision)(model, images, labels)
        hook.remove()
        fooled[precision] = int((model(found["x"]).argmax(1) != labels).sum())
    noise = (images + 0.1 * torch.randn_like(images).sign()).clamp(0, 1)
    assert abs(fooled["float32"] - fooled["bfloat16"]) <= 2
    assert fooled["bfloat16"] > int((model(noise).argmax(1) != labels).sum()) + 5


@pytest.mark.parametrize("make", [AdversarialTraining, Mart])
def test_each_loss_still_is_of_its_own_example(make):
    """As a private training asks."""
    images, labels = batch(8)
    check_per_example(make(LINF, precision="bfloat16"), PerExample(), images, labels)


def test_an_attack_that_fails_leaves_no_rounding_behind():
    """Neither after an exception nor after an interruption."""

    class Broken(nn.Module):
        def forward(self, images):
            raise KeyboardInterrupt

    images, labels = batch(2)
    kernels = torch.randn(4, 1, 3, 3)
    full = F.conv2d(images, kernels)
    with pytest.raises(KeyboardInterrupt):
        AdversarialTraining(LINF, precision="bfloat16")(Broken(), images, labels)
    assert torch.equal(F.conv2d(images, kernels), full)


def test_what_there_is_not_is_refused():
    """An unknown precision, and bfloat16 where it would be of training, or all there is."""
    for make in (AdversarialTraining, Mart):
        with pytest.raises(AttackError, match="expected float32 or bfloat16, got 'float16'"):
            make(LINF, precision="float16")
    for name in ("free", "trades"):
        with pytest.raises(AttackError, match=f"{name} takes float32 only"):
            adversarial_objective(name, LINF, precision="bfloat16")
