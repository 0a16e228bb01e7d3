"""What each way of training faster, or better, is worth: accuracy, recall and time, each in turn.

The loop of a tutorial stands `before`. Every other row is the same training with batches that are
cut by index and one more strategy, or with several at once. For each seed all are trained
once, in an order drawn anew, so that a machine that slows down slows all; what is trained is
written down at once, so that a measurement that was ended goes on where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Protocol, final

import torch

from secure_cnn.bench.plain_training import PlainTraining
from secure_cnn.bench.timing import measured_row, ratios, share_row
from secure_cnn.bench.tutorial import TutorialLoop
from secure_cnn.bench.watch import Trained, Watch
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.record import Row
from secure_cnn.record.document import Checked, Document, require

__all__ = [
    "BEFORE",
    "STRATEGIES",
    "Done",
    "Strategy",
    "StrategyLog",
    "StrategySettings",
    "measure_strategies",
    "strategies",
]

_ASKED_FOR = ("bfloat16",)
"""Slow, not fast, on a processor that has no instructions for it: eight times, on one."""
BEFORE = "before"
"""The loop of a tutorial, against which all others are held."""

_Change = Callable[[PlainTraining], PlainTraining]

_CHANGES: Mapping[str, tuple[str, _Change]] = {
    "by-index": ("batches cut by index, changed as a whole", lambda plain: plain),
    "channels-last": (
        "images and filters with channels last in memory",
        lambda plain: replace(plain, memory_format=torch.channels_last),
    ),
    "bfloat16": (
        "convolutions and products in bfloat16",
        lambda plain: replace(plain, bfloat16=True),
    ),
    "large-batch": (
        "four times as many images a step, at twice the rate",
        lambda plain: replace(
            plain, batch_size=4 * plain.batch_size, learning_rate=2 * plain.learning_rate
        ),
    ),
    "one-cycle": (
        "the rate rises to twice its peak in a fifth of the steps, and falls again",
        lambda plain: replace(plain, warmup=0.2, learning_rate=2 * plain.learning_rate),
    ),
    "label-smoothing": (
        "a tenth of each target spread over all classes",
        lambda plain: replace(plain, label_smoothing=0.1),
    ),
    "averaging": (
        "moving average of the weights",
        lambda plain: replace(plain, average_decay=0.99),
    ),
    "flips": ("half of the images mirrored, by a coin", lambda plain: replace(plain, flip=True)),
    "alternate-flips": (
        "each image mirrored in every second epoch",
        lambda plain: replace(plain, flip=False, alternate_flips=True),
    ),
    "shifts": ("images moved by up to 2 pixels", lambda plain: replace(plain, shift=2)),
    "identity": (
        "convolutions begin by passing their inputs on",
        lambda plain: replace(plain, identity=True),
    ),
    "whitening": (
        "a first layer that whitens patches, and is not trained",
        lambda plain: replace(plain, whitening=True),
    ),
    "muon": ("filters stepped alike in all directions", lambda plain: replace(plain, muon=True)),
    "mirror-views": (
        "flips, and answers from an image and its mirror image",
        lambda plain: replace(plain, flip=not plain.alternate_flips, mirror_views=True),
    ),
    "fewer-epochs": (
        "a third of the epochs",
        lambda plain: replace(plain, epochs=max(1, plain.epochs // 3)),
    ),
    "fast": (
        "a third of the epochs, channels last, one cycle, whitening",
        lambda plain: replace(
            plain,
            epochs=max(1, plain.epochs // 3),
            memory_format=torch.channels_last,
            warmup=0.2,
            learning_rate=2 * plain.learning_rate,
            whitening=True,
        ),
    ),
}

STRATEGIES: Mapping[str, str] = {
    BEFORE: "the loop of a tutorial",
    **{name: words for name, (words, _) in _CHANGES.items()},
}
"""What each strategy does, by its name."""


class Strategy(Protocol):
    """A way to train, such as a `TutorialLoop` or a `PlainTraining`, or one of your own."""

    def __call__(self, data: ImageData, *, seed: int, watch: Watch) -> None:
        """Trains once, and has `watch` judge the model at the end of each epoch."""


@final
@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """What is measured: so many seeds from 0 on, and the time to an accuracy in (0, 1].

    Raises:
        RunError: A number is outside its range.
    """

    seeds: int = 5
    target: float = 0.92

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise RunError(f"seeds: expected at least 1, got {self.seeds}")
        if not 0 < self.target <= 1:
            raise RunError(f"target: expected an accuracy in (0, 1], got {self.target}")


@final
@dataclass(frozen=True, kw_only=True)
class Done(Checked):
    """What one strategy came to with one seed."""

    strategy: str
    seed: int
    trained: Trained


@final
@dataclass(frozen=True, kw_only=True)
class StrategyLog(Document):
    """The trainings of a measurement under way; `conditions` say what they are of."""

    KIND: ClassVar[str | None] = "strategies"
    conditions: Mapping[str, str]
    done: tuple[Done, ...] = ()

    def _check(self) -> None:
        known = [(each.strategy, each.seed) for each in self.done]
        require(len(set(known)) == len(known), "done", "each training once", known)

    @classmethod
    def taken_up(cls, path: Path | None, conditions: Mapping[str, str]) -> "StrategyLog":
        """The log in a file, if there is one, which must be of the same conditions.

        Raises:
            RunError: The file cannot be read, or is of other conditions.
        """
        if path is None or not path.exists():
            return cls(conditions=dict(conditions))
        log = cls.read(path)
        others = [
            name
            for name in {**conditions, **log.conditions}
            if conditions.get(name) != log.conditions.get(name)
        ]
        if others:
            raise RunError(
                f"{path}: expected trainings of the same {', '.join(sorted(others))}, got others; "
                "give the options they were begun with, or another file"
            )
        return log


def strategies(plain: PlainTraining, names: Sequence[str] = ()) -> dict[str, Strategy]:
    """The strategies of these names on one plain training; `before` is always there.

    Without a name they are all but `bfloat16`, which is measured where it is asked for.

    Raises:
        RunError: There is no strategy of a name.
    """
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise RunError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {unknown[0]}")
    before = TutorialLoop(
        make=plain.make,
        epochs=plain.epochs,
        batch_size=plain.batch_size,
        learning_rate=plain.learning_rate,
        weight_decay=plain.weight_decay,
        flip=plain.flip,
    )
    wanted = names or [name for name in _CHANGES if name not in _ASKED_FOR]
    chosen = [name for name in _CHANGES if name in wanted]
    return {BEFORE: before} | {name: _CHANGES[name][1](plain) for name in chosen}


def measure_strategies(
    trained: Mapping[str, Strategy],
    data: ImageData,
    *,
    settings: StrategySettings,
    case: str,
    clock: Callable[[], float],
    log: StrategyLog,
    keep: Callable[[StrategyLog], None] = lambda _: None,
    tell: Callable[[str, int, int, float], None] = lambda _name, _seed, _epoch, _accuracy: None,
) -> list[Row]:
    """Trains every strategy with every seed, but for those that the log has, and compares them.

    Args:
        trained: By name, `before` among them.
        data: To train on and, by its test images, to judge by.
        settings: Seeds and target.
        case: What the rows call it.
        clock: A monotonic clock, in seconds.
        log: What was trained before.
        keep: Gets the log after each training.
        tell: Gets strategy, seed, epoch and accuracy after each epoch.

    Returns:
        For each strategy `accuracy`, `macro_recall` and `seconds` of the training, and `reached`,
        the share of the seeds in which the target was; `seconds_to_target` over those, and their
        mean as `mean_seconds_to_target`; and, seed by seed against `before`, `accuracy_gain`,
        `macro_recall_gain`, `time_ratio` and, where both reached the target, `target_ratio`.

    Raises:
        RunError: `before` is not among the strategies.
    """
    if BEFORE not in trained:
        raise RunError(f"strategies: expected {BEFORE} among them, got {', '.join(trained)}")
    _warm_up()
    for seed in range(settings.seeds):
        known = {each.strategy for each in log.done if each.seed == seed}
        for name in _order(list(trained), seed):
            if name in known:
                continue
            watch = Watch(
                data,
                target=settings.target,
                clock=clock,
                tell=lambda epoch, right, name=name, seed=seed: tell(name, seed, epoch, right),  # type: ignore[misc]
            )
            trained[name](data, seed=seed, watch=watch)
            done = Done(strategy=name, seed=seed, trained=watch.result())
            log = replace(log, done=(*log.done, done))
            keep(log)
    return _rows(case, log, list(trained), settings.seeds)


def _warm_up() -> None:
    """Makes the first optimizer of this process, for which torch loads its compiler: seconds."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=1.0).step()


