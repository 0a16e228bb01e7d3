"""Copies of a model, measured: better the more is asked, beside students that never asked."""

import pytest
import torch
from torch import nn

from defenses import ThreatModel
from defenses.attacks import PGD
from privacy.errors import LeakageError
from secure_cnn.data import load_data
from secure_cnn.errors import DataError, RunError
from secure_cnn.interruption import Stopped, StopRequest
from secure_cnn.leakage.copies import ANSWERS, ExtractionSettings, measure_extraction
from secure_cnn.leakage.pools import FixedPool, GrowingPool, halves, noise_images
from secure_cnn.leakage.student import StudentTraining

DATA = load_data("digits")
EVERY = torch.arange(len(DATA.train))


def network(seed):
    """Small and fast."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


LEARN = StudentTraining(build=network, steps=150)


@pytest.fixture(scope="module")
def victim():
    images, labels = DATA.train.batch(EVERY)
    return StudentTraining(build=network, steps=400)(
        images, nn.functional.one_hot(labels, 10).float(), seed=7
    )


@pytest.fixture(scope="module")
def sides():
    """Test images in two halves: to ask about, and to judge on."""
    return halves(DATA.test, seed=0)


def unseen(split):
    images, labels = split.batch(torch.arange(len(split)))
    return FixedPool(name="unseen", images=images, labels=labels)


def measured(victim, judged, pools, **changes):
    settings = {"answers": ("probabilities",), "budgets": (10, 150), **changes}
    return measure_extraction(victim, judged, pools, LEARN, ExtractionSettings(**settings))


def test_more_questions_make_a_better_copy_of_any_answer(victim, sides):
    """All records in their order; the more the victim says, the more faithful the copy."""
    pool, judged = sides
    records = measured(victim, judged, [unseen(pool)], answers=tuple(ANSWERS))
    assert [(each.answers, each.queries) for each in records] == [
        (name, budget) for name in ANSWERS for budget in (10, 150)
    ]
    for few, many in zip(records[::2], records[1::2], strict=True):
        assert few.fidelity < many.fidelity
        assert many.fidelity > 0.8
        assert many.baseline > 0.8
        assert (few.transfer, few.baseline_transfer) == (None, None)
    # The baseline is one student, whatever the victim would have answered.
    assert len({(each.baseline, each.baseline_fidelity) for each in records}) == 2


def test_a_baseline_knows_its_own_labels_alone(victim, sides):
    """Of wrong labels it learns the wrong classes; the copy asked, and has the right ones."""
    pool, judged = sides
    own = unseen(pool)
    wrong = FixedPool(name="wrong", images=own.images, labels=(own.labels + 1) % 10)
    (record,) = measured(victim, judged, [wrong], budgets=(150,))
    assert record.accuracy > 0.8
    assert record.baseline < 0.2
    assert record.baseline_fidelity < 0.2


def test_chance_has_no_baseline_and_two_kinds_of_images(victim, sides):
    """Each pixel alone, and smooth ones: neighbours are alike."""
    images = noise_images((1, 8, 8), 60, seed=0)
    assert images.shape == (60, 1, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    step = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    assert float(step[0::2].mean()) > float(step[1::2].mean())
    assert torch.equal(images, noise_images((1, 8, 8), 60, seed=0))
    assert noise_images((3, 28, 20), 1, seed=0).shape == (1, 3, 28, 20)
    pool = FixedPool(name="noise", images=images)
    (record,) = measured(victim, sides[1], [pool], budgets=(60, 10_000))
    assert (record.pool, record.queries) == ("noise", 60)
    assert (record.baseline, record.baseline_fidelity) == (None, None)


def test_a_growing_pool_asks_what_the_answers_lead_it_to(victim):
    """Each question is one of before, every pixel of it moved by one step or to a bound."""
    images, labels = DATA.test.batch(torch.arange(10))
    pool = GrowingPool(name="adaptive", images=images, labels=labels, step=0.2)

    def asked(answer):
        return pool.questions(35, lambda x: answer(x).softmax(1).detach(), LEARN, seed=0)

    found = asked(victim)
    assert found.shape == (35, 1, 8, 8)
    assert torch.equal(found[:10], images)
    for begin, end in ((10, 20), (20, 35)):
        change = (found[begin:end] - found[: end - begin]).abs()
        at_bound = (found[begin:end] == 0) | (found[begin:end] == 1)
        assert bool(((change - 0.2).abs() < 1e-6).logical_or(at_bound | (change == 0)).all())
        assert float(change.mean()) > 0.05
    assert torch.equal(found, asked(victim))
    # Control: another victim, which calls the classes otherwise, leads elsewhere.
    other = asked(lambda x: victim(x).roll(1, dims=1))
    assert torch.equal(other[:10], found[:10])
    assert not torch.equal(other[10:], found[10:])


def test_a_growing_pool_has_the_baseline_of_its_few_images(victim, sides):
    """However much is asked."""
    images, labels = sides[0].batch(torch.arange(20))
    pool = GrowingPool(name="adaptive", images=images, labels=labels)
    few, many = measured(victim, sides[1], [pool], budgets=(20, 40, 160))
    # With 20 questions it would ask what a pool of those images asks, and stands in no row.
    assert (few.queries, many.queries) == (40, 160)
    assert many.baseline == few.baseline
    assert many.fidelity != few.fidelity
    # Chance would be a tenth.
    assert min(few.fidelity, many.fidelity) > 0.4


def test_attacks_on_a_copy_fool_the_victim(victim, sides):
    """Large changes do, changes of nothing do not; the baseline's attack stands beside it."""
    pool, judged = sides
    large, none = (
        measured(
            victim,
            judged,
            [unseen(pool)],
            budgets=(150,),
            attack=PGD(ThreatModel(norm="linf", eps=eps), steps=5),
            attacked=60,
        )[0]
        for eps in (0.4, 1e-6)
    )
    assert large.transfer > 0.6
    assert large.baseline_transfer > 0.3
    assert (none.transfer, none.baseline_transfer) == (0.0, 0.0)


