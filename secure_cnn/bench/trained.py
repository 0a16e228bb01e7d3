"""What the cost buys: accuracy, recall and robustness after the same work, and in the same time.

Each variant trains once. Its model is judged when it has seen as many examples as the plain
training did in all, and when it has trained for as long as that took. Judging is not timed. The
learning rate is constant, so that to stop early is no worse a choice for one than for another; it
is the same for all, and tuned for none.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import nn

import defenses
from secure_cnn.bench.protection import Protection
from secure_cnn.bench.step import Workload, check_batch, check_plain
from secure_cnn.bench.timed_training import TimedTraining
from secure_cnn.bench.timing import marks_for, measured_row, share_row
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.record import CONTROL, PLAIN, Row

__all__ = ["TrainedSettings", "measure_trained"]

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
