"""What a model predicts, and how good that is: accuracy, recall per class, confusion.

A result is a report, never a bare number. Not here: robustness (`defenses.evaluate`) and privacy.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from secure_cnn.data import Split
from secure_cnn.data.loading import Examples, in_order
from secure_cnn.errors import DataError, ModelError

__all__ = [
    "ClassificationReport",
    "batch_for",
    "classification_report",
    "evaluate_model",
    "predict",
]

_BATCH = 256
_OPERATIONS = 1 << 35
"""Of a forward pass over a batch: an attack of a hundred of them takes a few minutes on a CPU."""


@final
@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """How the predictions on one split compare with its labels.

    Args:
        macro_recall: Mean recall of the classes that occur, each with the same weight.
        recall: For each class the share of its examples that were found; None if it has none.
        confusion: `confusion[i][j]` examples of class `i` were called `j`.
        loss: Mean cross-entropy in nats, if logits were at hand.

    Example:
        >>> report = classification_report(
        ...     torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), ("cat", "dog"))
        >>> report.recall, report.macro_recall, report.confusion
        ((0.5, 1.0), 0.75, ((1, 1), (0, 1)))
    """

    classes: tuple[str, ...]
    count: int
    accuracy: float
    macro_recall: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {"classes": list(self.classes), "recall": list(self.recall)}
        return {**asdict(self), **lists, "confusion": [list(row) for row in self.confusion]}


def predict(
    model: nn.Module,
    split: Split | Examples | DataLoader[Any],
    *,
    batch_size: int = 512,
    workers: int = 0,
) -> Tensor:
    """The class that `model` gives to each example of `split`, int64 `[n]`, on the CPU.

    `split` may also be any map-style data set of (image, label), which `workers` processes read
    ahead, or a `DataLoader` that keeps the order of its data set.

    Guarantee: the model predicts in evaluation mode and without gradients, on the device where it
    is; afterwards every module is in the mode that it was in, whatever happened.

    Raises:
        ModelError: The model does not return finite logits `[n, classes]`.
        DataError: An example cannot be read or is no (image, label); a loader shuffles or drops.

    Example:
        >>> from secure_cnn.data import load_data
        >>> from secure_cnn.models import build_model
        >>> data = load_data("digits")
        >>> predict(build_model("compact", data.spec), data.test).shape
        torch.Size([359])
    """
    return _logits(model, in_order(split, batch_size=batch_size, workers=workers))[0].argmax(1)


def evaluate_model(
    model: nn.Module,
    split: Split | Examples | DataLoader[Any],
    classes: Sequence[str],
    *,
    batch_size: int = 512,
    workers: int = 0,
) -> ClassificationReport:
    """Predict every example of `split` as `predict` does, and report on it, with the mean loss.

    Raises:
        ModelError: The model does not return one finite logit for each of the `classes`.
        DataError: As `predict`; or a label is of none of the `classes`.

    Example:
        >>> from secure_cnn.data import load_data
        >>> from secure_cnn.models import build_model
        >>> data = load_data("digits")
        >>> evaluate_model(build_model("compact", data.spec), data.test, data.spec.classes).count
        359
    """
    logits, labels = _logits(model, in_order(split, batch_size=batch_size, workers=workers))
    if logits.shape[1] != len(classes):
        raise ModelError(
            f"expected {len(classes)} logits, one for each class, got {logits.shape[1]}; "
            "is it a model for other data?"
        )
    # Before the loss, which a label of no class would break.
    report = classification_report(labels, logits.argmax(1), classes)
    return replace(report, loss=float(F.cross_entropy(logits.double(), labels)))


def batch_for(model: nn.Module, split: Split) -> int:
    """How many images to take at once: 256, fewer where a pass over them would take long.

    From the multiplications of a pass, not from a clock, so that it is the same on every machine:
    what is saved after each batch of an evaluation is then saved every few minutes.

    Example:
        >>> from secure_cnn.data import load_data
        >>> from secure_cnn.models import build_model
        >>> data = load_data("digits")
        >>> batch_for(build_model("compact", data.spec), data.test)
        256
    """
    # Two, since a normalisation of one value only is refused.
    images, _ = split.batch(torch.arange(min(2, len(split))))
    device = next((weight.device for weight in model.parameters()), images.device)
    with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(images.to(device))
    operations = max(1, int(counted.get_total_flops()) // len(images))
    return max(1, min(_BATCH, _OPERATIONS // operations))


def classification_report(
    labels: Tensor, predictions: Tensor, classes: Sequence[str], *, loss: float | None = None
) -> ClassificationReport:
    """Compares predictions with labels, both int64 [n], at least one."""
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise DataError(
            "expected as many predictions as labels, at least one, "
            f"got {list(predictions.shape)} and {list(labels.shape)}"
        )
    truth, found = labels.cpu().numpy(), predictions.cpu().numpy()
    for name, values in (("labels", truth), ("predictions", found)):
        if not 0 <= values.min() <= values.max() < len(classes):
            raise DataError(
                f"{name}: expected 0..{len(classes) - 1}, got {values.min()}..{values.max()}"
            )
    numbers = list(range(len(classes)))
    recall = metrics.recall_score(truth, found, labels=numbers, average=None, zero_division=np.nan)
    return ClassificationReport(
        classes=tuple(classes),
        count=len(truth),
        accuracy=float((truth == found).mean()),
        macro_recall=float(np.nanmean(recall)),
        recall=tuple(None if np.isnan(each) else float(each) for each in recall),
        confusion=tuple(
            tuple(map(int, row)) for row in metrics.confusion_matrix(truth, found, labels=numbers)
        ),
        loss=loss,
    )


def _logits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The logits of every example, `[n, classes]`, and the labels, `[n]`, on the CPU."""
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    found, truth = [], []
    with _evaluating(model), torch.no_grad():
        for images, labels in batches:
            on_device = images.to(device, non_blocking=True)
            found.append(_checked(model(on_device), len(images)).cpu())
            truth.append(labels.cpu())
    if not found:
        raise DataError("split: expected at least one example, got none")
    return torch.cat(found), torch.cat(truth)


def _checked(logits: Tensor, count: int) -> Tensor:
    """Finite logits `[count, classes]`, or an error."""
    if logits.ndim != 2 or len(logits) != count:
        raise ModelError(
            f"expected logits [{count}, classes], got {list(logits.shape)}; "
            "the model must return one row for each image"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            "expected finite logits, got NaN or infinity; the training has diverged: "
            "lower the learning rate, or go back to an earlier checkpoint"
        )
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each module is put back by itself, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
