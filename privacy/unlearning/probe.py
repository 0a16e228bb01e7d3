"""A linear probe: do a model's features still tell a class that its last layer no longer names?

A model may hide a class by its last layer alone, and answer as an oracle does on every image; who
has its weights reads the class from the layer before. Oracles' features tell it in part too, by
what all images have in common, so that the probe of a model stands beside those of oracles.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from privacy.errors import UnlearningError
from privacy.statistics import Numbers, roc_area
from privacy.unlearning import rows
from privacy.unlearning.examples import Examples
from privacy.unlearning.models import Answers, Model, checked_models
from privacy.unlearning.oracle import Difference

__all__ = ["features_before_last", "linear_probe", "probe_gap"]

_RIDGE = 1e-3
"""Of the mean square of a feature, added to each."""


def features_before_last(model: nn.Module) -> Model:
    """A function that gives what a model's last linear layer is given, for images.

    It asks the model as it is, in evaluation mode while it is probed.

    Raises:
        UnlearningError: The model is no module with a linear layer; of others pass a function.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> features_before_last(net)(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    layers = [each for each in _modules(model) if isinstance(each, nn.Linear)]
    if not layers:
        raise UnlearningError(
            "model: expected a module whose last layer is linear, got none; give a function that "
            "gives the features of images"
        )
    return _Features(model, layers[-1])


class _Features(nn.Module):
    """A module, so that who asks it puts it into evaluation mode and back."""

    def __init__(self, model: nn.Module, layer: nn.Linear) -> None:
        super().__init__()
        self.model, self._layer = model, [layer]

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self._layer[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self.model(images)
        finally:
            handle.remove()
        if not seen:
            raise UnlearningError(
                "model: expected its last linear layer to be used, got a pass without it; give a "
                "function that gives the features of images"
            )
        return seen[-1]


def linear_probe(features: Model, *, fitted: Any, asked: Any, forgotten: int) -> float:
    """How well a linear function of features tells one class from all others, in [0, 1].

    A least-squares fit, both sides weighted alike, on `fitted`; the area under its curve on
    `asked`: 1/2 tells nothing, and it does not depend on how frequent the class is.

    Args:
        features: A module or function that gives a row of numbers for each image.
        fitted: Examples on which the probe is fitted, some of the class and some others.
        asked: Others, on which it is judged, of both sides too.
        forgotten: The class.

    Raises:
        UnlearningError: Features are no finite rows, or a side has nobody.

    Example:
        >>> import torch
        >>> part = [(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 0, 1]))]
        >>> linear_probe(lambda images: images, fitted=part, asked=part, forgotten=1)
        1.0
    """
    known, others = Examples.of("fitted", fitted), Examples.of("asked", asked)
    sides = [_sides(part, forgotten) for part in (known, others)]
    given, looked = Answers(features).rows(known), Answers(features).rows(others)
    middle = given.mean(0)
    scores = (looked - middle) @ _weights(given - middle, sides[0])
    return roc_area(scores[sides[1]], scores[~sides[1]])


def probe_gap(
    unlearned: Model,
    oracles: Sequence[Model],
    *,
    fitted: Any,
    asked: Any,
    forgotten: int,
    margin: float,
) -> Difference:
    """The probe of a model that forgot a class beside those of oracles; in points of area.

    Above zero the features tell more of the class than those of models that never saw it.

    Args:
        unlearned: Its features, a function as `features_before_last` gives.
        oracles: Those of at least 2 oracles.
        fitted: As for `linear_probe`.
        asked: As for `linear_probe`.
        forgotten: The class.
        margin: Points of area that do not matter, > 0.

    Raises:
        UnlearningError: An argument is not as said.
    """
    models = checked_models(oracles, least=2)
    rows.positive("margin", margin)
    known, others = Examples.of("fitted", fitted), Examples.of("asked", asked)
    found = [
        linear_probe(each, fitted=known, asked=others, forgotten=forgotten)
        for each in (unlearned, *models)
    ]
    return Difference(
        unlearned=found[0], oracles=tuple(found[1:]), examples=len(others), margin=float(margin)
    )


def _weights(features: Numbers, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Numbers:
    """Of the least-squares fit of +1 and -1, each side as heavy as the other."""
    heavy = np.where(chosen, 0.5 / chosen.sum(), 0.5 / (~chosen).sum())
    scale = np.sqrt(np.square(features).mean(0))
    scaled = features / np.where(scale > 0, scale, 1.0)
    weighted = scaled * heavy[:, None]
    centre = weighted.sum(0)
    gram = weighted.T @ scaled - np.outer(centre, centre) + _RIDGE * np.eye(len(centre))
    target = weighted.T @ np.where(chosen, 1.0, -1.0)  # its weighted mean is zero
    found: Numbers = np.linalg.solve(gram, target) / np.where(scale > 0, scale, 1.0)
    return found


def _sides(examples: Examples, forgotten: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    chosen = examples.labels().numpy() == rows.whole("forgotten", forgotten, least=0)
    if not 0 < chosen.sum() < len(chosen):
        raise UnlearningError(
            f"{examples.name}: expected some of class {forgotten} and some others, got "
            f"{chosen.sum()} of {len(chosen)}"
        )
    found: np.ndarray[Any, np.dtype[np.bool_]] = chosen
    return found


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []
