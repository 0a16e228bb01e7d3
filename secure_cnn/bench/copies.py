"""One private step on K copies of each example, against K plain steps on the same batch.

A plain training meets an example in K augmented forms in K epochs, a private one in a single step
(De et al. 2022, arXiv 2204.13650). Augmenting is left out of both, since both pay it alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secure_cnn.bench.step import Protection, Workload, stepper
from secure_cnn.engine import CrossEntropy
from secure_cnn.errors import RunError

__all__ = ["CopiedCrossEntropy", "copies_against", "copies_makers"]


@final
@dataclass(frozen=True, kw_only=True)
class CopiedCrossEntropy:
    """Cross-entropy of K copies of each example, in the shape that `private.step` averages.

    Attributes:
        copies: K, at least 2.

    Raises:
        RunError: There are fewer.
    """

    copies: int
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.copies < 2:
            raise RunError(f"copies: expected at least 2 of each example, got {self.copies}")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Losses [n, K] of one forward pass over n * K rows."""
        # An index keeps the layout of the images, which repeat_interleave does not.
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(self.copies)
        losses = F.cross_entropy(model(images[rows]), labels[rows], reduction="none")
        return losses.view(-1, self.copies)


def copies_against(copies: int | None) -> dict[str, str]:
    """The variant with K copies, and what it is held against; nothing where K is None."""
    return {} if copies is None else {f"private-{copies}-copies": f"plain-{copies}-steps"}


def copies_makers(
    load: Workload, copies: int | None
) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes the private step with K copies, and what makes K plain steps in one call.

    Args:
        copies: K, at least 2; None makes nothing.

    Raises:
        RunError: There are fewer copies.
    """
    if copies is None:
        return {}
    private = Protection(objective=CopiedCrossEntropy(copies=copies), private=True)
    ((name, plain_name),) = copies_against(copies).items()
    return {
        name: partial(stepper, load, private),
        plain_name: partial(_plain_steps, load, copies),
    }


def _plain_steps(load: Workload, count: int) -> Callable[[], None]:
    """So many plain steps as one call."""
    step = stepper(load, Protection(objective=CrossEntropy(), private=False))

    def steps() -> None:
        for _ in range(count):
            step()

    return steps
