"""Shadow models: who is trained on what, in which order, and what a table holds of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from privacy.errors import LeakageError
from privacy.leakage import (
    Question,
    ShadowDesign,
    area,
    copies,
    global_threshold,
    lira,
    membership,
    score_tables,
)

CLASSES = 3


@pytest.fixture
def dataset():
    """Images of one pixel, which is their number; their class is arbitrary."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, CLASSES, 60))
    return TensorDataset(torch.arange(60.0).view(60, 1, 1, 1), labels)


def one_table(train, dataset, **how):
    """Of the question alone that is asked if no other is."""
    asked = {"recipe": "r", "questions": {"sure": Question()}} | how
    return score_tables(train, dataset, asked.pop("design", design()), **asked)["sure"]


def design(**changes):
    """Around a target that knows the first forty."""
    asked = {"shadows": 4, "pool": 30, "seed": 0} | changes
    return ShadowDesign.around(np.arange(40), np.arange(40, 60), **asked)


class Memory:
    """Trains models that are surer of what they were trained on, and keeps count."""

    def __init__(self, dataset):
        self.labels, self.calls = dataset.tensors[1], []

    def __call__(self, indices, *, seed):
        self.calls.append((indices.tolist(), seed))
        known = torch.zeros(60, dtype=torch.bool)
        known[torch.from_numpy(indices)] = True
        noise = torch.randn(60, generator=torch.Generator().manual_seed(seed % 2**31))

        def answer(images):
            number = images.flatten().long()
            own = 3.0 * known[number] + 0.1 * noise[number]
            return nn.functional.one_hot(self.labels[number], CLASSES) * own[:, None]

        return answer


def test_a_shadow_has_as_many_examples_as_the_target():
    """All of the members that are not in the pool, and half of the pool."""
    drawn = design()
    assert drawn.models == 5
    assert drawn.trained_on(0).tolist() == list(range(40))
    assert {len(drawn.trained_on(model)) for model in range(5)} == {40}
    assert set(drawn.always) < set(range(40))
    assert set(drawn.population) < set(range(40, 60))
    assert (drawn.halves[:, 1:].sum(1) == 2).all()
    assert (drawn.pool < 40).sum() == (drawn.pool >= 40).sum() == 15
    every = np.concatenate([drawn.always, drawn.pool, drawn.population])
    assert sorted(every) == list(range(60))


def test_the_same_seed_draws_the_same_and_another_does_not():
    """Halves and seeds; the target's seed is the design's."""
    one, again, other = design(), design(), design(seed=1)
    assert np.array_equal(one.halves, again.halves)
    assert one.seeds() == again.seeds()
    assert not np.array_equal(one.pool, other.pool)
    assert (one.seeds()[0], other.seeds()[0]) == (0, 1)
    assert len(set(one.seeds())) == 5


def test_a_memory_is_found(dataset):
    """Every model is trained once, on its own; who was trained on what stands in the table."""
    train, drawn = Memory(dataset), design()
    table = one_table(train, dataset, design=drawn)
    assert [(list(drawn.trained_on(m)), drawn.seeds()[m]) for m in range(5)] == train.calls
    assert table.labels.tolist() == dataset.tensors[1][drawn.asked].tolist()
    pool = ~table.population
    assert pool.sum() == 30
    for column in range(5):
        assert area(lira(table)[pool, column], table.members[pool, column]) == 1.0


def test_a_target_that_is_there_is_not_trained(dataset):
    """And is the first column."""
    train = Memory(dataset)
    sure = nn.functional.one_hot(dataset.tensors[1], CLASSES) * 7.0
    table = one_table(train, dataset, target=lambda images: sure[images.flatten().long()])
    assert len(train.calls) == 4
    assert table.signals[:, 0] == pytest.approx(7.0 - np.log(2))


