"""Images with what the attacks made of them, as tensors and as a file."""

import os
from dataclasses import dataclass
from typing import final

from safetensors.torch import save as safetensors
from torch import Tensor

from defenses.evaluation.writing import write_bytes

__all__ = ["AdversarialExamples"]


@final
@dataclass(frozen=True, kw_only=True)
class AdversarialExamples:
    """Images with what the attacks made of them.

    Attributes:
        indices: Which images of the data set, int64, [k].
        clean: Images, floating point in the threat model's bounds, [k, channels, height, width].
        adversarial: For each the one that fooled the model, or the last that did not.
        labels: True classes, int64, [k].
        predictions: What the model sees in the adversarial images, int64, [k].

    Example:
        >>> AdversarialExamples.__dataclass_fields__.keys()
        dict_keys(['indices', 'clean', 'adversarial', 'labels', 'predictions'])
    """

    indices: Tensor
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    predictions: Tensor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as one safetensors file, whole or not at all; tensors named as here.

        Raises:
            EvaluationError: There is something else than a regular file.
            OSError: The folder cannot be written to; a file already there is left as it was.
        """
        names = ("indices", "clean", "adversarial", "labels", "predictions")
        kept = {name: getattr(self, name).detach().cpu().clone().contiguous() for name in names}
        write_bytes(path, safetensors(kept))
