"""Poisson sampling against its laws, with fixed-size batches as the control to reject."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from privacy import PhysicalBatches, PlanError, SecureGenerator
from privacy.sampling import PhysicalBatch, cut, read, sample_indices

KEY = bytes(range(32))
SAMPLES, RATE, DRAWS = 20, 0.2, 4000
properties = settings(deadline=None, derandomize=True, max_examples=200)


def poisson_inclusion() -> torch.Tensor:
    """Which example was in which draw, bool [draws, samples]."""
    generator = SecureGenerator(KEY)
    included = torch.zeros(DRAWS, SAMPLES, dtype=torch.bool)
    for row in included:
        row[sample_indices(generator, samples=SAMPLES, sampling_rate=RATE)] = True
    return included


def fixed_size_inclusion() -> torch.Tensor:
    """The control: batches of exactly rate times samples, as a shuffling loader gives them."""
    generator = torch.Generator().manual_seed(0)
    included = torch.zeros(DRAWS, SAMPLES, dtype=torch.bool)
    for row in included:
        row[torch.randperm(SAMPLES, generator=generator)[: int(RATE * SAMPLES)]] = True
    return included


def size_p_value(included: torch.Tensor) -> float:
    """Chi-square of the sizes of the samples against the binomial law."""
    observed = torch.bincount(included.sum(1).clamp(max=9), minlength=10).numpy()
    law = stats.binom(SAMPLES, RATE)
    expected = [*(law.pmf(k) for k in range(9)), law.sf(8)]
    return float(stats.chisquare(observed, [DRAWS * p for p in expected]).pvalue)


def dependence_p_value(included: torch.Tensor) -> float:
    """Whether pairs of examples are included together as often as independent coins would."""
    pairs = included.view(DRAWS, -1, 2)
    both = int((pairs[:, :, 0] & pairs[:, :, 1]).sum())
    return float(stats.binomtest(both, DRAWS * SAMPLES // 2, RATE**2).pvalue)


def test_sizes_are_binomial_and_fixed_sizes_are_not() -> None:
    """Mean, variance and shape of the sample's size."""
    assert size_p_value(poisson_inclusion()) > 1e-3
    assert size_p_value(fixed_size_inclusion()) < 1e-9


def test_examples_are_included_independently_and_fixed_sizes_do_not() -> None:
    """Two examples come together with probability q squared; in fixed-size batches less often."""
    assert dependence_p_value(poisson_inclusion()) > 1e-3
    assert dependence_p_value(fixed_size_inclusion()) < 1e-6


def test_every_example_has_the_same_chance_in_every_draw() -> None:
    """No example is favoured, and one draw says nothing about the next."""
    included = poisson_inclusion()
    counts = included.sum(0).numpy()
    spread = ((counts - DRAWS * RATE) ** 2 / (DRAWS * RATE * (1 - RATE))).sum()
    assert 1e-3 < stats.chi2(SAMPLES).cdf(spread) < 1 - 1e-3
    again = int((included[1:] & included[:-1]).sum())
    assert stats.binomtest(again, (DRAWS - 1) * SAMPLES, RATE**2).pvalue > 1e-3


def test_the_rate_is_exact_where_it_is_tiny() -> None:
    """A rate of one in a million is not rounded away."""
    generator = SecureGenerator(KEY)
    drawn = sample_indices(generator, samples=4_000_000, sampling_rate=1e-6)
    assert stats.binomtest(len(drawn), 4_000_000, 1e-6).pvalue > 1e-3
    assert torch.equal(drawn, drawn.sort().values)


@properties
@given(
    count=st.integers(0, 300),
    size=st.integers(1, 64),
    multiple=st.integers(1, 64),
)
def test_a_cut_sample_is_whole(count: int, size: int, multiple: int) -> None:
    """Every index once, no batch too large, one last batch, few row counts; an empty one too."""
    batches = PhysicalBatches(size=size, multiple=min(size, multiple))
    indices = torch.arange(count) * 3
    parts = cut(indices, batches)
    assert torch.equal(torch.cat([part.indices for part in parts]), indices)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in parts:
        assert len(part.indices) <= part.rows <= size
        assert part.rows >= 1
        assert part.rows % batches.multiple == 0 or part.rows == size
        assert int(part.mask().sum()) == len(part.indices)
        assert part.mask()[: len(part.indices)].all()
    assert len({part.rows for part in parts}) <= 2


@pytest.mark.parametrize(("size", "multiple"), [(0, 1), (8, 0), (8, 9), (-1, -1)])
def test_sizes_out_of_range_are_refused(size: int, multiple: int) -> None:
    """Both numbers are in the message."""
    with pytest.raises(PlanError, match=f"size={size}, multiple={multiple}"):
        PhysicalBatches(size=size, multiple=multiple)


class Whole:
    """A data set that reads whole batches, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    batch_by_indices = True

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read one at a time")

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(indices.tolist())
        return indices.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), indices


def test_a_data_set_with_batches_is_read_whole() -> None:
    """One call, in the sample's order, with filling after it."""
    data = Whole()
    images, labels = read(data, PhysicalBatch(torch.tensor([7, 3]), rows=4, last=True))
    assert data.asked == [[7, 3]]
    assert images[:, 0, 0, 0].tolist() == [7, 3, 0, 0]
    assert labels.tolist() == [7, 3, 0, 0]


