"""Loading: physical batches in their order, read ahead of the loop where there are workers.

The next sample is known before the step: its coins are tossed here, in the training's own process,
and workers get indices. They have no key and no ledger (a fork takes both away), and what they read
ahead and nobody steps on is dropped, at no cost. The processes are those of torch's `DataLoader`.
"""

import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
    get_worker_info,
)

from privacy.batch import mapped
from privacy.errors import PlanError, PrivacyError, StepError
from privacy.padding import Shapes, check_shapes
from privacy.sampling import Collate, MapStyle, PhysicalBatch, read, stacked
from privacy.validate import check_dataset, whole

__all__ = ["Loader", "Reading", "reading_of", "worker_ended"]

_PREFETCH = 2
_MOST = 1024
_ENDED = "DataLoader worker (pid"
"""How torch's errors about a worker that ended begin; raised by a signal, wherever Python is."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the examples of a data set become batches.

    Attributes:
        collate: Stacks examples; in each tensor of its batch dimension 0 is the example.
        workers: Processes that read ahead; 0 reads in the training's own, when asked.
        prefetch: Physical batches that each worker reads ahead.
        timeout: Seconds to wait for a batch of the workers; 0 for ever.
        begin: Called in each worker with its number, before it reads.
        context: How workers are started, as `multiprocessing` names it; None for its default.
        generator: What the workers' random seeds are drawn from; torch's global one by default.
        shapes: The shape that every row keeps; None where it may differ. See `privacy.padding`.
    """

    dataset: MapStyle
    collate: Collate = stacked
    workers: int = 0
    prefetch: int = _PREFETCH
    timeout: float = 0.0
    begin: Callable[[int], Any] | None = None
    context: Any = None
    generator: torch.Generator | None = None
    shapes: Shapes | None = None


def reading_of(
    dataset: object,
    *,
    batch_size: int,
    workers: int | None = None,
    prefetch: int | None = None,
    collate_fn: Collate | None = None,
) -> Reading:
    """How to read a data set, or the one of a `DataLoader` in that loader's way.

    Raises:
        PlanError: It is no map-style data set, a setting is out of its range, or the loader asks
            for what Poisson samples of `batch_size` examples on average cannot follow.
    """
    if isinstance(dataset, DataLoader):
        if any(each is not None for each in (workers, prefetch, collate_fn)):
            raise PlanError(
                "workers, prefetch, collate_fn: a DataLoader says them itself: give them to it, or "
                "give privacy.attach its data set, loader.dataset"
            )
        _check_loader(dataset, batch_size)
        return _of_loader(dataset)
    check_dataset(dataset)
    if collate_fn is not None and not callable(collate_fn):
        raise PlanError(
            "collate_fn: expected a function that stacks a list of examples, got "
            f"{type(collate_fn).__name__}"
        )
    count = whole("workers", 0 if workers is None else workers, least=0, most=_MOST)
    if prefetch is not None and not count:
        raise PlanError(
            "prefetch: only workers read ahead, and there are none: give workers=2, say, beside it"
        )
    return Reading(
        dataset=dataset,  # type: ignore[arg-type]  # `check_dataset` looked
        collate=stacked if collate_fn in (None, default_collate) else collate_fn,
        workers=count,
        prefetch=whole("prefetch", _PREFETCH if prefetch is None else prefetch, most=_MOST),
    )


def _of_loader(loader: DataLoader[Any]) -> Reading:
    check_dataset(loader.dataset)
    return Reading(
        dataset=loader.dataset,  # type: ignore[arg-type]
        collate=stacked if loader.collate_fn is default_collate else loader.collate_fn,
        workers=loader.num_workers,
        prefetch=loader.prefetch_factor or _PREFETCH,
        timeout=loader.timeout,
        begin=loader.worker_init_fn,
        context=loader.multiprocessing_context,
        generator=loader.generator,
    )


