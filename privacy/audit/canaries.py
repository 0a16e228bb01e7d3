"""Canaries: rows of the training data whose gradient the auditor knows, and makes large.

A canary's loss is the auditor's own: its logits along a fixed direction, scaled so that the
gradient is many times the clipping norm. Gradients are computed here by plain `torch.func` on a
plain copy of the model: with no code of the private step, so that a defect there cannot hide
itself.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import get_worker_info

from privacy.batch import images_of
from privacy.errors import PlanError, StepError
from privacy.sampling import MapStyle, PhysicalBatch, read

__all__ = ["Canaries", "CanaryDataset", "Diverged", "PlainGradients", "orthonormal"]

_CHUNK = 2**24
"""Numbers of per-example gradients held at a time."""


class Diverged(StepError):
    """A canary has no gradient to look at, or one that is not finite."""


@final
class CanaryDataset:
    """Some examples of a data set, those at `indices`, int64 [n]; the last are the canaries.

    Where persons are the unit `sizes` says how many adjacent rows each has: the last persons are
    the canaries, with all of their rows, and `groups` names the person of each row by its number.

    A class because what was read last is how the auditor learns the secret coins.
    """

    batch_by_indices: ClassVar[bool] = True

    def __init__(
        self, dataset: MapStyle, indices: Tensor, *, canaries: int, sizes: Tensor | None = None
    ) -> None:
        self._dataset, self._indices = dataset, indices
        self._sizes = torch.ones_like(indices) if sizes is None else sizes
        self._owners = torch.arange(len(self._sizes)).repeat_interleave(self._sizes)
        self.groups = None if sizes is None else self._owners.tolist()
        self._first = len(self._sizes) - canaries
        self._read: list[int] = []
        self._given: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        _check_here()
        self._read.append(index)
        pair = self._dataset[int(self._indices[index])]
        if isinstance(pair, (tuple, list)) and pair and isinstance(pair[0], Tensor):
            self._given.setdefault(_digest(pair[0]), set()).add(index)
        return pair

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of several rows."""
        _check_here()
        self._read += indices.tolist()
        images, labels = _rows(self._dataset, self._indices[indices])
        for index, image in zip(indices.tolist(), images, strict=True):
            self._given.setdefault(_digest(image), set()).add(index)
        return images, labels

    def canary_images(self) -> Tensor:
        """An image of each canary, as they are before any augmentation or attack."""
        firsts = (self._sizes.cumsum(0) - self._sizes)[self._first :]
        return _rows(self._dataset, self._indices[firsts])[0]

    @property
    def units(self) -> int:
        """How many examples, or persons, it has."""
        return len(self._sizes)

    def owners(self, rows: Tensor) -> Tensor:
        """Of each row the number of its person, or its own; int64 [k]."""
        return self._owners[rows]

    def counted(self, rows: Tensor) -> Tensor:
        """How often each unit is in a batch of these rows, float [units]; of a person once."""
        found = self._owners[rows].bincount(minlength=self.units).float()
        return found if self.groups is None else found.clamp(max=1)

    def read(self) -> Tensor:
        """The rows that were read since the last call, in order; int64 [k]."""
        read, self._read = torch.tensor(self._read, dtype=torch.int64), []
        return read

    def strangers(self, images: Tensor, rows: Tensor) -> tuple[int, int]:
        """Of a batch: how many images were given for other rows alone, and how many for none."""
        here = set(rows.tolist())
        owners = [self._given.get(_digest(image)) for image in images]
        unknown = sum(each is None for each in owners)
        return sum(each is not None and not each & here for each in owners), unknown

    def numbers(self, rows: Tensor) -> Tensor:
        """For each row its canary's number, or -1; int64 [k]."""
        return (self._owners[rows] - self._first).clamp(min=-1)


