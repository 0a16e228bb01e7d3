"""An optimizer under a private training: nobody else may step it."""

from typing import Any

import torch

from privacy.errors import StepError

__all__ = ["Reserved"]


class Reserved:
    """Refuses every step of this optimizer but those asked for here, until `free`.

    The backward pass of an attached model leaves no gradients, so that a step of the user's own
    trains nothing, or on what was written to `.grad` by hand, without noise and uncounted. Not seen
    is another optimizer on the same parameters, nor one that this one wraps. A class because it
    holds the hook.

    Attributes:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._asked = optimizer, False
        self._hook = optimizer.register_step_pre_hook(self._refuse)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model trains nobody privately: nothing is reserved for it."""

    def step(self) -> None:
        """Lets the optimizer step."""
        self._asked = True
        try:
            self.optimizer.step()
        finally:
            self._asked = False

    def free(self) -> None:
        """Gives the optimizer back to its user."""
        self._hook.remove()

    def _refuse(self, _optimizer: object, _args: Any, _kwargs: Any) -> None:
        if not self._asked:
            raise StepError(
                "optimizer.step() was called beside the private step: backward() of an attached "
                "model leaves it no gradients, and what is in .grad otherwise has no noise; give "
                "the losses to the private step alone, or detach the training first"
            )
