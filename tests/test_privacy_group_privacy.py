"""The epsilon of a group: against another accountant, closed forms, and the lemma itself."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from opacus.accountants.analysis.rdp import compute_rdp
from scipy import optimize, stats
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from privacy import DPPlan, GaussianSteps, PlanError, attach, epsilon_of, group_epsilon
from privacy.group_privacy import _Mixture


def steps_of(noise_multiplier: float, sampling_rate: float, steps: int) -> GaussianSteps:
    """Short for an event."""
    return GaussianSteps(
        noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps
    )


def independent_epsilon(event: GaussianSteps, delta: float, size: int) -> float:
    """Google's distribution of the privacy loss of a mixture of Gaussians, pessimistic."""
    chances = stats.binom(size, event.sampling_rate).pmf(np.arange(size + 1))
    held = [j for j in range(size + 1) if chances[j] > 1e-16]
    loss = pld.from_mixture_gaussian_mechanism(
        event.noise_multiplier,
        [float(j) for j in held],
        [float(chances[j] / chances[held].sum()) for j in held],
        value_discretization_interval=2e-3,
    )
    return float(loss.self_compose(event.steps).get_epsilon_for_delta(delta))


@pytest.mark.parametrize(
    ("event", "size", "looser"),
    [
        (steps_of(2.0, 0.01, 1000), 10, 1.10),
        (steps_of(1.1, 256 / 60_000, 1000), 2, 1.05),
        (steps_of(5.0, 0.1, 100), 5, 1.10),
    ],
    ids=["ten", "two, by the lemma", "five in large batches"],
)
def test_the_bound_is_above_an_independent_one_and_near_it(
    event: GaussianSteps, size: int, looser: float
) -> None:
    """Its losses are rounded up by 0.002 a step at most; fewer of the group would not do."""
    independent = independent_epsilon(event, 1e-5, size)
    found = group_epsilon([event], 1e-5, size=size)
    assert independent - 0.01 <= found <= looser * independent
    assert group_epsilon([event], 1e-5, size=size - 1) < independent - 0.01


def test_full_batches_are_one_gaussian_of_the_groups_size() -> None:
    """At rate 1 all k are in: k clipping norms in each step (Balle and Wang 2018)."""
    mu = 3 * math.sqrt(20) / 8

    def excess(epsilon: float) -> float:
        loss, gain = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(stats.norm.cdf(loss) - math.exp(epsilon) * stats.norm.cdf(gain)) - 1e-5

    exact = float(optimize.brentq(excess, 0, 200))
    found = group_epsilon([steps_of(8.0, 1.0, 20)], 1e-5, size=3)
    assert exact <= found <= exact * (1 + 1e-6)


@pytest.mark.parametrize("order", [1.5, 2.0, 3.7, 8.0, 40.0])
@pytest.mark.parametrize(("noise", "rate"), [(1.3, 0.02), (0.6, 0.2), (4.0, 0.5)])
def test_of_one_example_the_divergence_is_the_accountants(
    order: float, noise: float, rate: float
) -> None:
    """Opacus' own formula, of the direction that costs more."""
    mixture = _Mixture(steps_of(noise, rate, 100), 1, left_out=1e-30)
    expected = compute_rdp(q=rate, noise_multiplier=noise, steps=100, orders=order)
    assert mixture.added(order) == pytest.approx(float(expected), rel=1e-6)
    assert mixture.removed(order) <= mixture.added(order) * (1 + 1e-9)


def test_what_is_left_out_is_paid_for() -> None:
    """However much of the binomial's tail is looked at, the divergence without them covers it."""
    event = steps_of(1.5, 0.05, 1)
    whole, cut = (_Mixture(event, 40, left_out=tail) for tail in (1e-300, 1e-6))
    for order in (1.5, 4.0, 16.0):
        assert cut.removed(order) >= whole.removed(order) - 1e-12
        assert cut.added(order) <= whole.added(order) + 1e-12


def test_a_group_costs_more_the_larger_it_is() -> None:
    """And never less than one example."""
    event = steps_of(3.0, 0.05, 60)
    found = [group_epsilon([event], 1e-5, size=size) for size in (1, 2, 5, 20, 200)]
    assert found == sorted(found)
    assert found[0] == epsilon_of([event], 1e-5)
    assert math.isfinite(found[-1])


def test_nothing_taken_costs_nothing_and_no_noise_protects_nobody() -> None:
    """As without groups."""
    assert group_epsilon([], 1e-5, size=5) == 0
    assert group_epsilon([steps_of(0.0, 0.1, 1)], 1e-5, size=5) == math.inf
    for delta, size in ((0.0, 2), (1.0, 2), (1e-5, 0), (1e-5, 1.5)):
        with pytest.raises(PlanError):
            group_epsilon([steps_of(1.0, 0.1, 1)], delta, size=size)  # type: ignore[arg-type]


def attached(groups: Any, dataset: Any, **changed: Any) -> None:
    """A training of examples."""
    model = nn.Linear(4, 2)
    settings = {"samples": 12, "batch_size": 4, "epochs": 1, "noise_multiplier": 2.0, "delta": 0.01}
    plan = DPPlan(**{**settings, **changed})
    attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), dataset, groups=groups)