def _check_loader(loader: DataLoader[Any], batch_size: int) -> None:
    """Refuses a loader whose own way of choosing examples means something that is not followed."""
    sampler: Any = getattr(loader, "sampler", None)
    # A subclass, drawing with replacement, or one of fewer examples than the data set's would be
    # other odds than Poisson sampling's.
    count = len(loader.dataset)  # type: ignore[arg-type]
    ordinary = type(sampler) in (SequentialSampler, RandomSampler) and (
        count == len(sampler.data_source) == len(sampler)
        and not getattr(sampler, "replacement", False)
    )
    wrong = ""
    if type(loader).__iter__ is not DataLoader.__iter__:
        wrong = f"{type(loader).__name__} gives batches in a way of its own"
    elif loader.batch_size is None:
        wrong = "it has no batch_size, or a batch sampler of its own"
    elif not ordinary:
        wrong = f"its {type(sampler).__name__} does not give every example the same chance"
    elif loader.drop_last:
        wrong = "drop_last=True asks for batches of one size, and a sample has any"
    elif loader.batch_size != batch_size:
        wrong = f"its batch_size is {loader.batch_size}, the plan's {batch_size}"
    if wrong:
        raise PlanError(
            f"dataset: expected a data set, or a DataLoader whose way of reading can be followed, "
            f"got one of which this cannot: {wrong}. Poisson sampling chooses the examples: give "
            "loader.dataset (of some examples: torch.utils.data.Subset(loader.dataset, indices)), "
            f"or DataLoader(loader.dataset, batch_size={batch_size}, collate_fn=..., "
            "num_workers=...)"
        )


class Loader:
    """Reads physical batches in their order; a class because it owns the worker processes.

    Those are started with the first batch, and end with `close`, with the last batch or with an
    error. With `pin` their batches lie in memory from which a GPU copies without waiting.
    """

    def __init__(self, reading: Reading, batches: Iterator[PhysicalBatch], *, pin: bool) -> None:
        self._reading, self._batches, self._pin = reading, batches, pin
        self._given: deque[PhysicalBatch] = deque()
        self._items: Any = None

    def __iter__(self) -> Iterator[tuple[PhysicalBatch, Any]]:
        return self

    def __next__(self) -> tuple[PhysicalBatch, Any]:
        """The next physical batch, and its examples.

        Raises:
            PlanError: Its examples cannot be read, its rows have another shape than they must keep,
                or no worker can be started on the data set.
            StepError: A worker ended, or did not answer in time.
        """
        batch, examples = self._next()
        try:
            check_shapes(self._reading.shapes, examples)
        except PlanError:
            self.close()
            raise
        return batch, examples

    def close(self) -> None:
        """Ends the workers; what they read ahead is dropped."""
        items, self._items = self._items, None
        self._given.clear()
        if items is not None:
            # Deleting it would do the same, unless a traceback still holds it.
            items._shutdown_workers()

    def _next(self) -> tuple[PhysicalBatch, Any]:
        reading = self._reading
        if not reading.workers:
            batch = next(self._batches)
            return batch, read(reading.dataset, batch, reading.collate)
        if self._items is None:
            self._items = self._start()
        try:
            loaded = next(self._items)
        except (StopIteration, PrivacyError):
            self.close()
            raise
        except Exception as error:
            self.close()
            raise _worker_error(error) from error
        if loaded.error is not None:
            self.close()
            raise PlanError(loaded.error) from RuntimeError(f"in a worker:\n{loaded.trace}")
        return self._given.popleft(), loaded.values

    def _start(self) -> Any:
        reading = self._reading
        try:
            return iter(
                DataLoader(
                    _Work(reading.dataset, reading.collate),  # type: ignore[arg-type]
                    batch_size=None,
                    sampler=_noted(self._batches, self._given),
                    num_workers=reading.workers,
                    prefetch_factor=reading.prefetch,
                    pin_memory=self._pin,
                    collate_fn=_as_it_is,  # type: ignore[arg-type]  # of one batch, not of examples
                    timeout=reading.timeout,
                    worker_init_fn=_Begin(reading.begin),
                    multiprocessing_context=reading.context,
                    generator=reading.generator,
                )
            )
        except PrivacyError:
            raise
        except Exception as error:
            raise PlanError(
                f"workers: {reading.workers} processes that read the data set could not be started:"
                f" {type(error).__name__}: {error}; where processes are spawned, data set and "
                "collate_fn must be of classes and functions at the top of a module: give "
                "workers=0 otherwise"
            ) from error


