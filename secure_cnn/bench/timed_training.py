"""A training under way, every part of it timed; and what it comes to in the same work and time.

The loop is the engine's own, shortened to what costs time; the seams are wrapped from outside, so
what is timed is the code that trains. Of a private step the weight gradients are formed in
`clipping`; `backward` is what leads to them. Free adversarial training crafts in `backward`.

To learn what the cost buys, each variant trains once. Its model is judged when it has seen as many
examples as the plain training did in all, and when it has trained for as long as that took. Judging
is not timed. The learning rate is constant, so that to stop early is no worse a choice for one than
for another; it is the same for all, and tuned for none.
"""

import copy
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

import defenses
import privacy
from privacy.clipping.watch import admitted
from secure_cnn.bench.protection import Protection, Saver
from secure_cnn.bench.step import ENDLESS, Workload, attached, check_batch, check_plain
from secure_cnn.bench.timing import Marks, Stopwatch, marks_for, measured_row, share_row
from secure_cnn.data import ImageData, ShuffledBatches, Split
from secure_cnn.engine import CrossEntropy, MeanUpdate, Update, WeightAverage, on_device
from secure_cnn.errors import RunError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.record import CONTROL, PLAIN, Row

__all__ = ["TimedTraining", "TrainedSettings", "measure_trained"]


@final
@admitted
class TimedTraining:
    """Trains `model`, a copy of the workload's, under a protection; `stopwatch` times the parts.

    A private training (`private`, else None) gets GroupNorm in the place of BatchNorm, by
    `privacy.fix`, and a `batch_size` that holds on average.
    """

    def __init__(
        self,
        load: Workload,
        protection: Protection,
        folder: Path,
        marks: Marks,
        *,
        batch_size: int,
        epochs: int = ENDLESS,
        learning_rate: float = 1e-3,
    ) -> None:
        self.stopwatch = Stopwatch(marks)
        self._objective = copy.deepcopy(protection.objective)
        copied = copy.deepcopy(load.model)
        self.model = (privacy.fix(copied) if protection.private else copied).train()
        self.model.to(memory_format=load.memory_format)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9)
        self.private: privacy.PrivateTraining | None = None
        self._update: Update = MeanUpdate(self._optimizer)
        source: Any = ShuffledBatches(load.split, batch_size=batch_size, epochs=epochs, seed=0)
        if protection.private:
            self.private = attached(
                load, self.model, self._optimizer, batch_size=batch_size, epochs=epochs
            )
            self.private.check_objective(self._objective)
            self._update, source = self.private.step, self.private.batches
        device = next(self.model.parameters()).device
        self._batches = on_device(source, device, load.memory_format)
        self._average: WeightAverage | None = None
        if protection.average_decay is not None:
            self._average = WeightAverage(self.model, decay=protection.average_decay)
        self._saver: Saver | None = None
        if protection.saver is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._saver = protection.saver(folder)
            # A training that is dropped must not leave its folder locked.
            self._release = weakref.finalize(self, self._saver.close)
        self._wrap_seams()

    def stretch(self, steps: int) -> dict[str, float]:
        """Saves, if it saves at all, takes so many steps, and waits for what is still saved.

        Ends in a StopIteration where the data or the plan end before.
        """
        with self.stopwatch.part("other"):
            self._save()
            self._train(steps)
            self._wait()
        return self.stopwatch.take()

    def advance(self, *, save: bool) -> float:
        """Takes one step, after it began a save if asked to, which may go on beside later steps."""
        with self.stopwatch.part("other"):
            if save:
                self._save()
            self._train(1)
        return sum(self.stopwatch.take().values())

    @contextmanager
    def as_kept(self) -> Iterator[nn.Module]:
        """Gives the model as it would be kept if training ended now: with the averaged weights."""
        if self._average is None:
            yield self.model
        else:
            with self._average.applied(self.model) as averaged:
                yield averaged

    def close(self) -> None:
        """Ends the saves; the training cannot go on."""
        if self._saver is not None:
            self._release()

    def _train(self, steps: int) -> None:
        """So many optimizer steps; several batches may make one."""
        done = 0
        while done < steps:
            done += self._step()

    def _step(self) -> bool:
        watch = self.stopwatch
        crafts = not isinstance(self._objective, CrossEntropy)
        with watch.part("data"):
            images, labels = next(self._batches)
        with watch.part("attack" if crafts else "forward"):
            losses = self._objective(self.model, images, labels)
        with watch.part("other" if self.private else "backward"):
            stepped = self._update(losses)
        if stepped and self._average is not None:
            with watch.part("averaging"):
                self._average.update(self.model)
        return stepped

    def _wrap_seams(self) -> None:
        """Puts the stopwatch where a part begins and ends inside of a seam."""
        watch = self.stopwatch
        self.model.register_forward_pre_hook(self._enter_forward)
        self.model.register_forward_hook(self._leave_forward)
        watch.wrap(self._optimizer, "step", "optimizer")
        if self.private is not None:
            clipped = self.private._clipped
            watch.wrap(clipped, "gradients_of", "backward")
            watch.wrap(clipped, "_add_clipped", "clipping")
            watch.wrap(clipped, "noised_mean", "noise")

    def _enter_forward(self, model: nn.Module, _: object) -> None:
        """An attack runs the model in evaluation mode: that is no forward pass of the training."""
        if model.training:
            self.stopwatch.enter("forward")

    def _leave_forward(self, model: nn.Module, _: object, __: object) -> None:
        if model.training:
            self.stopwatch.leave()

    def _save(self) -> None:
        if self._saver is None:
            return
        with self.stopwatch.part("saving"):
            state: dict[str, Any] = {
                "model": dict(self.model.state_dict()),
                "optimizer": self._optimizer.state_dict(),
            }
            for name, part in (("private", self.private), ("average", self._average)):
                if part is not None:
                    state[name] = part.state_dict()
            self._saver.save(state)

    def _wait(self) -> None:
        if self._saver is not None:
            with self.stopwatch.part("saving"):
                self._saver.wait()


