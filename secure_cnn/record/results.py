"""Results: what a run found, epoch by epoch and at its end.

Deliberately not here: the conditions under which a number may be claimed. A `RunRecord` holds both
and refuses one without the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from secure_cnn.errors import RunError
from secure_cnn.record.document import conform, require, require_share

__all__ = ["EpochRecord", "ResultRecord"]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of one variant.

    Attributes:
        variant: `"plain"` or the name of the protections.
        epoch: Counted from 1.
        step: Optimizer steps so far.
        seconds: Seconds that the epoch took.
        learning_rate: At the end of the epoch.
        test_loss: Mean cross-entropy over the test images.
        test_accuracy: In [0, 1].
        train_loss: Mean training loss; None in a private run, where ε does not cover it.
        epsilon: ε spent so far; None when the variant is not private.

    Raises:
        RunError: A value has the wrong type or range, or a private epoch carries its training loss.
    """

    variant: str
    epoch: int
    step: int
    seconds: float
    learning_rate: float
    test_loss: float
    test_accuracy: float
    train_loss: float | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        """Refuse an epoch that would publish what ε does not cover."""
        conform(self)
        require_share("epochs.test_accuracy", self.test_accuracy)
        if self.epsilon is not None and self.train_loss is not None:
            raise RunError(
                "epochs.train_loss: expected none in a private run, got a number; leave it out, "
                "since epsilon does not cover it"
            )


@dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """What one finished variant can do, before and under attack.

    Attributes:
        variant: `"plain"` or the name of the protections.
        accuracy: Share of test images classified correctly.
        macro_recall: Mean of `recall`.
        recall: Per class; NaN for a class without test images.
        confusion: Counts; rows are true classes, columns are predicted ones.
        epsilon: ε spent; None when the variant is not private.
        robust_accuracy: Worst case over `attacks`, per image; None when not evaluated.
        robust_low: Lower end of its 95 % interval; None when not evaluated.
        robust_high: Upper end of its 95 % interval; None when not evaluated.
        robust_recall: Per class, in the worst case; None when not evaluated.
        attacks: Accuracy under each attack, by name.
        seconds_per_step: Median time of a training step; None when not measured.

    Raises:
        RunError: A value has the wrong type, shape or range, or a robustness claim is incomplete.
    """

    variant: str
    accuracy: float
    macro_recall: float
    recall: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    epsilon: float | None = None
    robust_accuracy: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    robust_recall: tuple[float, ...] | None = None
    attacks: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None

    def __post_init__(self) -> None:
        """Refuse a result whose parts do not fit together."""
        conform(self)
        robust = (self.robust_accuracy, self.robust_low, self.robust_high)
        shares = (self.accuracy, self.macro_recall, *self.recall, *(self.robust_recall or ()))
        for value in (*shares, *self.attacks.values(), *robust):
            require_share(f"results[{self.variant}]", value)
        size = len(self.recall)
        square = [len(row) for row in self.confusion] == [size] * size
        require(square, "results.confusion", f"{size} rows of {size}", self.confusion)
        fits = self.robust_recall is None or len(self.robust_recall) == size
        require(fits, "results.robust_recall", f"{size} values", self.robust_recall)
        claimed = {value is None for value in robust}
        require(
            len(claimed) == 1,
            "results.robust_accuracy",
            "all or none of it and its interval",
            robust,
        )

    @property
    def robust_macro_recall(self) -> float | None:
        """Mean of `robust_recall` over the classes that have test images, or None without it."""
        there = [share for share in self.robust_recall or () if not math.isnan(share)]
        return sum(there) / len(there) if there else None
