"""Opacus' data loader with our Poisson samples: exact rate, cryptographic coins, no empty batch.

A batch of the loop is a sample, or a part of one that `BatchMemoryManager` cut.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from privacy.attach import cost_of_groups
from privacy.batch import Forward, mapped, tensors
from privacy.collation import check_collate
from privacy.errors import PlanError, StepError
from privacy.noise import SecureGenerator
from privacy.opacus.refusals import LOADER, refusal
from privacy.padding import Shapes, check_padding, check_shapes
from privacy.plan import DPPlan
from privacy.sampling import sample_indices
from privacy.validate import real

__all__ = [
    "Padding",
    "Samples",
    "first_batch",
    "plan_for",
    "poisson_loader",
    "warn_of_groups",
]

_PROBED_EXAMPLES = 3
_READING = frozenset(
    {
        *("pin_memory", "pin_memory_device", "timeout", "worker_init_fn", "collate_fn"),
        "multiprocessing_context",
    }
)
"""What of a loader may be written later."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The shape that the rows of a loader keep, and that of another `collate_fn`, once proved.

    It is None where they may differ in length, as the module does not see the filling.
    """

    shapes: Shapes | None
    prove: Callable[[Any], Shapes | None]

    @classmethod
    def of(cls, module: nn.Module, loader: DataLoader[Any], forward: Forward) -> "Padding":
        """That of a loader; refuses a `collate_fn` whose filling the module sees."""
        dataset: Any = loader.dataset

        def prove(collate: Any) -> Shapes | None:
            if collate is default_collate:
                return None
            return check_padding(module, _one_by_one(dataset), collate, forward=forward)

        return cls(shapes=prove(loader.collate_fn), prove=prove)


class Samples:
    """Poisson samples that were drawn and not stepped on yet; loader and optimizer share it.

    `prefetching` says that worker processes draw ahead of the loop; `check` refuses to draw for a
    training that has ended.
    """

    def __init__(self, *, prefetching: bool, check: Callable[[], None]) -> None:
        self._prefetching, self.check = prefetching, check
        self.begin()

    def begin(self) -> None:
        """A new iteration: what was drawn before is dropped; unreleased, it costs nothing."""
        self._sizes: deque[int] = deque()
        self._skips: deque[bool] = deque()
        self.seen = 0

    def draw(self, size: int) -> None:
        """Notes that a sample of this size was drawn."""
        self._sizes.append(size)

    def signal(self, *, skip: bool) -> None:
        """Notes whether the next physical batch leaves its sample incomplete."""
        self._skips.append(skip)

    @property
    def last(self) -> bool:
        """Whether the physical batch under way completes its sample."""
        return not (self._skips and self._skips[0])

    def mask(self, rows: int) -> Tensor:
        """Which of the rows are examples, bool [rows]; refuses rows of another sample."""
        if not self._sizes:
            raise StepError(
                "no sample was drawn for this step: take one batch from the data loader that "
                "make_private returned for each optimizer.step()"
            )
        if len(self._sizes) > 1 and not self._prefetching:
            raise StepError(
                f"{len(self._sizes)} batches were drawn for one optimizer.step(): every batch is a "
                "step, a small or empty one too; do not skip any"
            )
        size = self._sizes[0]
        # An empty sample has one row of filling.
        left = max(1, size) - self.seen
        if not (rows == left if self.last else rows < left):
            raise StepError(
                f"rows: expected the {left} of the sample that was drawn, the model was called on "
                f"{rows}; give it each batch of the data loader whole, one row an example, and "
                "leave out none (an empty sample is a step too)"
            )
        return torch.full((rows,), size > 0)

    def advance(self, rows: int) -> None:
        """Notes that these rows are in the sum."""
        last = self.last
        self.seen = 0 if last else self.seen + rows
        if last:
            self._sizes.popleft()
        if self._skips:
            self._skips.popleft()


class _PoissonSampler(UniformWithReplacementSampler):  # type: ignore[misc]
    """Draws a sample for each step, as indices; a pass has as many as the original loader.

    Opacus' class and names, for its memory manager tells by them how many batches come.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise refusal(self, name, LOADER)
        super().__setattr__(name, value)

    def __init__(self, samples: Samples, *, population: int, rate: float, steps: int) -> None:
        # Not `super().__init__`: it would keep a generator whose seed can be known.
        self._samples, self._generator = samples, SecureGenerator()
        self._population, self._rate, self._steps = population, rate, steps

    @property
    def num_samples(self) -> int:
        """The size of the data set."""
        return self._population

    @property
    def sample_rate(self) -> float:
        """The probability of each example to be in a sample."""
        return self._rate

    @property
    def steps(self) -> int:
        """Samples a pass."""
        return self._steps

    @property
    def generator(self) -> None:
        """None: the samples have a cryptographic generator, which nobody else may hold."""

    def __iter__(self) -> Iterator[list[int]]:
        self._samples.begin()
        for _ in range(self._steps):
            self._samples.check()
            drawn = sample_indices(
                self._generator, samples=self._population, sampling_rate=self._rate
            )
            self._samples.draw(len(drawn))
            yield drawn.tolist()


