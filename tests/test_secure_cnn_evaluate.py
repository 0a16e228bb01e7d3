"""`secure_cnn.evaluate`: reports equal a slow count, and the model comes back as it was."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from secure_cnn.data import Split
from secure_cnn.errors import DataError, ModelError
from secure_cnn.evaluate import classification_report, evaluate_model, predict

CLASSES = ("a", "b", "c")


class FirstPixels(nn.Module):
    """Its logits are the first three pixels; it also has parts of its own mode."""

    def __init__(self, replace=None):
        super().__init__()
        self.frozen = nn.BatchNorm2d(1).eval()
        self.active = nn.Dropout(0.5)
        self.replace = replace
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, self.active.training, torch.is_grad_enabled()))
        logits = self.active(images[:, 0, 0, :3])
        return logits if self.replace is None else self.replace(logits)


def split(count=10):
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images=images, labels=torch.randint(3, (count,), generator=generator))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_report_equals_a_slow_count(pairs):
    """Every figure against counting by hand, with absent classes and classes never predicted."""
    labels, predictions = (torch.tensor(column) for column in zip(*pairs, strict=True))
    report = classification_report(labels, predictions, ("a", "b", "c", "d"))
    assert report.confusion == tuple(
        tuple(pairs.count((truth, found)) for found in range(4)) for truth in range(4)
    )
    recall = []
    for truth in range(4):
        members = [found for label, found in pairs if label == truth]
        recall.append(members.count(truth) / len(members) if members else None)
    assert report.recall == pytest.approx(recall)
    present = [each for each in recall if each is not None]
    assert report.macro_recall == pytest.approx(sum(present) / len(present))
    assert report.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert report.count == len(pairs)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 512])
def test_predictions_do_not_depend_on_the_batch_size(batch_size):
    """Each prediction is the largest logit of its own image."""
    data = split()
    want = data.images[:, 0, 0, :3].float().argmax(1)
    assert torch.equal(predict(FirstPixels(), data, batch_size=batch_size), want)


@pytest.mark.parametrize("batch_size", [4, 512])
def test_evaluation_carries_the_mean_loss(batch_size):
    """The loss is that of all examples, also when the last batch is smaller."""
    data = split()
    report = evaluate_model(FirstPixels(), data, CLASSES, batch_size=batch_size)
    want = F.cross_entropy(data.images[:, 0, 0, :3] / 255, data.labels)
    assert report.loss == pytest.approx(float(want), rel=1e-6)
    assert report.classes == CLASSES


@pytest.mark.parametrize("replace", [None, lambda logits: logits * float("nan")])
def test_every_module_gets_its_own_mode_back(replace):
    """Evaluation mode without gradients inside; a frozen part stays frozen, after an error too."""
    model = FirstPixels(replace)
    try:
        predict(model, split())
    except ModelError as error:
        held = error  # while the error is alive, so are its frames: modes must be back already
    else:
        held = None
    assert (held is None) == (replace is None)
    assert set(model.seen) == {(False, False, False)}
    assert (model.training, model.active.training, model.frozen.training) == (True, True, False)


@pytest.mark.parametrize(
    ("replace", "match"),
    [
        (lambda logits: logits * float("nan"), "finite"),
        (lambda logits: logits / 0, "finite"),
        (lambda logits: logits[:, 0], "one row"),
        (lambda logits: logits[:1], "one row"),
        (lambda logits: logits[:, :2], "3 logits"),
    ],
)
def test_logits_that_are_none_are_refused(replace, match):
    """NaN, infinity and other shapes are errors of the model."""
    with pytest.raises(ModelError, match=match):
        evaluate_model(FirstPixels(replace), split(), CLASSES)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([], []), ([0, 1], [0]), ([0, 3], [0, 1]), ([0, 1], [0, 3]), ([-1], [0]), ([[0]], [[0]])],
)
def test_labels_that_do_not_fit_are_refused(labels, predictions):
    """No examples, other lengths, and values that are no class."""
    with pytest.raises(DataError, match="expected"):
        classification_report(
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(predictions, dtype=torch.int64),
            CLASSES,
        )


def test_nothing_to_evaluate_is_an_error():
    """No examples, and batches of none."""
    with pytest.raises(DataError, match="at least one example"):
        predict(FirstPixels(), split(0))
    with pytest.raises(DataError, match="batch_size"):
        predict(FirstPixels(), split(), batch_size=0)
