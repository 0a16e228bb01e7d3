"""A last layer by least squares, on features that formulas give: from it people leave exactly.

What stands before the last layer of these networks never saw an image of the data. So the training
is a sum over images, `privacy.unlearning.RidgeHead`, from which those of people who leave are
subtracted. Features are computed in float64: rounded to the grid of the head they are then the same
whatever other images are in the batch.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from privacy.unlearning import RidgeHead
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.models import Architecture
from secure_cnn.recipe.seams import make_device
from secure_cnn.recipe.settings import Recipe

__all__ = ["bound_of", "check_ridge", "features_of", "head_of", "ridge_head", "with_head"]

_ROWS = 256
"""Images at a time."""
_MOST_WIDTH = 1 << 14
"""Features of an image: the sums, and the copies that solving them takes, are then 6 GiB."""
_MOST_IMAGES = 1 << 19
_BOUNDS = {"nonexpansive": 1.0, "scattering": 1.0, "handcrafted": 7.1}
"""A magnitude that no feature exceeds by its formula; known before any image is."""


def check_ridge(recipe: Recipe, data: ImageData) -> None:
    """Refuses images whose sums would not be exact, would not fit the memory, or lack a class.

    Raises:
        RunError: There are too many images or features, or a class without training images.
    """
    width = head_of(Architecture.for_data(recipe.model, data.spec).blank()).in_features
    if width > _MOST_WIDTH:
        raise RunError(
            f"head=ridge: expected at most {_MOST_WIDTH} features of an image, whose sums fit the "
            f"memory, got {width} of {recipe.model}; take nonexpansive, or smaller images"
        )
    if len(data.train) > _MOST_IMAGES:
        raise RunError(
            f"head=ridge: expected at most {_MOST_IMAGES} training images, whose sums are exact, "
            f"got {len(data.train)}"
        )
    counts = torch.bincount(data.train.labels, minlength=len(data.spec.classes)).tolist()
    missing = [name for name, count in zip(data.spec.classes, counts, strict=True) if not count]
    if missing:
        raise RunError(
            f"head=ridge: expected training images of each class, got none of {missing[0]}"
        )


def ridge_head(
    recipe: Recipe,
    model: nn.Module,
    data: ImageData,
    *,
    stop: StopRequest,
    advance: Callable[[int], object],
) -> RidgeHead:
    """The last layer that the training images come to, on the features of what stands before it.

    Args:
        recipe: With the model and the penalty that it came to, see `Recipe.on`.
        model: The network; only what stands before its last layer is used.
        data: The images.
        stop: Looked at before each block of images.
        advance: Told how many images are done.

    Raises:
        Stopped: A stop was requested.
        UnlearningError: The penalty is too small to be told beside the features.
    """
    assert recipe.penalty is not None, "a recipe that is on its data"

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        front = _front_of(model).to(_device_of(recipe))
        for start in range(0, len(data.train), _ROWS):
            stop_here(stop)
            advance(start)
            rows = torch.arange(start, min(start + _ROWS, len(data.train)))
            yield _through(front, data.train, rows)

    return RidgeHead.of_blocks(
        blocks(),
        classes=len(data.spec.classes),
        bound=bound_of(recipe.model),
        penalty=recipe.penalty,
    )


def bound_of(model: str) -> float:
    """A magnitude that no feature of a network exceeds, by its formulas."""
    return _BOUNDS[model]


def features_of(recipe: Recipe, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """The features of a few images, float64 `[n, width]`, and their labels, as the head got them.

    Raises:
        RunError: The device is none that this machine has.
    """
    front = _front_of(model).to(_device_of(recipe))
    parts = torch.split(torch.arange(len(split)), _ROWS)
    features, labels = zip(*(_through(front, split, part) for part in parts), strict=True)
    return torch.cat(features), torch.cat(labels)


def with_head(model: nn.Module, head: RidgeHead) -> nn.Module:
    """A copy of a network with this head as its last layer, in evaluation mode."""
    model = copy.deepcopy(model).cpu().eval()
    layer, weights = head_of(model), torch.from_numpy(head.weights)
    with torch.no_grad():
        layer.weight.copy_(weights[:-1].T)
        layer.bias.copy_(weights[-1])
    return model


def head_of(model: nn.Module) -> nn.Linear:
    """The last layer of a network of these."""
    assert isinstance(model, nn.Sequential), "these networks are sequences"
    layer = model[-1]
    assert isinstance(layer, nn.Linear), "they end in one linear layer"
    return layer


def _front_of(model: nn.Module) -> nn.Module:
    """What stands before the last layer, a copy that computes in float64."""
    assert isinstance(model, nn.Sequential), "these networks are sequences"
    return copy.deepcopy(model[:-1]).double().eval()


def _device_of(recipe: Recipe) -> torch.device:
    """The recipe's, where that has float64."""
    device = make_device(recipe)
    return device if device.type == "cuda" else torch.device("cpu")


def _through(front: nn.Module, split: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = split.batch(rows)
    device = next(front.buffers()).device
    with torch.no_grad():
        features: Tensor = front(images.to(device).double())
    return features.cpu(), labels