def test_what_was_known_is_not_trained_again(dataset):
    """Interrupted after three models and gone on with: the same table."""
    whole = one_table(Memory(dataset), dataset)
    kept = {}

    def keep(model, signals):
        kept[model] = signals
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_table(Memory(dataset), dataset, keep=keep)
    train = Memory(dataset)
    table = one_table(train, dataset, known=kept)
    assert len(train.calls) == 2
    assert np.array_equal(table.signals, whole.signals)
    every = {model: {"sure": table.signals[:, model]} for model in range(5)}
    again = one_table(train, dataset, known=every)
    assert np.array_equal(again.labels, whole.labels)
    assert len(train.calls) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shadows": 3}, "even number of models"),
        ({"shadows": 0}, "even number of models"),
        ({"pool": 1}, "expected some and some others for a pool, got 40 and 20"),
    ],
)
def test_a_design_that_cannot_be_is_refused(changes, words):
    """By what it lacks."""
    with pytest.raises(LeakageError, match=words):
        design(**changes)


def test_a_member_among_the_others_is_refused():
    """Whichever list it is in."""
    with pytest.raises(LeakageError, match="got 1 more than once"):
        ShadowDesign.around(np.arange(40), np.arange(39, 60), shadows=2, pool=None, seed=0)


def test_what_is_not_of_this_design_is_refused(dataset):
    """Signals of other examples, or of a model that is not there."""
    for known in ({0: {"sure": np.zeros(3)}}, {5: {"sure": np.zeros(45)}}):
        with pytest.raises(LeakageError, match="they are of another design"):
            one_table(Memory(dataset), dataset, known=known)


def test_a_model_that_cannot_answer_is_named(dataset):
    """Without the classes of the data, in training mode, or with what are no numbers."""
    short = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with pytest.raises(LeakageError, match=r"model 0: labels: expected 0 to 1"):
        one_table(Memory(dataset), dataset, target=short)
    learning = nn.Sequential(nn.Flatten(), nn.Linear(1, 3)).train()
    with pytest.raises(LeakageError, match=r"training mode; return model.eval\(\)"):
        one_table(Memory(dataset), dataset, target=learning)

    def broken(images):
        return torch.full((len(images), 3), torch.nan)

    with pytest.raises(LeakageError, match="model 0: signal: expected finite numbers, got nan of"):
        one_table(Memory(dataset), dataset, target=broken)


def plain_pixel(answer, images, _labels):
    """A signal that is no function of the model: the image's own number."""
    assert callable(answer)
    return images.flatten().double().numpy()


def test_each_question_gets_its_table_from_one_training(dataset):
    """All of the rows, or as many members of the target as others, in the design's order."""
    train, drawn = Memory(dataset), design()
    questions = {
        "sure": Question(),
        "number": Question(signal=plain_pixel),
        "few": Question(signal=plain_pixel, queries=3, most=11),
    }
    tables = score_tables(train, dataset, drawn, recipe="r", questions=questions)
    assert len(train.calls) == 5
    assert list(tables) == list(questions)
    alone = one_table(Memory(dataset), dataset)
    assert np.array_equal(tables["sure"].signals, alone.signals)
    assert (tables["number"].signals == drawn.asked[:, None]).all()
    few = tables["few"]
    rows = [*range(5), *range(15, 20)]  # of a pool whose first half the target was trained on
    assert few.signals[:, 0].tolist() == drawn.pool[rows].tolist()
    assert few.members[:, 0].tolist() == [True] * 5 + [False] * 5
    assert np.array_equal(few.members, drawn.halves[rows])
    assert few.labels.tolist() == dataset.tensors[1][drawn.pool[rows]].tolist()
    assert not few.population.any()


def test_a_question_that_was_not_answered_is_asked_of_a_model_trained_again(dataset):
    """As a model is not kept; the others are left alone."""
    kept = {}
    one_table(Memory(dataset), dataset, keep=kept.__setitem__)
    known = {model: said | {"number": said["sure"]} for model, said in kept.items() if model != 3}
    train = Memory(dataset)
    questions = {"sure": Question(), "number": Question(signal=plain_pixel)}
    tables = score_tables(
        train, dataset, design(), recipe="r", questions=questions, known=known | {3: kept[3]}
    )
    assert [call[1] for call in train.calls] == [design().seeds()[3]]
    assert tables["sure"].signals[:, 3] == pytest.approx(kept[3]["sure"], rel=1e-12)


