"""What a training came to: how long it took, how good its model is, and when it was good enough."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import nn

from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.evaluate import ClassificationReport, evaluate_model
from secure_cnn.record.document import Checked, require, require_share

__all__ = ["Trained", "Watch", "check_settings"]


@final
@dataclass(frozen=True, kw_only=True)
class Trained(Checked):
    """One training that has ended; its model was that of the last epoch.

    `reached` are the seconds until the end of the first epoch whose model was right about the
    target's share of the test images; None where none was.
    """

    accuracy: float
    macro_recall: float
    seconds: float
    reached: float | None

    def _check(self) -> None:
        require_share("accuracy", self.accuracy)
        require_share("macro_recall", self.macro_recall)
        require(self.seconds >= 0, "seconds", "at least 0", self.seconds)
        within = self.reached is None or 0 <= self.reached <= self.seconds
        require(within, "reached", f"from 0 to {self.seconds} seconds, or none", self.reached)


@final
class Watch:
    """Counts the seconds of one training from now on, but for those in which it is judged.

    Args:
        data: Whose test images a model is judged by.
        target: The accuracy to be reached, in (0, 1].
        clock: A monotonic clock, in seconds.
        tell: Gets the epochs that are over and the accuracy after the last one.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        target: float,
        clock: Callable[[], float],
        tell: Callable[[int, float], None] = lambda _epochs, _accuracy: None,
    ) -> None:
        self._data, self._target, self._clock, self._tell = data, target, clock, tell
        self._seconds = 0.0
        self._reached: float | None = None
        self._epochs = 0
        self._report: ClassificationReport | None = None
        self._since = clock()

    def judge(self, model: nn.Module) -> None:
        """Judges the model as it is at the end of an epoch; the time that this takes is left out.

        The model is in the mode afterwards that it was in before.
        """
        self._seconds += self._clock() - self._since
        self._epochs += 1
        report = evaluate_model(model, self._data.test, self._data.spec.classes)
        if self._reached is None and report.accuracy >= self._target:
            self._reached = self._seconds
        self._report = report
        self._tell(self._epochs, report.accuracy)
        self._since = self._clock()

    def result(self) -> Trained:
        """What the training came to, as last judged.

        Raises:
            RunError: Nothing was judged.
        """
        if self._report is None:
            raise RunError("watch: expected a model that was judged, got none; train an epoch")
        return Trained(
            accuracy=self._report.accuracy,
            macro_recall=self._report.macro_recall,
            seconds=self._seconds,
            reached=self._reached,
        )


def check_settings(epochs: int, batch_size: int, learning_rate: float, weight_decay: float) -> None:
    """Refuses numbers with which no training can be run.

    Raises:
        RunError: One is outside its range.
    """
    for name, count in (("epochs", epochs), ("batch_size", batch_size)):
        if count < 1:
            raise RunError(f"{name}: expected at least 1, got {count}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise RunError(f"learning_rate: expected a finite number > 0, got {learning_rate}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise RunError(f"weight_decay: expected a finite number >= 0, got {weight_decay}")
