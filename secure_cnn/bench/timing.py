"""Fair timing: calls in turn within one run, part by part, and the rows that come of it.

A ratio is taken round by round, between calls that stood side by side, so that a machine that
slows down slows both. Nothing here knows what is timed: the clock, a GPU's events and the seed of
the order are arguments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial, wraps
from itertools import pairwise
from statistics import median
from types import MappingProxyType
from typing import Any, TypeVar, final

import torch

import defenses
from secure_cnn.errors import RunError
from secure_cnn.record import PLAIN, Measurements, Row, hardware, versions

__all__ = [
    "PARTS",
    "Estimate",
    "Marks",
    "Stopwatch",
    "clock_marks",
    "cost_rows",
    "document",
    "estimate",
    "event_marks",
    "interleave",
    "marks_for",
    "measured_row",
    "ratios",
    "share_row",
    "take_turns",
]

PARTS = (
    *("data", "attack", "forward", "backward", "clipping", "noise", "optimizer"),
    *("averaging", "saving", "other"),
)
"""The parts of a training step, in the order in which they come; what is left is `other`."""

_RESAMPLES = 2000
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


def take_turns(
    calls: Mapping[_Key, Callable[[], _Found]], *, rounds: int, warmup: int, seed: int = 0
) -> dict[_Key, list[_Found]]:
    """What every call returns, once a round, in an order drawn anew: drift meets all alike.

    The rounds of the warm-up are run first and not counted: by then caches are warm and kernels
    are chosen.
    """
    if rounds < 1:
        raise RunError(f"rounds: expected at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(seed)
    names = list(calls)
    found: dict[_Key, list[_Found]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for index in torch.randperm(len(names), generator=generator).tolist():
            returned = calls[names[index]]()
            if number >= warmup:
                found[names[index]].append(returned)
    return found


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[], float],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each call of each case by a monotonic clock; the cases take turns."""

    def timed(case: Callable[[], object]) -> float:
        start = clock()
        case()
        return clock() - start

    calls = {name: partial(timed, case) for name, case in cases.items()}
    return take_turns(calls, rounds=rounds, warmup=warmup, seed=seed)


@final
@dataclass(frozen=True, kw_only=True)
class Marks:
    """How a point in time is marked, and the seconds from one mark to a later one."""

    mark: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


def clock_marks(clock: Callable[[], float]) -> Marks:
    """Readings of a clock: right where a call returns when its work is done."""
    return Marks(mark=clock, seconds=lambda start, end: end - start)


def event_marks(record: Callable[[], Any]) -> Marks:
    """Events that a GPU reaches in the order of its work; nothing waits before the end.

    Waiting at each mark would forbid the overlap that training lives on, and so measure another
    training. An event that the GPU reaches while it waits for the processor is reached at once.
    `record` gives a `torch.cuda.Event` with timing that has been put into the queue.
    """

    def seconds(start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # events count in milliseconds

    return Marks(mark=record, seconds=seconds)


def marks_for(device: torch.device, clock: Callable[[], float]) -> Marks:
    """Events on a CUDA device, the clock elsewhere."""
    return event_marks(partial(_recorded, device)) if device.type == "cuda" else clock_marks(clock)


@final
class Stopwatch:
    """Seconds of each part of a step.

    The seconds of a part inside of another are its own and not the other's, so the parts add up to
    the whole.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._under_way: list[str] = []
        self._changes: list[tuple[str | None, Any]] = []

    def enter(self, name: str) -> None:
        """Begins a part inside of the present one."""
        self._under_way.append(name)
        self._changes.append((name, self._marks.mark()))

    def leave(self) -> None:
        """Ends the present part; the one around it goes on."""
        self._under_way.pop()
        around = self._under_way[-1] if self._under_way else None
        self._changes.append((around, self._marks.mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block as this part, but for the parts inside of it."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, owner: object, method: str, name: str) -> None:
        """Counts every later call of a method of this one object as a part."""
        call = getattr(owner, method)

        @wraps(call)
        def timed(*values: Any, **named: Any) -> Any:
            with self.part(name):
                return call(*values, **named)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call of this method."""
        changes, self._changes = self._changes, []
        found: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(changes):
            if name is not None:
                found[name] = found.get(name, 0.0) + self._marks.seconds(start, end)
        return found


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, how often the denominator goes into the numerator."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median and the interval in which it lies with 95 % confidence."""

    median: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median of at least one value with its 95 % percentile bootstrap interval (Efron 1979)."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(tensor), (_RESAMPLES, len(tensor)), generator=generator)
    medians = tensor[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(median=median(tensor.tolist()), low=low, high=high, n=len(tensor))


def measured_row(case: str, variant: str, metric: str, values: Sequence[float], unit: str) -> Row:
    """Values as their median with its interval; a single one is exact."""
    found = estimate(values)
    return Row(case=case, variant=variant, metric=metric, unit=unit, **vars(found))


def share_row(case: str, variant: str, metric: str, right: int, count: int) -> Row:
    """A share of the images with its 95 % interval (Wilson 1927)."""
    low, high = defenses.wilson_interval(right, count)
    share = right / count
    ends = {"median": share, "low": min(low, share), "high": max(high, share)}
    return Row(case=case, variant=variant, metric=metric, unit="1", n=count, **ends)


def cost_rows(
    case: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Rows of the time of each variant and of its ratio to `plain`, which must be among them.

    `copies` names variants on K copies of each example, and the K plain steps that each is held
    against in a row of its own.
    """
    rows = []
    for variant, own in seconds.items():
        rows.append(measured_row(case, variant, "time", own, "s"))
        rows.append(measured_row(case, variant, "time_ratio", ratios(own, seconds[PLAIN]), "x"))
    for variant, plain_steps in copies.items():
        against = ratios(seconds[variant], seconds[plain_steps])
        rows.append(measured_row(case, variant, "copies_ratio", against, "x"))
    return rows


def document(
    rows: Iterable[Row], *, rivals: Mapping[str, str] = MappingProxyType({})
) -> Measurements:
    """Rows with when, where and with what they were measured.

    `rivals` are versions of those measured beside us that `versions` does not name.
    """
    return Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        versions=versions() | dict(rivals),
        rows=tuple(rows),
    )


def _recorded(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event
