"""Shadow models: who is trained on what, in which order, and what a table holds of it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from privacy.errors import LeakageError
from privacy.leakage import ShadowDesign, area, lira, score_table

CLASSES = 3


@pytest.fixture
def dataset():
    """Images of one pixel, which is their number; their class is arbitrary."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, CLASSES, 60))
    return TensorDataset(torch.arange(60.0).view(60, 1, 1, 1), labels)


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
    table = score_table(train, dataset, drawn, recipe="r")
    assert [(list(drawn.trained_on(m)), drawn.seeds()[m]) for m in range(5)] == train.calls
    assert table.labels.tolist() == dataset.tensors[1][drawn.asked].tolist()
    pool = ~table.population
    assert pool.sum() == 30
    for column in range(5):
        assert area(lira(table)[pool, column], table.members[pool, column]) == 1.0


def test_a_target_that_is_there_is_not_trained(dataset):
    """And is the first column."""
    train, drawn = Memory(dataset), design()
    sure = nn.functional.one_hot(dataset.tensors[1], CLASSES) * 7.0
    table = score_table(
        train, dataset, drawn, recipe="r", target=lambda images: sure[images.flatten().long()]
    )
    assert len(train.calls) == 4
    assert table.signals[:, 0] == pytest.approx(7.0 - np.log(2))


def test_what_was_known_is_not_trained_again(dataset):
    """Interrupted after three models and gone on with: the same table."""
    whole = score_table(Memory(dataset), dataset, design(), recipe="r")
    kept = {}

    def keep(model, signals):
        kept[model] = signals
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_table(Memory(dataset), dataset, design(), recipe="r", keep=keep)
    train = Memory(dataset)
    table = score_table(train, dataset, design(), recipe="r", known=kept)
    assert len(train.calls) == 2
    assert np.array_equal(table.signals, whole.signals)
    every = {model: table.signals[:, model] for model in range(5)}
    again = score_table(train, dataset, design(), recipe="r", known=every)
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
    for known in ({0: np.zeros(3)}, {5: np.zeros(45)}):
        with pytest.raises(LeakageError, match="they are of another design"):
            score_table(Memory(dataset), dataset, design(), recipe="r", known=known)


def test_a_model_that_cannot_answer_is_named(dataset):
    """Without the classes of the data, in training mode, or with what are no numbers."""
    short = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with pytest.raises(LeakageError, match=r"model 0: labels: expected 0 to 1"):
        score_table(Memory(dataset), dataset, design(), recipe="r", target=short)
    learning = nn.Sequential(nn.Flatten(), nn.Linear(1, 3)).train()
    with pytest.raises(LeakageError, match=r"training mode; return model.eval\(\)"):
        score_table(Memory(dataset), dataset, design(), recipe="r", target=learning)

    def broken(images):
        return torch.full((len(images), 3), torch.nan)

    with pytest.raises(LeakageError, match="got nan of example 0 from model 0"):
        score_table(Memory(dataset), dataset, design(), recipe="r", target=broken)
