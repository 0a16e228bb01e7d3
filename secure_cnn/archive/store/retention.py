"""Which checkpoints of a sequence stay: a pure rule over what the log says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.store.log import Checkpoint

__all__ = ["Retention"]


@final
@dataclass(frozen=True, kw_only=True)
class Retention:
    """A checkpoint stays if any of the three rules wants it; without a rule all stay.

    The newest one always stays.

    Attributes:
        keep_last: The newest so many.
        keep_best: The so many with the largest metric; among equals the newer.
        every: Each whose generation is a multiple of this.

    Raises:
        StateError: A number is below 1.
    """

    keep_last: int | None = None
    keep_best: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best", "every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise StateError(f"{name}: expected a whole number of at least 1, got {value!r}")

    def superfluous(self, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """Those that no rule wants."""
        if self.keep_last is self.keep_best is self.every is None:
            return ()
        measured = sorted(
            (it for it in checkpoints if it.metric is not None),
            key=lambda it: (it.metric, it.generation),
            reverse=True,
        )
        wanted = {it.generation for it in checkpoints[-(self.keep_last or 1) :]}
        wanted |= {it.generation for it in measured[: self.keep_best or 0]}
        if self.every is not None:
            wanted |= {it.generation for it in checkpoints if it.generation % self.every == 0}
        return tuple(it for it in checkpoints if it.generation not in wanted)