def worker_ended(error: Exception) -> StepError | None:
    """What to raise in the place of torch's error about a worker that ended; None for another one.

    Torch raises it in the main thread as soon as the system tells, also in the middle of a step,
    where something may have taken it for its own failure and caused another error by it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if type(cause) is RuntimeError and str(cause).startswith(_ENDED):
            return _worker_error(cause)
        cause = cause.__cause__
    return None


def _worker_error(error: BaseException) -> StepError:
    return StepError(
        "workers: one that reads the data set ended, could not begin or did not answer: "
        f"{error}; what was read ahead is dropped and costs nothing: go on with a new iteration of "
        "private.batches. If memory ran out (in a container that of /dev/shm, too), give fewer "
        "workers, prefetch=1 or smaller physical batches"
    )


def _noted(
    batches: Iterator[PhysicalBatch], given: deque[PhysicalBatch]
) -> Iterator[tuple[list[int], int]]:
    """What workers are told of each physical batch; the batch itself waits for what they read."""
    for batch in batches:
        given.append(batch)
        yield batch.indices.tolist(), batch.rows


@dataclass(frozen=True)
class _Loaded:
    """What came of a physical batch in a worker: its values, or why there are none."""

    values: Any = None
    error: str | None = None
    trace: str = ""

    def pin_memory(self) -> "_Loaded":
        """Called by torch, which would make a list of a tuple."""
        return _Loaded(mapped(Tensor.pin_memory, self.values), self.error, self.trace)


@dataclass(frozen=True)
class _Work:
    """What a worker has: a data set, by whose side no secret travels."""

    dataset: MapStyle
    collate: Collate

    def __getitem__(self, told: tuple[list[int], int]) -> _Loaded:
        indices, rows = told
        batch = PhysicalBatch(torch.tensor(indices, dtype=torch.int64), rows=rows, last=True)
        try:
            values = mapped(Tensor.detach, read(self.dataset, batch, self.collate))
            _check_sendable(values)
        except PrivacyError as error:
            return _Loaded(error=str(error), trace=traceback.format_exc())
        except Exception as error:
            what = f"dataset: a batch could not be read: {type(error).__name__}: {error}"
            return _Loaded(error=what, trace=traceback.format_exc())
        return _Loaded(values)


@dataclass(frozen=True)
class _Begin:
    """What a worker does first."""

    begin: Callable[[int], Any] | None

    def __call__(self, number: int) -> None:
        # A terminal's Ctrl-C reaches all processes: the training decides, and ends its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        info = get_worker_info()
        assert info is not None, "this is a worker"
        # People's own code finds its data set there.
        work: Any = info.dataset
        object.__setattr__(info, "dataset", work.dataset)
        if self.begin is not None:
            self.begin(number)


def _as_it_is(loaded: _Loaded) -> _Loaded:
    return loaded


def _check_sendable(values: Any) -> None:
    """Refuses a batch of which torch would lose the way to the training, which would wait for it.

    Of its structure alone: tensors can be sent.
    """
    nothing: Any = lambda _: None  # noqa: E731
    try:
        ForkingPickler.dumps(mapped(nothing, values))
    except Exception as error:
        raise PlanError(
            f"dataset: its batches cannot be sent from a worker to the training: "
            f"{type(error).__name__}: {error}; define their classes at the top of a module, or "
            "give workers=0"
        ) from error
