"""Anybody's data set in the places of a split: the same examples, by whatever process."""

import os
import signal

import pytest
import torch
from support.reading_workers import living_workers, remember
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, get_worker_info
from torch.utils.data.datapipes.map import SequenceWrapper

from secure_cnn.data import ShuffledBatches, Split
from secure_cnn.data.loading import read_batches
from secure_cnn.errors import DataError
from secure_cnn.evaluate import evaluate_model, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_processes():
    """A worker that an earlier test left to the garbage collector is not this one's."""
    remember()


COUNT = 23
CLASSES = ("a", "b", "c")


def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images=images, labels=torch.randint(3, (COUNT,), generator=generator))


class Copy:
    """A split read one by one, with a `batch` of another meaning."""

    def __init__(self, failing=None):
        self.split, self.failing = split(), failing

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index == 7 and self.failing is not None:
            self.failing()
        return self.split[index]

    def batch(self, size):
        raise AssertionError("this is a batch size")


class Marked:
    """Read whole, as its class says."""

    batch_by_indices = True

    def __init__(self, found=None):
        self.split, self.found = split(), found

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        raise AssertionError("it is read whole")

    def batch(self, indices):
        return self.split.batch(indices) if self.found is None else self.found(indices)


class Remade(Marked):
    """Its examples are others than its batches, and it says nothing of them."""

    def __getitem__(self, index):
        return self.split[index]

    def batch(self, indices):
        raise AssertionError("nobody said what this is")


class Corner(nn.Module):
    """Its logits are the first three pixels."""

    def forward(self, images):
        return images[:, 0, 0, :3]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_a_data_set_of_ones_own_are_those_of_the_split(workers):
    """Bit for bit, from any step on; the global random state is not moved, no process is left."""
    settings = {"batch_size": 5, "epochs": 2, "seed": 3, "start_step": 2}
    before = torch.get_rng_state()
    found = list(ShuffledBatches(Copy(), workers=workers, **settings))
    assert torch.equal(torch.get_rng_state(), before)
    wanted = list(ShuffledBatches(split(), **settings))
    for (images, labels), (want, truth) in zip(found, wanted, strict=True):
        assert torch.equal(images, want)
        assert torch.equal(labels, truth)
    assert living_workers() == []


@pytest.mark.parametrize("data", [Marked(), Remade()], ids=["marked", "subclass"])
def test_a_data_set_is_read_whole_where_the_class_of_its_examples_says_so(data):
    """The same batches as the split's."""
    settings = {"batch_size": 5, "epochs": 2, "seed": 3, "start_step": 2}
    wanted = list(ShuffledBatches(split(), **settings))
    for (images, labels), (want, truth) in zip(
        ShuffledBatches(data, **settings), wanted, strict=True
    ):
        assert torch.equal(images, want)
        assert torch.equal(labels, truth)
    assert torch.equal(predict(Corner(), data), predict(Corner(), split()))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda _: None, "expected batches of images and labels, two tensors, got NoneType"),
        (lambda i: (torch.zeros(len(i) - 1, 1, 8, 8), i), "and as many labels"),
        (lambda i: (i, i), "expected floating point images"),
        (lambda i: [][7], r"one of its examples \[0, 1, 2, 3\] could not be read: IndexError"),
    ],
    ids=["none", "rows", "whole", "failing"],
)
def test_what_a_data_set_that_is_read_whole_gives_is_checked(found, words):
    """As what a loader stacks is."""
    with pytest.raises(DataError, match=words):
        predict(Corner(), Marked(found))


@pytest.mark.parametrize(
    "data",
    [
        Copy(),
        SequenceWrapper(Copy(), deepcopy=False),
        DataLoader(Copy(), batch_size=4),
        DataLoader(Copy(), batch_size=4, num_workers=1),
        [split()[index] for index in range(COUNT)],
        TensorDataset(split().images.float() / 255, split().labels),
    ],
    ids=["own", "data pipe", "loader", "loader with workers", "list", "tensors"],
)
def test_a_report_is_that_of_the_split(data):
    report = evaluate_model(Corner(), data, CLASSES, batch_size=6)
    assert report == evaluate_model(Corner(), split(), CLASSES, batch_size=6)
    assert torch.equal(predict(Corner(), data), predict(Corner(), split()))


def test_workers_evaluate_what_would_be_evaluated_without_them():
    whole = predict(Corner(), Copy(), batch_size=4)
    assert torch.equal(predict(Corner(), Copy(), batch_size=4, workers=2), whole)
    assert living_workers() == []


def fail():
    raise OSError("img_7.png: truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_cannot_be_read_is_named(workers):
    with pytest.raises(DataError, match=r"example 7 could not be read: OSError: img_7\.png"):
        predict(Corner(), Copy(fail), workers=workers)
    with pytest.raises(DataError, match="example 7 could not be read"):
        list(ShuffledBatches(Copy(fail), batch_size=4, epochs=1, seed=0, workers=workers))


def die():
    if get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(DataError, match=r"its DataLoader failed.*give fewer workers"):
        predict(Corner(), Copy(die), workers=1)


@pytest.mark.parametrize("settings", [{"shuffle": True}, {"drop_last": True}, {"sampler": [1, 2]}])
def test_a_loader_in_another_order_is_refused_with_the_line_to_write(settings):
    loader = DataLoader(Copy(), batch_size=4, **settings)
    with pytest.raises(DataError, match=r"DataLoader\(loader\.dataset, batch_size=512"):
        predict(Corner(), loader)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Copy()), r"give loader\.dataset"),
        (iter([]), "read by index"),
        ({0: 1}, "read by index"),
        (torch.zeros(3, 1, 8, 8), "TensorDataset"),
        ([(torch.zeros(1, 8, 8), 0, 1)], "expected batches of images and labels"),
        ([{"image": torch.zeros(1, 8, 8)}], "expected batches of images and labels"),
        ([(torch.zeros(1, 8, 8, dtype=torch.uint8), 0)], r"image\.float\(\) / 255"),
        ([(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 9, 8), 0)], "could not be stacked"),
    ],
)
def test_what_is_no_data_set_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        list(ShuffledBatches(data, batch_size=2, epochs=1, seed=0))


@pytest.mark.parametrize("workers", [-1, True, 1.0, 10**9, "2"])
def test_workers_are_a_number_of_processes(workers):
    with pytest.raises(DataError, match=r"^workers: expected a whole number"):
        predict(Corner(), Copy(), workers=workers)


def test_workers_for_a_split_are_refused():
    """It is in memory: they would slow it down."""
    with pytest.raises(DataError, match="it is in memory already"):
        predict(Corner(), split(), workers=2)


def test_labels_of_no_class_are_refused_by_name():
    data = [(torch.zeros(1, 8, 8), 5)] * 2
    with pytest.raises(DataError, match=r"^labels: expected 0\.\.2, got 5"):
        evaluate_model(Corner(), data, CLASSES)
    with pytest.raises(DataError, match="at least one example"):
        predict(Corner(), [])


def test_no_example_is_read_before_it_is_asked_for():
    """Without workers."""
    seen = []

    class Seen(Copy):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    batches = read_batches(Seen(), iter([torch.tensor([3, 1]), torch.tensor([2])]))
    next(batches)
    assert seen == [3, 1]
