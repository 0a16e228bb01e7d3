"""Models that are only asked: by rows, in evaluation mode, with nothing of them changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from privacy.errors import LeakageError, UnlearningError
from privacy.leakage.signals import checked_logits, confidence
from privacy.statistics import Numbers
from privacy.unlearning.examples import Examples
from privacy.validate import shown

__all__ = ["Answers", "Model", "checked_models", "margins"]

Model = Callable[[Tensor], Tensor]
"""A module, or a function that gives a row for each image."""

_AT_ONCE = 512


def checked_models(models: Any, *, least: int, name: str = "oracles") -> Sequence[Model]:
    """A sequence of so many models; errors call it by its `name`.

    Raises:
        UnlearningError: It is none.
    """
    if not isinstance(models, Sequence) or isinstance(models, (str, bytes)) or len(models) < least:
        cure = "train more of them, each with another seed"
        if callable(models):
            cure = "put it in a list"
        raise UnlearningError(
            f"{name}: expected a list of at least {least} model{'s' if least > 1 else ''}, got "
            f"{shown(models)}; {cure}"
        )
    return models


@final
@dataclass(frozen=True)
class Answers:
    """What a model says of examples.

    Raises:
        UnlearningError: It can neither be called, nor takes the images, nor gives logits.

    Example:
        >>> some = Examples.of("test", [(torch.eye(2), torch.tensor([0, 0]))])
        >>> Answers(lambda images: images).accuracy(some)
        0.5
    """

    model: Model

    def accuracy(self, examples: Examples) -> float:
        """Share that is answered right; a tie is answered by the first class of the largest."""
        right = 0
        for logits, labels in self.logits(examples):
            right += int((logits.argmax(1).cpu() == labels.cpu()).sum())
        return right / len(examples)

    def logits(self, examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels, some rows at a time, in their order."""
        with _asked(self.model) as device:
            for images, labels in examples.batches(_AT_ONCE):
                yield self._checked(images.to(device) if device else images, labels), labels

    def rows(self, examples: Examples) -> Numbers:
        """Whatever it gives for each image, as float64 `[n, numbers]`."""
        found = []
        with _asked(self.model) as device:
            for images, labels in examples.batches(_AT_ONCE):
                given = self._called(images.to(device) if device else images)
                if not isinstance(given, Tensor) or given.ndim < 2 or len(given) != len(labels):
                    raise UnlearningError(
                        f"features: expected a row for each of {len(labels)} images, got "
                        f"{getattr(given, 'shape', type(given).__name__)}"
                    )
                found.append(given.detach().flatten(1).double().cpu().numpy())
        together: Numbers = np.concatenate(found)
        if not np.isfinite(together).all():
            raise UnlearningError("features: expected finite numbers, got some that are not")
        return together

    def _called(self, images: Tensor) -> Any:
        try:
            return self.model(images)
        except Exception as error:
            raise UnlearningError(
                f"model: expected one that takes images {list(images.shape)} of {images.dtype}, "
                f"got {type(error).__name__}: {error}"
            ) from error

    def _checked(self, images: Tensor, labels: Tensor) -> Tensor:
        try:
            found = checked_logits(self._called(images), labels)
        except LeakageError as error:
            raise UnlearningError(str(error)) from None
        if not bool(torch.isfinite(found).all()):
            raise UnlearningError("model: expected finite logits, got some that are not")
        return found


def margins(models: Sequence[Model], examples: Any) -> Numbers:
    """How sure each model is of each example's own class: float64 `[models, examples]`.

    Log odds, by `privacy.leakage.confidence`: the table that `unlearning_lira` takes.

    Raises:
        UnlearningError: Models or examples are not as said.

    Example:
        >>> margins([lambda images: images], [(torch.eye(2), torch.tensor([0, 0]))])
        array([[ 1., -1.]])
    """
    asked = Examples.of("examples", examples)
    found = [
        np.concatenate([_margin(logits, own) for logits, own in Answers(model).logits(asked)])
        for model in checked_models(models, least=1, name="models")
    ]
    return np.stack(found)


def _margin(logits: Tensor, labels: Tensor) -> Numbers:
    try:
        return confidence(logits, labels)
    except LeakageError as error:
        raise UnlearningError(str(error)) from None


@contextmanager
def _asked(model: Any) -> Iterator[torch.device | None]:
    """A module in evaluation mode, its modes put back; without gradients. Its device, if any."""
    if not callable(model):
        raise UnlearningError(f"model: expected a module or a function, got {shown(model)}")
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield None if first is None else first.device
    finally:
        for module, mode in modes:
            module.training = mode
