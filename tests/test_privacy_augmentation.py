"""Augmented copies of an example are averaged inside of it, before anything is clipped."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from privacy import (
    AutomaticClipping,
    DPPlan,
    PerLayerClipping,
    SecureGenerator,
    StepError,
    Tuner,
    UnsupportedLayer,
    attach,
    epsilon_of,
)
from privacy.clipping import GhostNorm, rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.differentiation import differentiate
from privacy.sampling import sample_indices
from privacy.update import ClippedSum

properties = settings(deadline=None, derandomize=True, max_examples=25)
KEY = bytes(range(32))


class Twice(nn.Module):
    """A shared layer: one linear layer that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(inputs).tanh())


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution, a normalisation, linear layers with and without positions, a fallback."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.GroupNorm(1, 3),
        nn.PReLU(),
        nn.Linear(4, 2),
        nn.Flatten(),
        nn.Linear(24, 6),
        Twice(),
        nn.Linear(6, 2),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def images_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Drawn images of 6 by 6, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 1, 6, 6, generator=generator, dtype=torch.float64)


def losses_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A loss an image whose gradient grows with it."""
    return model(images).square().sum(1) * images.abs().amax((1, 2, 3))


def adjacent(model: nn.Module, copies: torch.Tensor) -> torch.Tensor:
    """Losses [n, K] of copies [n, K, ...]: one pass over rows that follow one another."""
    return losses_of(model, copies.flatten(0, 1)).view(copies.shape[:2])


def one_by_one(model: nn.Module, copies: torch.Tensor) -> torch.Tensor:
    """The same by K passes."""
    return torch.stack([losses_of(model, copies[:, k]) for k in range(copies.shape[1])], dim=1)


WAYS = {"adjacent rows": adjacent, "K passes": one_by_one}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def tracked(bound: float, **changed: Any) -> tuple[nn.Module, ClippedSum]:
    """An installed network and its clipped sum."""
    model, tape = network(), Tape()
    install(model, tape, rule_of)
    return model, ClippedSum(dict(model.named_parameters()), tape, max_grad_norm=bound, **changed)


def flat(clipped: ClippedSum) -> torch.Tensor:
    """The sum as one vector."""
    return torch.cat([total.flatten() for total in clipped.sums])


def sum_of(copies: torch.Tensor, bound: float, way: Any = adjacent, **changed: Any) -> torch.Tensor:
    """What examples with their copies add."""
    model, clipped = tracked(bound, **changed)
    if len(copies):
        clipped.add(way(model, copies), torch.ones(len(copies), dtype=torch.bool))
    return flat(clipped)


def gradient_of(copies: torch.Tensor) -> torch.Tensor:
    """The definition, for one example: the gradient of the mean over its copies."""
    model = network()
    loss = losses_of(model, copies).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def clipped_to(gradient: torch.Tensor, bound: float) -> torch.Tensor:
    """Flat clipping of one gradient."""
    return gradient * min(1.0, bound / float(gradient.norm()))


def averaged_then_clipped(copies: torch.Tensor, bound: float) -> torch.Tensor:
    """The oracle: one example after the other, float64."""
    return torch.stack([clipped_to(gradient_of(example), bound) for example in copies]).sum(0)


def clipped_then_averaged(copies: torch.Tensor, bound: float) -> torch.Tensor:
    """What it must not be."""
    every = [[clipped_to(gradient_of(copy.unsqueeze(0)), bound) for copy in e] for e in copies]
    return torch.stack([torch.stack(example).mean(0) for example in every]).sum(0)


@each_way
@pytest.mark.parametrize("copies", [1, 2, 3, 4])
@pytest.mark.parametrize("bound", [1e-2, 0.5, 1e6])
def test_copies_are_averaged_and_then_clipped(way: Any, copies: int, bound: float) -> None:
    """Against the oracle, where all, some and none of the examples are clipped."""
    images = images_of(4, copies) * torch.linspace(0.2, 3, 4, dtype=torch.float64).view(
        4, 1, 1, 1, 1
    )
    expected = averaged_then_clipped(images, bound)
    # Norms are rounded up by 1e-5.
    allowed = 4 * 1.1e-5 * bound if bound < 1e6 else 1e-9 * float(expected.norm())
    assert float((sum_of(images, bound, way) - expected).norm()) <= allowed


def test_clipping_before_averaging_is_something_else() -> None:
    """Control: the oracle tells the two orders apart by far more than it allows."""
    images, bound = images_of(4, 3) * torch.tensor([0.3, 1.0, 3.0]).view(1, 3, 1, 1, 1), 0.1
    wrong = clipped_then_averaged(images, bound)
    assert float((averaged_then_clipped(images, bound) - wrong).norm()) > 0.1 * bound
    assert float((sum_of(images, bound) - wrong).norm()) > 0.1 * bound


@pytest.mark.parametrize(
    "kernel",
    [
        *("columns", "rows", "grouped"),
        *("columns, then native", "gram, then native"),
    ],
)
def test_every_kernel_takes_copies(kernel: str) -> None:
    """Whether it keeps gradients or only norms of rows."""
    model, tape = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)).double(), Tape()
    tuner = Tuner(fixed={"0": kernel})
    install(model, tape, lambda layer, name: rule_of(layer, name, tuner))
    copies = images_of(3, 4)
    losses = model(copies.flatten(0, 1)).square().sum((1, 2, 3)).view(3, 4)
    parts = differentiate(losses, dict(model.named_parameters()), tape, examples=3)
    plain = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)).double()
    plain.load_state_dict(model.state_dict())
    for example, images in enumerate(copies):
        loss = plain(images).square().sum((1, 2, 3)).mean()
        for (name, _), expected in zip(
            plain.named_parameters(),
            torch.autograd.grad(loss, list(plain.parameters())),
            strict=True,
        ):
            part = parts[model.get_parameter(name)]
            one = part.select(torch.tensor([example]))
            torch.testing.assert_close(one.instantiate()[0], expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.weighted_sum(torch.ones(1).double()), expected)
            norm = part.squared_norms()[example].sqrt()
            torch.testing.assert_close(norm, expected.norm(), rtol=1e-9, atol=1e-12)
    ghost = isinstance(parts[model.get_parameter("0.weight")], GhostNorm)
    assert ghost == kernel.endswith("native")


@each_way
@properties
@given(
    exponents=st.lists(st.floats(-30, 50), min_size=1, max_size=3),
    copies=st.integers(1, 3),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_an_example_moves_the_sum_by_at_most_the_norm_with_all_its_copies(
    way: Any, exponents: list[float], copies: int, bound: float, seed: int
) -> None:
    """Its copies do not count one by one."""
    scales = torch.tensor([10.0**e for e in exponents], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    images = images_of(len(exponents), copies, seed=seed) * scales
    moved = sum_of(images, bound, way) - sum_of(images[:-1], bound, way)
    assert float(moved.norm()) <= bound * (1 + 1e-12 * len(exponents))


def test_copies_that_count_one_by_one_would_move_it_further() -> None:
    """Control: losses of copies given as examples break the bound."""
    images = images_of(1, 3) * 100
    model, clipped = tracked(0.05)
    clipped.add(losses_of(model, images.flatten(0, 1)), torch.ones(3, dtype=torch.bool))
    assert float(flat(clipped).norm()) > 2 * 0.05


@each_way
def test_copies_that_are_alike_change_nothing(way: Any) -> None:
    """The mean of one and the same is it."""
    images = images_of(4, 1)
    torch.testing.assert_close(
        sum_of(images.expand(-1, 3, -1, -1, -1), 0.05, way), sum_of(images, 0.05)
    )


@each_way
def test_one_broken_copy_breaks_its_example_alone(way: Any) -> None:
    """It counts once, and zero is contributed."""
    images = images_of(4, 3)
    spoiled = images.clone()
    spoiled[1, 2, 0, 3, 3] = torch.nan
    model, clipped = tracked(0.05)
    assert clipped.add(way(model, spoiled), torch.ones(4, dtype=torch.bool)) == 1
    torch.testing.assert_close(flat(clipped), sum_of(images[[0, 2, 3]], 0.05))


@each_way
def test_masked_rows_contribute_nothing_with_their_copies(way: Any) -> None:
    """The mask is of examples."""
    images = images_of(4, 3)
    model, clipped = tracked(0.05)
    clipped.add(way(model, images), torch.tensor([True, True, False, False]))
    torch.testing.assert_close(flat(clipped), sum_of(images[:2], 0.05))


@pytest.mark.parametrize("clipping", [AutomaticClipping(), PerLayerClipping()])
def test_other_ways_of_clipping_take_the_mean_too(clipping: Any) -> None:
    """The mean is made before any of them; it is the same by both ways."""
    images = images_of(4, 3)
    by_rows = sum_of(images, 0.05, adjacent, clipping=clipping)
    torch.testing.assert_close(by_rows, sum_of(images, 0.05, one_by_one, clipping=clipping))
    assert float((by_rows - sum_of(images, 0.05)).norm()) > 1e-3


@pytest.mark.parametrize("shape", [(4, 0), (4, 3, 1), (3, 4), (12,), ()])
def test_losses_of_no_such_shape_are_refused(shape: tuple[int, ...]) -> None:
    """None, too many dimensions, examples in dimension 1, all in one row."""
    _, clipped = tracked(0.05)
    losses = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with pytest.raises(StepError, match=r"shape \[4\], got .*with K copies of each.*\[4, K\]"):
        clipped.add(losses, torch.ones(4, dtype=torch.bool))


def test_rows_that_are_neither_examples_nor_copies_are_refused() -> None:
    """A layer that saw six rows for four examples with three copies."""
    model, clipped = tracked(0.05)
    losses = losses_of(model, images_of(6)).repeat(2).view(4, 3)
    with pytest.raises(UnsupportedLayer, match="expected 4 rows, one an example"):
        clipped.add(losses, torch.ones(4, dtype=torch.bool))


def test_a_step_with_copies_is_that_of_the_definition() -> None:
    """Through attach, with the same sample and the same noise; nothing more is spent."""
    data = [(image, i % 2) for i, image in enumerate(images_of(12))]
    plan = DPPlan(samples=12, batch_size=6, epochs=1, noise_multiplier=1.0, max_grad_norm=0.1)
    model = network()
    private = attach(plan, model, torch.optim.SGD(model.parameters(), lr=1.0), data)
    private._generator, twin = SecureGenerator(KEY), SecureGenerator(KEY)
    images, labels = next(private.batches)
    shifts = torch.linspace(-1, 1, 3, dtype=torch.float64).view(1, 3, 1, 1, 1)
    copies = images.unsqueeze(1) + shifts
    each = labels.repeat_interleave(3)
    logits = private.model(copies.flatten(0, 1))
    losses = F.cross_entropy(logits, each, reduction="none")
    assert private.step(losses.view(-1, 3))
    reference = network()
    parameters = list(reference.parameters())
    before = torch.cat([p.detach().flatten() for p in parameters])
    total = torch.zeros_like(before)
    for i in sample_indices(twin, samples=12, sampling_rate=0.5).tolist():
        outputs = reference(data[i][0] + shifts[0])
        loss = F.cross_entropy(outputs, torch.full((3,), data[i][1]))
        gradients = torch.autograd.grad(loss, parameters)
        total += clipped_to(torch.cat([g.flatten() for g in gradients]), plan.max_grad_norm)
    expected = before - (total + plan.max_grad_norm * twin.normal(len(before))) / 6
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-4)
    assert private.spent(1e-2) == epsilon_of([plan.event(1)], 1e-2)