_LONGEST = 100
"""A plan must say how long it is: so many times as long as was asked for."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainedSettings:
    """How long is trained, and what is judged.

    `epochs` are those of the plain training, `save_every` steps between two checkpoints, and
    without a `threat` no robust accuracy is measured.
    """

    epochs: int = 3
    batch_size: int = 64
    save_every: int = 100
    learning_rate: float = 0.05
    threat: defenses.ThreatModel | None = None
    robust_samples: int = 200
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every", "robust_samples"):
            value = getattr(self, name)
            if value < 1:
                raise RunError(f"{name}: expected at least 1, got {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise RunError(f"learning_rate: expected a number > 0, got {self.learning_rate}")


def measure_trained(
    model: nn.Module,
    data: ImageData,
    protections: Mapping[str, Protection],
    settings: TrainedSettings,
    *,
    case: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Trains copies of the model under every protection, `plain` among them, and judges each twice.

    There are rows of `accuracy`, `macro_recall` and, with a threat model, `robust_accuracy`
    (100-step PGD and APGD), each with `_same_examples` and `_same_time` at its end; shares with
    Wilson's 95 % interval, recall without one; `epsilon` with both endings where it is private;
    and `training_time`, the seconds for the same examples.
    """
    check_plain(protections)
    check_batch(data, settings.batch_size)
    load = Workload(case=case, model=model, split=data.train, memory_format=settings.memory_format)
    order = [PLAIN, *(name for name in protections if name not in (PLAIN, CONTROL))]
    rows: list[Row] = []
    budget: float | None = None
    with tempfile.TemporaryDirectory() as place:
        for name in order:
            race = _Race(load, protections[name], Path(place, name), settings, data, clock)
            found, seconds = race.run(name, budget)
            budget = seconds if budget is None else budget
            rows += found
    return rows


class _Race:
    """One training against the clock."""

    def __init__(
        self,
        load: Workload,
        protection: Protection,
        folder: Path,
        settings: TrainedSettings,
        data: ImageData,
        clock: Callable[[], float],
    ) -> None:
        marks = marks_for(next(load.model.parameters()).device, clock)
        self._case, self._settings, self._data = load.case, settings, data
        self._training = TimedTraining(
            load,
            protection,
            folder,
            marks,
            batch_size=settings.batch_size,
            epochs=settings.epochs * _LONGEST,
            learning_rate=settings.learning_rate,
        )

    def run(self, name: str, budget: float | None) -> tuple[list[Row], float]:
        """Trains until both ends are reached; the rows, and the seconds for the same examples.

        Without a budget its own time is the budget.
        """
        size = self._settings.batch_size
        enough = self._settings.epochs * -(-len(self._data.train) // size)
        seconds, whole = 0.0, None
        rows: list[Row] = []
        steps, timed = 0, budget is None
        # The plan ends after so many passes more than anyone needs.
        while (whole is None or not timed) and steps < enough * (_LONGEST - 1):
            seconds += self._training.advance(save=steps % self._settings.save_every == 0)
            steps += 1
            if steps == enough:
                whole = seconds
                rows += self._judged(name, "same_examples")
                rows.append(measured_row(self._case, name, "training_time", [seconds], "s"))
            if not timed and budget is not None and seconds >= budget:
                timed = True
                rows += self._judged(name, "same_time")
        if budget is None:
            rows += self._judged(name, "same_time")
        self._training.close()
        assert whole is not None, "a training of at least one epoch has its examples"
        return rows, whole

    def _judged(self, name: str, when: str) -> list[Row]:
        test, classes = self._data.test, self._data.spec.classes
        with self._training.as_kept() as model:
            found = evaluate_model(model, test, classes)
            robust = self._robust(model, name, when, test)
        right = round(found.accuracy * found.count)
        rows = [
            share_row(self._case, name, f"accuracy_{when}", right, found.count),
            measured_row(self._case, name, f"macro_recall_{when}", [found.macro_recall], "1"),
            *robust,
        ]
        private = self._training.private
        if private is not None:
            rows.append(measured_row(self._case, name, f"epsilon_{when}", [private.spent()], "1"))
        return rows

    def _robust(self, model: nn.Module, name: str, when: str, test: Split) -> list[Row]:
        threat = self._settings.threat
        if threat is None:
            return []
        samples = min(self._settings.robust_samples, len(test))
        # The attacks that the published figures were measured with, whatever the default becomes.
        attacks = ("pgd", "apgd")
        report = defenses.evaluate(
            model, test, threat, attacks=attacks, samples=samples, progress=False
        )
        right = round(report.worst_case_accuracy * report.samples)
        return [share_row(self._case, name, f"robust_accuracy_{when}", right, report.samples)]