def _order(names: list[str], seed: int) -> list[str]:
    """Whose turn it is, drawn anew for each seed."""
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [names[index] for index in drawn.tolist()]


def _rows(case: str, log: StrategyLog, names: list[str], seeds: int) -> list[Row]:
    found = {(each.strategy, each.seed): each.trained for each in log.done}
    before = [found[BEFORE, seed] for seed in range(seeds)]
    rows = []
    for name in names:
        own = [found[name, seed] for seed in range(seeds)]
        rows += [
            measured_row(case, name, "accuracy", [each.accuracy for each in own], "1"),
            measured_row(case, name, "macro_recall", [each.macro_recall for each in own], "1"),
            measured_row(case, name, "seconds", [each.seconds for each in own], "s"),
        ]
        rows += _target_rows(case, name, own, before)
        rows += _gain_rows(case, name, own, before) if name != BEFORE else []
    return rows


def _target_rows(
    case: str, name: str, own: Sequence[Trained], before: Sequence[Trained]
) -> list[Row]:
    times = [each.reached for each in own if each.reached is not None]
    rows = [share_row(case, name, "reached", len(times), len(own))]
    if times:
        row = measured_row(case, name, "seconds_to_target", times, "s")
        mean = fmean(times)
        named = replace(row, metric="mean_seconds_to_target")
        rows += [row, replace(named, low=mean, median=mean, high=mean)]
    pairs = zip(own, before, strict=True)
    both = [(a.reached, b.reached) for a, b in pairs if a.reached and b.reached]
    if both and name != BEFORE:
        quotients = [mine / theirs for mine, theirs in both]
        rows.append(measured_row(case, name, "target_ratio", quotients, "x"))
    return rows


def _gain_rows(
    case: str, name: str, own: Sequence[Trained], before: Sequence[Trained]
) -> list[Row]:
    pairs = list(zip(own, before, strict=True))
    right = [a.accuracy - b.accuracy for a, b in pairs]
    recall = [a.macro_recall - b.macro_recall for a, b in pairs]
    times = ratios([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs])
    return [
        measured_row(case, name, "accuracy_gain", right, "1"),
        measured_row(case, name, "macro_recall_gain", recall, "1"),
        measured_row(case, name, "time_ratio", times, "x"),
    ]
