"""Shadow models: trained by the target's own recipe, on images that are known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn

from privacy.leakage.shadows import Indices
from secure_cnn.data import ImageData, Split
from secure_cnn.interruption import StopRequest
from secure_cnn.leakage.target import Target
from secure_cnn.recipe.once import train_once

__all__ = ["ShadowTraining"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShadowTraining:
    """Trains others as the target was trained: a `privacy.leakage.Train`.

    Guarantee: the same seams, schedule, average and guard as in the run; of a private recipe the
    same plan, with noise and samples of its own. Nothing is written.

    Attributes:
        target: Whose recipe it is.
        stop: Looked at after every step.
        advance: Told after every step, with the share of this training that is done.
    """

    target: Target
    stop: StopRequest
    advance: Callable[[float], None]

    def __call__(self, indices: Indices, /, *, seed: int) -> nn.Module:
        """A finished model, in evaluation mode.

        Raises:
            Stopped: A stop was requested.
        """
        recipe = replace(self.target.recipe, seed=seed)
        initial = replace(self.target.initial, recipe=recipe)
        data = self._data(indices)
        return train_once(recipe, initial, data, stop=self.stop, advance=self.advance)

    def _data(self, indices: Indices) -> ImageData:
        chosen = torch.from_numpy(indices)
        everybody, data = self.target.everybody, self.target.data
        # Of the test images only the front of a network looks at how many there are.
        return ImageData(
            name=data.name,
            train=Split(images=everybody.images[chosen], labels=everybody.labels[chosen]),
            test=data.test.first(1),
            spec=data.spec,
        )