@pytest.fixture
def asked_by(monkeypatch):
    """The table of a convolutional network, asked so many examples at a time by so many threads."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 1, 8, 8, generator=generator)
    data = TensorDataset(images, torch.randint(0, CLASSES, (60,), generator=generator))

    def train(_indices, *, seed):
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES)
        )
        own = torch.Generator().manual_seed(seed % 2**31)
        with torch.no_grad():
            for each in model.parameters():
                each.copy_(torch.randn(each.shape, generator=own))
        return model.eval()

    def asked(size, threads):
        monkeypatch.setattr("privacy.leakage.shadows._BATCH", size)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return one_table(train, data).signals
        finally:
            torch.set_num_threads(before)

    return asked


@pytest.mark.parametrize(("size", "threads"), [(7, 1), (1, 1), (500, 2), (7, 2)])
def test_a_table_depends_on_no_size_of_a_batch_and_no_number_of_threads(asked_by, size, threads):
    """But for the last bits of float32; other models say something else (control)."""
    signals = asked_by(500, 1)
    assert asked_by(size, threads) == pytest.approx(signals, rel=1e-6, abs=1e-4)
    assert np.abs(signals[:, 0] - signals[:, 1]).mean() > 1


def test_questions_that_cannot_be_answered_are_refused(dataset):
    """Before a model is trained for them."""
    train = Memory(dataset)
    for questions, words in (
        ({}, "questions: expected at least one"),
        ({"few": Question(most=4)}, "of every model among the 4 rows that few asks about"),
    ):
        halves = design().halves.copy()
        halves[[0, 1, 15, 16], 2] = True
        drawn = replace(design(), halves=halves)
        with pytest.raises(LeakageError, match=words):
            score_tables(train, dataset, drawn, recipe="r", questions=questions)
    assert not train.calls
    for numbers, words in (({"queries": 0}, "queries: expected"), ({"most": 3}, "most: expected")):
        with pytest.raises(LeakageError, match=words):
            Question(**numbers)


@pytest.mark.parametrize("wrong", [lambda n: np.zeros(n, np.float32), lambda n: np.zeros((n, 1))])
def test_a_signal_that_is_not_a_number_for_each_is_refused(dataset, wrong):
    """With what came."""
    question = Question(signal=lambda _answer, images, _labels: wrong(len(images)))
    with pytest.raises(LeakageError, match="signal: expected float64 for each of 35 examples"):
        one_table(Memory(dataset), dataset, questions={"sure": question})


def test_copies_are_in_nobodys_pool():
    """Of the members all models have them, of the others none; the same without any."""
    apart = np.array([3, 4, 45])
    plain = ShadowDesign.around(np.arange(40), np.arange(40, 60), shadows=2, pool=None, seed=0)
    one = ShadowDesign.around(
        np.arange(40), np.arange(40, 60), shadows=2, pool=None, seed=0, apart=apart
    )
    assert not np.isin(one.asked, apart).any()
    assert {3, 4} <= set(one.always.tolist())
    assert np.isin(apart, plain.asked).any() or np.isin(apart, plain.always).any()
    with pytest.raises(LeakageError, match="0 and 4 beside those apart"):
        ShadowDesign.around(
            np.arange(4), np.arange(4, 8), shadows=2, pool=None, seed=0, apart=np.arange(4)
        )


def test_copies_are_found_bit_for_bit():
    """Whatever their labels are; a bit makes another image."""
    images = torch.zeros(1200, 1, 4, 4)
    images.view(1200, 16)[:, 0] = torch.arange(1200)
    images[700] = images[3]
    images[900, 0, 0, 1] = torch.finfo(torch.float32).tiny
    labels = torch.arange(1200) % 3
    assert copies(TensorDataset(images, labels)).tolist() == [3, 700]


def test_who_was_seen_twice_is_not_guessed_about():
    """A model that knows its training images by heart gives all away but those."""
    images = torch.arange(40.0).view(40, 1)
    images[30:] = images[:10]
    data = TensorDataset(images, torch.arange(40) % 2)

    def by_heart(indices, *, seed):
        known = set(images[indices, 0].tolist())

        def answer(asked):
            sure = torch.tensor([[9.0 if float(x) in known else 0.1] for x in asked[:, 0]])
            return torch.cat([torch.where(asked % 2 == 0, sure, -sure), -sure * 0], 1)

        return answer

    report = membership(by_heart, data, shadows=2, attacks={"global": global_threshold})
    assert report.attack("global").area == 1.0
    assert report.members + report.others <= 20
