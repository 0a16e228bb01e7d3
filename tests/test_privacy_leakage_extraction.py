"""Copies of a model that is known, by few questions and by many, and beside a baseline."""

import pytest
import torch

from privacy.errors import LeakageError
from privacy.leakage.extraction import Labels, Probabilities, TopProbabilities, extract

WEIGHTS = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])


def victim(images):
    """Linear, so that a linear student can be the same."""
    return 3 * images @ WEIGHTS


def drawn(count, seed):
    """Points of the plane."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


class Linear:
    """Learns a linear model by a few hundred steps on soft targets, and keeps what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, images, targets, *, seed):
        self.given.append((images, targets, seed))
        weights = torch.zeros(2, 3, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(images @ weights, targets).backward()
            optimizer.step()
        return lambda points: points @ weights.detach()


TEST = drawn(500, 9)


def test_more_questions_make_a_better_copy():
    """All probabilities of many points give the victim itself."""
    truth = victim(TEST).argmax(1)
    few, many = extract(victim, drawn(300, 0), Linear(), test=(TEST, truth), budgets=[3, 300])
    assert (few.queries, many.queries) == (3, 300)
    assert few.fidelity < many.fidelity
    assert many.fidelity > 0.98
    assert (many.baseline, many.baseline_fidelity) == (None, None)


def test_one_who_never_asked_stands_beside_it():
    """Of labels that are half wrong a student learns less than of the victim's answers."""
    pool, truth = drawn(300, 1), victim(TEST).argmax(1)
    wrong = torch.randint(3, (300,), generator=torch.Generator().manual_seed(2))
    learn = Linear()
    (copy,) = extract(
        victim, pool, learn, test=(TEST, truth), budgets=[300], labels=wrong, mode=Labels(), seed=4
    )
    assert copy.accuracy > 0.9 > copy.baseline
    assert copy.accuracy == copy.fidelity
    (_, asked, seed), (_, alone, _) = learn.given
    assert asked.argmax(1).tolist() == victim(pool).argmax(1).tolist()
    assert (alone.argmax(1).tolist(), seed) == (wrong.tolist(), 4)


@pytest.mark.parametrize("mode", [Probabilities(), Labels(), TopProbabilities(count=2, digits=1)])
def test_what_is_shown_is_a_distribution_with_the_same_class(mode):
    """Whatever is hidden of it."""
    logits = 2 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    shown = mode(logits)
    assert shown.sum(1) == pytest.approx(torch.ones(200).numpy(), abs=1e-5)
    assert bool((shown >= 0).all())
    # Rounding makes ties, never another order.
    top = shown.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(top, shown.max(1).values)


def test_few_and_rounded_says_no_more_than_that():
    """The others are all alike."""
    shown = TopProbabilities(count=2, digits=1)(torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.5]]))
    assert len(set(shown[0].tolist())) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budgets": [0]}, "budgets: expected a whole number, at least 1, got 0"),
        ({"budgets": [21]}, "got 21"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "one for each of 20 images"),
        ({"victim": lambda images: images[:, 0]}, "expected a tensor of floats with 2 axes"),
        ({"victim": lambda images: images * torch.nan}, "expected finite logits"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, words):
    """Before a student is trained."""
    asked = {"victim": victim, "budgets": [5]} | change
    learn = Linear()
    with pytest.raises(LeakageError, match=words):
        extract(
            asked.pop("victim"),
            drawn(20, 0),
            learn,
            test=(TEST, torch.zeros(500, dtype=torch.long)),
            **asked,
        )
    assert not learn.given
    with pytest.raises(LeakageError, match="count: expected a whole number, at least 1"):
        TopProbabilities(count=0)