def test_any_map_style_data_set_is_read() -> None:
    """Pairs of a tensor and a number, one at a time."""
    data = [(torch.full((2,), float(i)), i) for i in range(5)]
    images, labels = read(data, PhysicalBatch(torch.tensor([4, 1]), rows=3, last=True))
    assert images.tolist() == [[4, 4], [1, 1], [0, 0]]
    assert labels.tolist() == [4, 1, 0]
    assert labels.dtype == torch.int64


def test_an_empty_sample_has_the_shape_of_an_example() -> None:
    """All of it is filling."""
    images, labels = read(Whole(), PhysicalBatch(torch.arange(0), rows=2, last=True))
    assert images.shape == (2, 1, 2, 2)
    assert not images.any()
    assert labels.tolist() == [0, 0]


class Short(Whole):
    """Drops an example."""

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().batch(indices[1:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([None] * 4, "could not be stacked"),
        ([(torch.ones(2), 0), (torch.ones(3), 0)], "all of one shape"),
        ([(torch.ones(2), "cat")] * 4, r"got str at \[1\]\[0\]; leave it out"),
        (Short(), r"expected 2 rows in every tensor for 2 indices, got \[1\] at \[0\]"),
    ],
    ids=["nothing", "mixed shapes", "names", "too few"],
)
def test_data_that_is_not_rows_of_tensors_is_refused(data: Any, message: str) -> None:
    """One typed error that says what was expected."""
    with pytest.raises(PlanError, match=f"^dataset: .*{message}"):
        read(data, PhysicalBatch(torch.tensor([0, 1]), rows=2, last=True))


class Failing(Whole):
    """A data set with an error of its own."""

    def __getitem__(self, index: int) -> Any:
        raise ValueError("img_7.png: truncated")

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("img_7.png: truncated")


class FailingOneByOne(Failing):
    batch_by_indices = False


@pytest.mark.parametrize(
    ("data", "which"), [(Failing(), "one of its examples 4, 7"), (FailingOneByOne(), "its example")]
)
def test_a_data_sets_own_error_is_told_with_the_example(data: Any, which: str) -> None:
    """The data set knows which file is broken, we know which example; its error is the cause."""
    with pytest.raises(PlanError) as told:
        read(data, PhysicalBatch(torch.tensor([4, 7]), rows=2, last=True))
    assert str(told.value).startswith(f"dataset: {which}")
    assert "4 could not" in str(told.value) or "4, 7 could not" in str(told.value)
    assert str(told.value).endswith("could not be read: ValueError: img_7.png: truncated")
    assert isinstance(told.value.__cause__, ValueError)


class Unmarked(Whole):
    """Has a `batch` of another meaning."""

    batch_by_indices = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 2, 2), float(index)), index


class Augmented(Whole):
    """Inherits `batch`, which does not know what was done to an example here."""

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 2, 2), float(index)), index


class Wrapper:
    """Passes every name on to another data set, and changes the order."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 2, 2), float(index)), index


@pytest.mark.parametrize("data", [Unmarked(), Augmented(), Wrapper(Whole())])
def test_a_batch_of_another_meaning_is_not_called(data: Any) -> None:
    """Only a class that says so, and gives by `batch` what it gives one by one."""
    images, labels = read(data, PhysicalBatch(torch.tensor([7, 3]), rows=2, last=True))
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [7, 3]
    assert data.asked == []


class SparseWhole(Whole):
    """Gives what has no rows that could be filled up."""

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(len(indices)).to_sparse(), indices


def test_sparse_images_are_refused() -> None:
    """They have no rows that could be filled up."""
    sparse = SparseWhole()
    with pytest.raises(PlanError, match=r"^dataset: expected dense images and labels"):
        read(sparse, PhysicalBatch(torch.tensor([0, 1]), rows=2, last=True))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, math.nan, "8", None])
def test_physical_batches_are_whole_numbers(wrong: Any) -> None:
    """Not a float, not a flag; numpy's are taken."""
    with pytest.raises(PlanError, match=r"^physical batches: expected size >= 1"):
        PhysicalBatches(size=wrong)
    with pytest.raises(PlanError, match=r"^physical batches: expected size >= 1"):
        PhysicalBatches(multiple=wrong)
    assert PhysicalBatches(size=np.int64(16)).size == 16


class Shrunk:
    """Read by indices, and shorter than its plan."""

    batch_by_indices = True

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise AssertionError

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(2, 3)[indices], torch.zeros(2)[indices]


@pytest.mark.parametrize("dataset", [[(torch.zeros(3), 0)] * 2, Shrunk()])
def test_a_data_set_that_shrank_is_named_with_the_example(dataset: Any) -> None:
    with pytest.raises(PlanError, match=r"example 7 could not be read.* it has 2 now"):
        read(dataset, PhysicalBatch(torch.tensor([0, 7]), rows=2, last=True))


def test_pictures_of_pil_come_with_a_cure() -> None:
    dataset = [(Image.new("L", (3, 3)), 0)] * 2
    with pytest.raises(PlanError, match=r"found <class 'PIL.*ToTensor\(\)"):
        read(dataset, PhysicalBatch(torch.tensor([0]), rows=1, last=True))
