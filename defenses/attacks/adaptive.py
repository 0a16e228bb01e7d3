"""What an adaptive attack brings of its own: a loss, or a way back past a shattered gradient.

A defence is believed only when an attack that knows it has failed (Athalye et al. 2018, arXiv
1802.00420; Tramer et al. 2020, arXiv 2002.08347).
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from defenses.errors import AttackError

__all__ = ["BackwardOf", "Loss", "by_example", "check_brought", "own_name"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, classes] and labels, int64, [n] to losses, [n], each of its own row only."""


@final
class BackwardOf(nn.Module):
    """The answers of one model with the gradient of another (BPDA)."""

    def __init__(self, surrogate: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self._model, self._surrogate = model, surrogate

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits, [n, classes].

        Raises:
            AttackError: The surrogate's are of another shape, or not finite.
        """
        with torch.no_grad():
            logits: Tensor = self._model(images)
        if not torch.is_grad_enabled():
            return logits
        stand_in: Tensor = self._surrogate(images)
        shape = list(stand_in.shape) if isinstance(stand_in, Tensor) else type(stand_in).__name__
        if shape != list(logits.shape):
            raise AttackError(
                f"surrogate: expected logits of shape {list(logits.shape)}, got {shape}"
            )
        if not bool(torch.isfinite(stand_in).all()):
            raise AttackError("surrogate: expected finite logits, got NaN or infinity")
        return logits + (stand_in - stand_in.detach())  # adds 0 exactly


def by_example(loss: Loss) -> Loss:
    """The loss with its answer checked: one finite-or-infinite number an example, with a gradient.

    Raises:
        AttackError: When it is called and answers something else.
    """

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        losses = loss(logits, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape:
            got = (
                f"a tensor of shape {list(losses.shape)}"
                if isinstance(losses, Tensor)
                else type(losses).__name__
            )
            raise AttackError(f"loss: expected {len(labels)} losses, one an image, got {got}")
        if bool(torch.isnan(losses).any()):
            raise AttackError("loss: expected numbers, got NaN")
        if logits.requires_grad and not losses.requires_grad:
            raise AttackError("loss: no gradient reaches the logits (detached, or under no_grad?)")
        return losses

    return checked


def check_brought(name: str, loss: object, surrogate: object, *, able: Sequence[str]) -> None:
    """Refuses a loss or a surrogate that is none, or that this attack does not take.

    Args:
        loss: A word is a setting like others and is not judged here.
        surrogate: A module, or None.

    Raises:
        AttackError: Naming the argument.
    """
    if isinstance(loss, str) and loss.startswith(_OWN_WORD):
        raise AttackError(f"{name}: loss {loss!r} is a function of your own: give the function")
    if not isinstance(loss, str | None):
        if not callable(loss):
            raise AttackError(f"{name}: loss: expected a function, got {type(loss).__name__}")
        if "loss" not in able:
            raise AttackError(f"{name} takes no loss of your own; pgd and apgd do")
    if surrogate is not None:
        if not isinstance(surrogate, nn.Module):
            raise AttackError(
                f"{name}: surrogate: expected a torch.nn.Module, got {type(surrogate).__name__}"
            )
        if "surrogate" not in able:
            raise AttackError(f"{name} takes no surrogate; pgd, apgd and apgdt do")


_OWN_WORD = "own: "


def own_name(brought: object) -> str:
    """What a report calls something of the user's own."""
    return f"{_OWN_WORD}{getattr(brought, '__name__', type(brought).__name__)}"