def test_the_same_seed_gives_the_same_copies(victim, sides):
    """And another one others; the global random state is not moved."""
    pool, judged = sides
    state = torch.random.get_rng_state()
    one, two, other = (
        measured(victim, judged, [unseen(pool)], budgets=(40,), seed=seed) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_halves_share_no_image():
    one, other = halves(DATA.test, seed=0)
    assert len(one) + len(other) == len(DATA.test)
    rows = torch.cat([one.images, other.images]).flatten(1)
    assert len(rows.unique(dim=0)) == len(DATA.test.images.flatten(1).unique(dim=0))


def test_a_stop_ends_it(victim, sides):
    stop = StopRequest()
    stop.set()
    learn = StudentTraining(build=network, stop=stop)
    with pytest.raises(Stopped):
        measure_extraction(
            victim, sides[1], [unseen(sides[0])], learn, ExtractionSettings(budgets=(10,))
        )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: StudentTraining(build=network, steps=0),
            RunError,
            "steps: expected a whole number",
        ),
        (lambda: StudentTraining(build=network, learning_rate=0.0), RunError, "a number > 0"),
        (lambda: ExtractionSettings(budgets=()), RunError, "budgets: expected one or more"),
        (
            lambda: ExtractionSettings(budgets=(0,)),
            RunError,
            "budgets: expected a whole",
        ),
        (lambda: ExtractionSettings(answers=("all",)), RunError, "expected some of probabilities"),
        (
            lambda: FixedPool(name="x", images=torch.zeros(2, 8, 8)),
            DataError,
            "x: expected float images",
        ),
        (
            lambda: FixedPool(
                name="x", images=torch.zeros(2, 1, 8, 8), labels=torch.zeros(3).long()
            ),
            DataError,
            "a label for each of 2",
        ),
        (
            lambda: GrowingPool(name="x", images=torch.zeros(2, 1, 8, 8), step=0.0),
            RunError,
            "a step in",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_pool_without_enough_images_and_a_victim_without_logits_are_refused(sides):
    """Each with its name."""
    small = FixedPool(name="few", images=torch.zeros(5, 1, 8, 8))
    with pytest.raises(DataError, match="few: expected at least 10 images, got 5"):
        measured(network(0), sides[1], [small])
    grows = GrowingPool(name="adaptive", images=torch.zeros(150, 1, 8, 8))
    with pytest.raises(DataError, match=r"adaptive: expected a budget of 151 or more, .*got 150"):
        measured(network(0), sides[1], [grows])
    with pytest.raises(LeakageError, match="finite logits"):
        measured(
            lambda images: torch.full((len(images), 10), torch.nan), sides[1], [small], budgets=(5,)
        )