@final
class PlainGradients:
    """Per-example gradients of a plain copy of a model, at the model's present parameters.

    A class because it owns the copy, made before anybody's hooks are on the model. A model that
    draws random numbers is refused: a copy of it gives other gradients. `shapes` are those of the
    parameters in the order of a gradient, and `rows_at_once` fit into memory together.
    """

    def __init__(self, model: nn.Module) -> None:
        random = [n for n, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if random:
            raise StepError(
                f"{', '.join(random)}: a network that draws random numbers cannot be audited, its "
                "gradients are not known; set p=0 for the audit"
            )
        self._model = model
        # In eval mode: in a private model that changes nothing, and elsewhere it is the oracle of
        # examples that do not mix.
        self._plain = copy.deepcopy(model).eval()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = list(trainable)
        self.shapes = [parameter.shape for parameter in trainable.values()]
        self.rows_at_once = max(1, _CHUNK // sum(p.numel() for p in trainable.values()))

    def __call__(self, images: Tensor, output_gradients: Tensor) -> Tensor:
        """One gradient a row, all parameters one after the other: float [rows, d]."""
        current = dict(self._model.named_parameters())
        parameters = {name: current[name].detach() for name in self._names}

        def of_example(image: Tensor, output_gradient: Tensor) -> Tensor:
            def run(current: Mapping[str, Tensor]) -> Tensor:
                output: Tensor = torch.func.functional_call(
                    self._plain, dict(current), (image.unsqueeze(0),)
                )
                return output.squeeze(0)

            (found,) = torch.func.vjp(run, parameters)[1](output_gradient)
            return torch.cat([found[name].flatten() for name in self._names])

        mapped = torch.func.vmap(of_example, chunk_size=self.rows_at_once)
        gradients: Tensor = mapped(images, output_gradients)
        return gradients

    def flattened(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The model's own gradients by name in the same order, float [d]."""
        return torch.cat([gradients[name].flatten() for name in self._names])


@final
class Canaries:
    """The canaries at the model's present parameters; a class because both change at each step.

    Each one's own gradient has `oversize` [k] times the clipping norm, and its loss is <its output,
    its weights>, [k, outputs]. `clipped` are their gradients after clipping, in clipping norms:
    unit vectors [k, d]; `directions` the orthonormal vectors nearest to them, which do not depend
    on which canaries are in.
    """

    def __init__(
        self, images: Tensor, *, outputs: int, oversize: Tensor, generator: torch.Generator
    ) -> None:
        self.images, self.oversize = images, oversize.to(images.device)
        self._logits = _orthonormal_blocks(len(images), outputs, generator).to(images.device)
        self.weights = self._logits
        self.clipped = self.directions = torch.empty(0)

    def aim(self, gradients: PlainGradients, *, max_grad_norm: float) -> None:
        """Scales the losses anew and turns the directions, at the present parameters.

        Refused as `Diverged` is a canary without a finite gradient above zero: nothing is seen of
        it.
        """
        raw = gradients(self.images, self._logits)
        norms = raw.norm(dim=1, keepdim=True)
        if not bool((norms.isfinite() & (norms > 0)).all()):
            raise Diverged(
                "canaries: expected a finite gradient above zero of each, got norms "
                f"{sorted(norms.flatten().tolist())[:3]}...; the model's outputs do not depend on "
                "its parameters, or it has diverged"
            )
        self.weights = self._logits * (self.oversize[:, None] * max_grad_norm / norms)
        self.clipped = raw / norms
        self.directions = orthonormal(self.clipped)


def orthonormal(rows: Tensor) -> Tensor:
    """The unit vectors nearest to unit `rows` [k, d] and orthogonal to each other (Löwdin 1950).

    Gaussian noise has independent components along them.
    """
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    # Directions that (nearly) depend on each other cannot be separated: they stay correlated, but
    # each keeps length one and with it the noise's own deviation.
    inverse_root = (vectors * values.clamp(min=1e-3).rsqrt()) @ vectors.T
    return nn.functional.normalize(inverse_root.to(rows.dtype) @ rows, dim=1)


def _orthonormal_blocks(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors [count, width], orthogonal within every `width` in turn."""
    blocks = [
        torch.linalg.qr(torch.randn(width, min(width, count), generator=generator))[0].T
        for _ in range(-(-count // width))
    ]
    return torch.cat(blocks)[:count]


def _rows(dataset: MapStyle, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels at `indices`, none of them filling; an empty sample has its shape too."""
    examples = read(dataset, PhysicalBatch(indices, rows=len(indices), last=True))
    labels = examples[1] if images_of(examples) is not None else None
    if not isinstance(labels, Tensor):
        raise PlanError(
            "dataset: an audit expects pairs (image, label) of tensors or numbers, got examples of "
            f"type {type(examples).__name__}; audit the training with a data set of such pairs"
        )
    return examples[0], labels


def _check_here() -> None:
    """Refuses to be read where the auditor does not see it."""
    if get_worker_info() is not None:
        raise PlanError(
            "make_training: an audit learns the coins from what is read in its own process; let it "
            "attach with workers=0 (of a DataLoader: num_workers=0) for the audit"
        )


def _digest(image: Tensor) -> int:
    """A number that no other image has, but by a chance of 2**-64."""
    return hash(image.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
