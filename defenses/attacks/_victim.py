"""The model as torchattacks is given it: images in [0, 1], float32, and no modes to switch."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from defenses.errors import AttackError
from defenses.scope import check_logits, home_of
from defenses.threat import ThreatModel

__all__ = ["Victim", "pixels_of", "unit_images"]


class Victim:
    """A stand-in for the model, behind which the adapter's corrections are made.

    It maps [0, 1] onto the threat model's bounds and float32 onto the model's dtype, hides channels
    that the model does not take, and has no training flags that a careless attack could switch. Its
    logits are a copy, which an attack may overwrite.

    Args:
        model: Inside an `attack_scope`.
    """

    training = False

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        *,
        images: Tensor,
        largest_class: int,
        fewest_classes: int = 2,
    ) -> None:
        self._model, self._threat, self._channels = model, threat, images.shape[1]
        self._largest_class, self._fewest_classes = largest_class, fewest_classes
        self._anchor = torch.empty(0, device=images.device)
        self._checked: set[bool] = set()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor, from which torchattacks reads the device."""
        yield self._anchor

    def train(self) -> None:
        """Nothing: the scope keeps the modes."""

    def eval(self) -> None:
        """Nothing: the scope keeps the modes."""

    def __call__(self, unit: Tensor) -> Tensor:
        # Through a flat view, so that the gradient comes back contiguous from a channels-last
        # model: torchattacks calls `view` on it.
        pixels = pixels_of(unit.flatten().view_as(unit)[:, : self._channels], self._threat)
        logits: Tensor = self._model(pixels.to(home_of(self._model, pixels)[1]))
        watched = torch.is_grad_enabled() and pixels.requires_grad
        if watched not in self._checked:
            self._check(pixels, logits, watched=watched)
            self._checked.add(watched)
        return logits.to(unit.dtype, copy=True)

    def _check(self, pixels: Tensor, logits: object, *, watched: bool) -> None:
        """Refuses, at its first answer, a model that this attack cannot work on."""
        logits = check_logits(
            logits, count=len(pixels), largest_label=self._largest_class, error=AttackError
        )
        if logits.shape[1] < self._fewest_classes:
            raise AttackError(
                f"this attack's loss compares {self._fewest_classes} logits, but the model has "
                f"{logits.shape[1]} classes; use apgd with its cross-entropy loss"
            )
        if watched and not logits.requires_grad:
            raise AttackError(
                "model: no gradient reaches the images (is part of it detached or under "
                "no_grad?); use an attack that needs none, such as square"
            )


def unit_images(images: Tensor, threat: ThreatModel) -> Tensor:
    """Images mapped from the threat model's bounds onto [0, 1], at least float32, contiguous."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((wide - threat.bounds[0]) / threat.width).contiguous()


def pixels_of(unit: Tensor, threat: ThreatModel) -> Tensor:
    """Images mapped back from [0, 1] onto the threat model's bounds."""
    return unit if threat.bounds == (0.0, 1.0) else threat.bounds[0] + threat.width * unit