class Owned(list):
    """A data set that knows whose its examples are."""

    groups: Any = None


DATA = [(torch.rand(4), i % 2) for i in range(12)]
OWNERS = [0, 0, 0, 1, 1, *range(2, 9)]


@pytest.mark.parametrize("by_attribute", [False, True])
def test_a_training_of_examples_warns_of_persons_who_have_several(by_attribute: bool) -> None:
    """With the largest group, and what epsilon is for it."""
    owned = Owned(DATA)
    owned.groups = OWNERS if by_attribute else None
    own = DPPlan(samples=12, batch_size=4, epochs=1, noise_multiplier=2.0, delta=0.01)
    theirs = group_epsilon([own.event()], 0.01, size=3)
    says = (
        "groups: 2 of 9 persons have more than one example, the largest group 3. "
        f"ε = {own.epsilon():.3g} at δ = 0.01 .* with 3 it is {theirs:.3g}, .*unit"
    )
    with pytest.warns(UserWarning, match=says) as caught:
        attached(None if by_attribute else OWNERS, owned)
    assert caught[0].filename == __file__


def test_who_has_one_example_is_not_warned_of() -> None:
    """Nor what is no list of ids, unless it was given as one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(range(12), DATA)
        other = Owned(DATA)
        other.groups = "something else"
        attached(None, other)
    with pytest.raises(PlanError, match="groups: expected a list of ids"):
        attached("something else", DATA)


SUBSETS = {
    "list": lambda data: Subset(data, [7, 0, 4, 1, 11, 2]),
    "tensor": lambda data: Subset(data, torch.tensor([7, 0, 4, 1, 11, 2])),
    "of a subset": lambda data: Subset(Subset(data, range(11, -1, -1)), [4, 11, 7, 10, 0, 9]),
}


@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
def test_a_subset_has_the_persons_of_its_examples(subset: Any) -> None:
    """As `random_split` makes them: examples 0, 1 and 2 are one person's, the others are alone."""
    owned = Owned(DATA)
    owned.groups = OWNERS
    with pytest.warns(UserWarning, match="groups: 1 of 4 persons have .* the largest group 3"):
        attached(None, subset(owned), samples=6)
    attached(None, subset(owned), samples=4, unit="person", images_per_person=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(None, Subset(owned, [0, *range(5, 12)]), samples=8)
        attached(None, subset(DATA), samples=6)


def test_a_subset_of_examples_that_are_not_there_is_refused() -> None:
    """In our words, by either plan."""
    owned = Owned(DATA)
    owned.groups = OWNERS
    for unit in ({}, {"unit": "person", "images_per_person": 3}):
        with pytest.raises(PlanError, match="index out of range"):
            attached(None, Subset(owned, [99, *range(5)]), samples=6, **unit)


@pytest.mark.parametrize("wrong", ["something else", range(6)])
def test_a_subset_of_what_has_no_ids_has_none(wrong: Any) -> None:
    """Passed over by a plan of examples; a plan of persons says what was expected."""
    owned = Owned(DATA)
    owned.groups = wrong
    subset = Subset(owned, range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(None, subset, samples=6)
    with pytest.raises(PlanError, match="groups: expected"):
        attached(None, subset, samples=6, unit="person", images_per_person=3)


def owned_by(groups: Any) -> "Owned":
    """The twelve examples, and whose they are."""
    owned = Owned(DATA)
    owned.groups = groups
    return owned


def test_parts_put_together_have_the_persons_of_each() -> None:
    """Who is in two parts is one person: 0 has three examples in each; a subset of them too."""
    whole = ConcatDataset([owned_by(OWNERS), owned_by([0, 0, 0, *range(20, 29)])])
    with pytest.warns(UserWarning, match="groups: 2 of 18 persons have .* the largest group 6"):
        attached(None, whole, samples=24)
    attached(None, whole, samples=18, unit="person", images_per_person=6)
    some = Subset(whole, [0, 12, 13, 3, 23])
    with pytest.warns(UserWarning, match="groups: 1 of 3 persons have .* the largest group 3"):
        attached(None, some, samples=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(None, ConcatDataset([owned_by(range(12)), owned_by(range(12, 24))]), samples=24)
        attached(None, ConcatDataset([DATA, DATA]), samples=24)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (None, "in every part of the data set or in none, got none in part 1 of 2"),
        (range(6), "expected 12 ids, one for each example of the data set that is part 1"),
        ([str(n) for n in range(12)], "expected ids of one type, got int, str"),
    ],
    ids=["none", "too few", "of another type"],
)
def test_parts_of_which_some_have_no_ids_are_refused(second: Any, says: str) -> None:
    """By a plan of persons, with what to do; all ids given by hand are taken."""
    whole = ConcatDataset([owned_by(OWNERS), owned_by(second)])
    unit = {"unit": "person", "images_per_person": 3}
    with pytest.raises(PlanError, match=says):
        attached(None, whole, samples=18, **unit)
    attached([*OWNERS, *range(20, 32)], whole, samples=21, **unit)
