"""Which protections a training has: objective and privacy, averaged weights, saved checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from secure_cnn.bench.savers import BackgroundSaver, MakeSaver, SealedSaver
from secure_cnn.bench.step import Protection, protections
from secure_cnn.engine import Objective
from secure_cnn.errors import RunError

__all__ = ["PLAIN", "Variant", "combinations", "variant_of"]

PLAIN = "plain"
"""The variant that all others are measured against."""

_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class Variant(Protection):
    """One variant of a training, as the values of its seams.

    Attributes:
        average_decay: Of the moving average of the weights, in [0, 1); None keeps none.
        saver: Makes what saves the checkpoints; None saves none.

    Raises:
        RunError: The decay is out of range.

    Example:
        >>> from secure_cnn.engine import CrossEntropy
        >>> Variant(objective=CrossEntropy(), private=False, average_decay=0.9).saver
    """

    average_decay: float | None = None
    saver: MakeSaver | None = None

    def __post_init__(self) -> None:
        decay = self.average_decay
        if decay is not None and not 0 <= decay < 1:
            raise RunError(f"average_decay: expected 0 up to 1, got {decay}")


def variant_of(protection: Protection) -> Variant:
    """The same protection as a variant: no average and no saves where it says nothing of them."""
    if isinstance(protection, Variant):
        return protection
    return Variant(objective=protection.objective, private=protection.private)


def combinations(
    objectives: Mapping[str, Objective],
    *,
    private: bool = True,
    average: bool = True,
    sealed: bool = True,
) -> dict[str, Variant]:
    """Each protection alone, each objective with privacy, and the most of them together.

    The last one joins averaged weights and background saves to the first of those with most
    protections; where there are neither, it is missing.

    Args:
        private: Whether DP-SGD is among them.
        average: Whether averaged weights are.
        sealed: Whether sealed checkpoints are, in the loop and beside it.
    """
    found = {
        name: variant_of(each) for name, each in protections(objectives, private=private).items()
    }
    plain = found[PLAIN]
    most = max(found, key=lambda name: (name.count("+"), name != PLAIN))
    whole, name = found[most], [] if most == PLAIN else [most]
    if average:
        found["average"] = replace(plain, average_decay=_DECAY)
        whole, name = replace(whole, average_decay=_DECAY), [*name, "average"]
    if sealed:
        found["sealed"] = replace(plain, saver=SealedSaver)
        found["sealed-background"] = replace(plain, saver=BackgroundSaver)
        whole, name = replace(whole, saver=BackgroundSaver), [*name, "sealed-background"]
    return found | {"+".join(name) or PLAIN: whole}
