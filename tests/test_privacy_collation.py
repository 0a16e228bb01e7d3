"""What a user's `collate_fn` may do to examples: each reaches its own row, or it is refused."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot, pad
from torch.utils.data import DataLoader, default_collate

from privacy import DPPlan, PlanError, attach
from privacy.collation import check_collate

DATA = [(torch.rand(3, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(16)]
SEQUENCES = [(torch.ones(2 + i % 5) * i, i % 2) for i in range(16)]


def mixup(examples: list[Any]) -> Any:
    """As torchvision's how-to shows it: each image with its neighbour."""
    images, labels = default_collate(examples)
    share = float(torch.rand(()))
    labels = one_hot(labels, 2).float()
    return tuple(share * each + (1 - share) * each.roll(1, 0) for each in (images, labels))


def seldom(examples: list[Any]) -> Any:
    return mixup(examples) if random.random() < 0.25 else tuple(default_collate(examples))


def shuffled_pairs(examples: list[Any]) -> Any:
    images, labels = default_collate(examples)
    return images + 0.1 * images[np.random.mtrand.permutation(len(images))], labels


def normalised(examples: list[Any]) -> Any:
    images, labels = default_collate(examples)
    return images / images.max(), labels


def by_brightness(examples: list[Any]) -> Any:
    return tuple(default_collate(sorted(examples, key=lambda each: float(each[0].sum()))))


def backwards(examples: list[Any]) -> Any:
    return tuple(default_collate(examples[::-1]))


def one_for_all(examples: list[Any]) -> Any:
    """As many rows as examples, all of the first."""
    return tuple(default_collate([examples[0]] * len(examples)))


def labels_mixed(examples: list[Any]) -> Any:
    images, labels = default_collate(examples)
    return images, labels.cumsum(0)


def padded(examples: list[Any]) -> Any:
    """To the longest: a row's length is the batch's, and its numbers are its own."""
    longest = max(len(each) for each, _ in examples)
    rows = [pad(each, (0, longest - len(each))) for each, _ in examples]
    return torch.stack(rows), torch.tensor([label for _, label in examples])


def padded_and_sorted(examples: list[Any]) -> Any:
    """As packed sequences once asked for."""
    return padded(sorted(examples, key=lambda each: -len(each[0])))


def noisy(examples: list[Any]) -> Any:
    """Draws for each example alone, by every generator."""
    rows = [
        each + torch.rand(3) + random.random() + np.random.mtrand.random_sample()
        for each, _ in examples
    ]
    return torch.stack(rows), torch.tensor([label for _, label in examples])


def emptied(examples: list[Any]) -> Any:
    """Takes its examples apart."""
    images = torch.stack([each.mul_(2) for each, _ in examples])
    return images, torch.tensor([label for _, label in examples])


MIXING = (mixup, seldom, shuffled_pairs, normalised, by_brightness, backwards, one_for_all,
          labels_mixed)  # fmt: skip
APART = (default_collate, noisy, emptied)


@pytest.mark.parametrize("collate", MIXING)
def test_a_collate_fn_that_mixes_or_reorders_examples_is_refused(collate: Any) -> None:
    """By `attach`, and as the one of a `DataLoader`; nothing is attached then."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = DPPlan(samples=16, batch_size=4, epochs=1, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(PlanError, match="collate_fn: with one example replaced by another"):
        attach(plan, model, optimizer, DATA, collate_fn=collate)
    loader = DataLoader(DATA, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="collate_fn: with one example replaced by another"):
        attach(plan, model, optimizer, loader)
    attach(plan, model, optimizer, DATA).detach()


@pytest.mark.parametrize("collate", APART)
def test_a_collate_fn_that_keeps_examples_apart_is_taken(collate: Any) -> None:
    """Whatever it draws; examples and random states stay what they were."""
    before = [(image.clone(), label) for image, label in DATA]
    torch.manual_seed(1)
    random.seed(1)
    np.random.mtrand.seed(1)
    drawn = torch.rand(1), random.random(), np.random.mtrand.random_sample()
    torch.manual_seed(1)
    random.seed(1)
    np.random.mtrand.seed(1)
    check_collate(DATA, collate)
    assert (torch.rand(1), random.random(), np.random.mtrand.random_sample()) == drawn
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, DATA, strict=True))


def test_sequences_may_be_padded_but_not_sorted() -> None:
    check_collate(SEQUENCES, padded)
    with pytest.raises(PlanError, match="puts them in another order"):
        check_collate(SEQUENCES, padded_and_sorted)


def test_a_collate_fn_with_a_generator_of_its_own_is_refused_with_the_cure() -> None:
    own = np.random.default_rng(0)

    def drawing(examples: list[Any]) -> Any:
        images, labels = default_collate(examples)
        return images + float(own.random()), labels

    with pytest.raises(PlanError, match="collate_fn: the same examples gave another batch"):
        check_collate(DATA, drawing)


def test_one_example_alone_has_nothing_to_be_mixed_with() -> None:
    check_collate(DATA[:1], mixup)