class _Collate:
    """The loader's own way to stack examples; an empty sample becomes one row of zeros.

    With `shapes`, rows of another one are refused.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], dataset: Any, shapes: Shapes | None
    ) -> None:
        self._collate, self._dataset, self._shapes = collate, dataset, shapes

    def __call__(self, examples: list[Any]) -> Any:
        batch = self._collate(examples or [self._dataset[0]])
        check_shapes(self._shapes, batch)
        return batch if examples else _zeros_like(batch)


def _zeros_like(batch: Any) -> Any:
    """The same structure with every tensor zero: the values of its example must not be seen."""
    try:
        tensors(batch)
    except PlanError as error:
        raise PlanError(
            f"data_loader: {error}: of an empty sample no such batch can be made; let collate_fn "
            "leave it out, or make numbers of it"
        ) from error
    return mapped(torch.zeros_like, batch)


class _PoissonLoader(DataLoader[Any]):
    """A loader with fixed samples and settings; how examples are read and stacked may change."""

    def __getattr__(self, name: str) -> Any:
        if name in LOADER:
            raise refusal(self, name, LOADER)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if vars(self).get("_made", False):
            if name in _READING:
                self._check_reading(name, value)
            elif not (name.startswith("_") and name in vars(self)):
                raise refusal(self, name, LOADER)
            if name == "collate_fn":
                value = _Collate(value, self.dataset, self._padding.prove(value))  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def _check_reading(self, name: str, value: object) -> None:
        """Refuses at once what would fail in the next pass, or would not reach its workers."""
        if self.persistent_workers and self._iterator is not None:
            raise StepError(
                f"data_loader.{name}: its persistent workers were started with what it was; give "
                "the DataLoader that goes into make_private this setting, or set it before the "
                "first pass"
            )
        optional = name == "worker_init_fn" and value is None
        if name in ("collate_fn", "worker_init_fn") and not (callable(value) or optional):
            raise PlanError(
                f"data_loader.{name}: expected a function, got {type(value).__name__}; give one, "
                "or leave it as it was"
            )
        if name == "collate_fn":
            _check_apart(self.dataset, value)
        if name == "timeout":
            seconds = real("data_loader.timeout", value)
            if seconds < 0 or (seconds > 0 and self.num_workers == 0):
                raise PlanError(
                    f"data_loader.timeout: expected seconds, at least 0, and 0 where no workers "
                    f"are waited for, got {seconds:g} with {self.num_workers} workers; give the "
                    "DataLoader that goes into make_private num_workers"
                )

    @property
    def sample_rate(self) -> float:
        """The probability of each example to be in a batch."""
        sampler: Any = self.batch_sampler
        return float(sampler._rate)


def poisson_loader(
    loader: DataLoader[Any],
    samples: Samples,
    *,
    rate: float,
    padding: Padding,
) -> DataLoader[Any]:
    """The loader with Poisson samples for batches: as many a pass as it had batches."""
    dataset: Any = loader.dataset
    private = _PoissonLoader(
        dataset,
        batch_sampler=_PoissonSampler(
            samples, population=len(dataset), rate=rate, steps=len(loader)
        ),
        collate_fn=_Collate(loader.collate_fn, dataset, padding.shapes),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    private._padding = padding
    private._made = True
    return private


def plan_for(loader: DataLoader[Any], max_grad_norm: Any, *, epochs: int) -> DPPlan:
    """A plan of as many Poisson steps as the loader has batches in so many passes."""
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise PlanError(
            "data_loader: expected a map-style data set: Poisson sampling needs to know its length"
        )
    if loader.batch_size is None:
        raise PlanError(
            "data_loader: expected one with a batch_size, got one that is Poisson already, or has "
            "a batch sampler of its own; give the original DataLoader(dataset, batch_size=...)"
        )
    sampler = loader.sampler
    # A subclass, or drawing with replacement, would be other odds than Poisson sampling's.
    ordinary = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)
    )
    if not ordinary:
        raise PlanError(
            f"data_loader: its {type(sampler).__name__} would be replaced by Poisson sampling with "
            "equal chances; choose examples with torch.utils.data.Subset instead"
        )
    if isinstance(max_grad_norm, Sequence):
        raise PlanError(
            "max_grad_norm: expected one number: the fused mode clips the whole gradient (flat); "
            f"got {list(max_grad_norm)}"
        )
    samples = len(loader.dataset)
    if epochs < 1 or len(loader) < 1:
        raise PlanError(f"epochs: expected at least 1 over at least 1 batch, got {epochs}")
    # The loader's last batch is short, a Poisson step is not: a pass can be a little over an epoch.
    passes = epochs * len(loader) * loader.batch_size / samples
    return DPPlan(
        samples=samples, batch_size=loader.batch_size, epochs=passes, max_grad_norm=max_grad_norm
    )


def first_batch(loader: DataLoader[Any], *, told: bool) -> Any:
    """The first examples as the loop will see them; refused where no empty batch can be made.

    So is a `collate_fn` that mixes examples, leaves some out, or puts them in another order.
    Where it is not `told` how the loop calls the module, it must be seen from the batch.
    """
    dataset: Any = loader.dataset
    batch = loader.collate_fn([dataset[i] for i in range(min(_PROBED_EXAMPLES, len(dataset)))])
    places = tensors(_zeros_like(batch))
    if not told and not isinstance(batch, Tensor | list | tuple):
        raise PlanError(
            f"data_loader: its batches are of type {type(batch).__name__}, in which nobody knows "
            "the module's inputs: give make_private(..., forward=lambda model, batch: "
            f"model(batch{next(iter(places), '')})), as your loop calls it, or let collate_fn give "
            "(inputs, target)"
        )
    _check_apart(dataset, loader.collate_fn)
    return batch


def _check_apart(dataset: Any, collate: Any) -> None:
    """Refuses a way to stack examples whose rows are not one example's each."""
    if collate is not default_collate:
        check_collate(_one_by_one(dataset), collate)


def _one_by_one(dataset: Any) -> Subset[Any]:
    """The data set without a `batch`: examples are read one after another, as a DataLoader does."""
    return Subset(dataset, range(len(dataset)))


def warn_of_groups(plan: DPPlan, loader: DataLoader[Any]) -> None:
    """Warns where the loader's data set says that several examples are one person's."""
    if cost := cost_of_groups(plan, loader.dataset, None, examples=plan.samples):
        turns = "one pass" if plan.epochs == 1 else f"{plan.epochs:g} passes"
        cure = (
            f" (after {turns} over the loader); here an example is protected, and persons by "
            'privacy.attach, with DPPlan(unit="person"), whose samples they are'
        )
        # Past this, `_fuse`, the engine's method and what turns its errors into Opacus'.
        warnings.warn(cost + cure, stacklevel=5)
