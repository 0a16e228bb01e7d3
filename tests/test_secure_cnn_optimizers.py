"""Muon: torch's own optimizers as oracles, filters that keep their length, states that go on."""

import copy

import pytest
import torch
from torch import nn

from secure_cnn.errors import RunError
from secure_cnn.optimizers import Muon, orthogonalized


def network(seed=0):
    """Two convolutions, of which the second has filters over channels, a norm and a head."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    )
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def steps(model, optimizer, count, seed=1):
    """So many steps on random images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        images = torch.rand(5, 1, 8, 8, generator=generator)
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0, 1]))
        torch.autograd.backward(loss)
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (5, 5)])
def test_a_step_is_that_of_torchs_muon_on_a_matrix(shape):
    """Its own is computed in bfloat16, of which three digits are right."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(*shape, generator=generator)
    theirs = nn.Parameter(torch.zeros(*shape))
    theirs.grad = gradient.clone()
    # 0.2 * sqrt(larger side) is how it makes steps as long as AdamW's.
    rate = 1 / (0.2 * max(shape) ** 0.5)
    torch.optim.Muon(
        [theirs], lr=rate, momentum=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    ).step()
    assert torch.allclose(orthogonalized(gradient, iterations=5), -theirs.detach(), atol=0.05)


def test_singular_values_end_near_one_and_vectors_stay():
    """Against the singular value decomposition in float64."""
    matrix = torch.randn(8, 30, generator=torch.Generator().manual_seed(4)).double()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(matrix, iterations=5)
    middle = left.T @ found @ right.T
    assert torch.allclose(middle, torch.diag(middle.diag()), atol=1e-9)
    assert 0.5 < middle.diag().min() <= middle.diag().max() < 1.3


def test_all_but_filters_take_the_steps_of_nesterovs_sgd():
    """Bit for bit but for rounding; the filters are held where they are in both."""
    ours, theirs = network(), network()
    for model in (ours, theirs):
        model[2].weight.requires_grad_(False)
    rest = [weight for weight in theirs.parameters() if weight.requires_grad]
    sgd = torch.optim.SGD(rest, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True)
    steps(ours, Muon(ours, lr=0.1, momentum=0.8, weight_decay=0.01), 4)
    steps(theirs, sgd, 4)
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, their, atol=1e-6)


def test_filters_keep_their_length_and_turn_by_the_rate():
    """One step turns a filter by about rate * filter_rate of its length; others are longer."""
    model = network()
    before = model[2].weight.detach().clone()
    steps(model, Muon(model, lr=0.01, filter_rate=2.0), 1)
    after = model[2].weight.detach()
    assert torch.isclose(after.norm(), before.norm(), rtol=1e-5)
    turned = float((after - before).norm() / before.norm())
    assert 0.01 < turned < 0.03
    twice = network()
    steps(twice, Muon(twice, lr=0.01, filter_rate=4.0), 1)
    again = float((twice[2].weight.detach() - before).norm() / before.norm())
    assert again == pytest.approx(2 * turned, rel=0.05)


def test_what_is_frozen_stays_and_what_has_no_gradient_too():
    """Bit for bit."""
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    steps(model, optimizer, 1)
    moved = {n for n, now in model.state_dict().items() if not torch.equal(before[n], now)}
    assert moved == set(before) - {"0.weight", "0.bias"}


def test_its_state_goes_on_where_it_was():
    """Three steps are two, a state dict in between, and one."""
    whole, parts = network(), network()
    steps(whole, Muon(whole, lr=0.05), 2)
    optimizer = Muon(parts, lr=0.05)
    steps(parts, optimizer, 2)
    other = Muon(parts, lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = Muon(whole, lr=0.05)  # control: one without the state goes elsewhere
    steps(parts, other, 1, seed=2)
    steps(whole, again, 1, seed=2)
    third = network()
    straight = Muon(third, lr=0.05)
    steps(third, straight, 2)
    steps(third, straight, 1, seed=2)
    assert all(map(torch.equal, third.state_dict().values(), parts.state_dict().values()))
    assert not torch.equal(whole[2].weight, parts[2].weight)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0.0}, "lr: expected a finite number > 0, got 0.0"),
        ({"lr": 0.1, "filter_rate": float("nan")}, "filter_rate: expected a finite number > 0"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(values, said):
    """With what was expected."""
    with pytest.raises(RunError, match=said):
        Muon(network(), **values)


def test_nothing_to_train_and_closures_are_refused():
    """Rather than an optimizer of nothing, and a loss that nobody computes."""
    with pytest.raises(RunError, match="parameters to train"):
        Muon(network().requires_grad_(False), lr=0.1)
    with pytest.raises(RunError, match="closure"):
        Muon(network(), lr=0.1).step(lambda: 0.0)


def test_a_filter_that_is_zero_at_first_is_trained():
    """It has no length to keep, and takes the steps of all that are no filters."""
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    optimizer = Muon(layer, lr=0.1)
    layer(torch.rand(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert bool(layer.weight.detach().any())
