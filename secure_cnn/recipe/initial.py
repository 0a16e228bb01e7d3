"""The model at the first step of every training of a run: drawn, loaded, and partly frozen."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secure_cnn.checkpoint import Unlocking
from secure_cnn.data import ImageData
from secure_cnn.engine import training_mode
from secure_cnn.errors import ModelError
from secure_cnn.models import Architecture
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.recipe.settings import Recipe
from secure_cnn.record import ModelRecord
from secure_cnn.weights import StartReport, Weights, freeze, read_weights, start_from

__all__ = ["InitialModel", "initial_model"]

_TRIED = 8
"""Images on which it is tried whether weights give finite losses."""
_UNCOVERED = (
    "ε does not cover the weights that it starts from: the images they were trained on count as "
    "public. Weights that were trained on these private images, or on most of them, would make ε "
    "wrong."
)


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """How every training of a run begins; `weights` are those to start from, if any."""

    recipe: Recipe
    architecture: Architecture
    network: OwnNetwork | None
    weights: Weights | None

    def build(self) -> nn.Module:
        """The model, new, on the CPU, in the mode in which it is trained."""
        return self._begun()[0]

    @property
    def digest(self) -> str:
        """SHA-256 of the file of weights; empty where there is none."""
        return "" if self.weights is None else self.weights.digest

    @property
    def claims(self) -> dict[str, Any]:
        """What the finished model's file says of its beginning."""
        report, claims = self._told[0], {}
        if report is not None:
            said = {"file": report.file, "sha256": report.digest, "matched": len(report.matched)}
            claims["weights"] = said
        if self.record.source:
            claims["network"] = {"source": self.record.source}
        return claims

    @cached_property
    def record(self) -> ModelRecord:
        """The model as the run's record has it."""
        model = self.build()
        shapes = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
        own = self.network is not None
        return ModelRecord(
            name=self.recipe.model,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=self.digest,
            source=self.network.source if self.network is not None else "",
            structure=hashlib.sha256(json.dumps(shapes).encode()).hexdigest() if own else "",
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the record says of it, in sentences."""
        report, frozen = self._told
        notes: tuple[str, ...] = () if report is None else (report.words,)
        if report is not None and self.recipe.epsilon is not None:
            notes += (_UNCOVERED,)
        if frozen:
            drawn = " They stay as they were drawn." if report is None else ""
            notes += (f"Frozen are {len(frozen)} tensors: {', '.join(_few(frozen))}.{drawn}",)
        return notes

    @cached_property
    def _told(self) -> tuple[StartReport | None, tuple[str, ...]]:
        return self._begun()[1:]

    def _begun(self) -> tuple[nn.Module, StartReport | None, tuple[str, ...]]:
        """The model, what of it was in the file, and the names of what is frozen."""
        recipe = self.recipe
        model = self.architecture.build(generator_seed=recipe.seed, network=self.network)
        report = None if self.weights is None else start_from(model, self.weights)
        frozen = freeze(model, train_only=recipe.train_only, freeze=recipe.freeze)
        drawn = [] if report is None else [n for n in frozen if n not in report.matched]
        if drawn and report is not None:
            raise ModelError(
                f"freeze: expected what is frozen among the weights of {report.file}, got "
                f"{', '.join(_few(drawn))} too, which {'is' if len(drawn) == 1 else 'are'} not in "
                "it in this shape, and would stay as drawn; train these, or leave --weights out"
            )
        training_mode(model)
        return model, report, frozen


def initial_model(
    recipe: Recipe, data: ImageData, network: OwnNetwork | None, unlocking: Unlocking | None
) -> InitialModel:
    """The beginning that a recipe asks for; its weights are read here, once.

    Raises:
        ModelError: There is no such model, or weights and patterns do not fit it, or no loss is
            finite with them; or a private training would start from weights that say they were
            trained on its data: what those know of it is not in its epsilon, whether they were
            trained privately or not.
        ArchiveError: The weights cannot be read or opened.
    """
    path = recipe.weights
    weights = None if path is None else read_weights(Path(path), unlocking=unlocking)
    if weights is not None and recipe.epsilon is not None and _is_of(weights, data):
        how = "by a private run of its own" if weights.key else "without privacy"
        raise ModelError(
            f"weights: {path} was trained on {data.name}, these very images, {how}: "
            "epsilon would not cover what it knows of them; start from weights of other images"
        )
    initial = InitialModel(
        recipe=recipe,
        architecture=Architecture.for_data(recipe.model, data.spec, options=recipe.model_options),
        network=network,
        weights=weights,
    )
    if weights is not None:
        _check_answers(initial, weights.file, data)
    return initial


def _check_answers(initial: InitialModel, file: str, data: ImageData) -> None:
    """Refuses weights so large that no loss is finite: the training would end at its first step."""
    # Test images: whether a run begins is not to depend on a private one.
    images, labels = data.test.batch(torch.arange(min(_TRIED, len(data.test))))
    with torch.no_grad():
        losses = F.cross_entropy(initial.build().eval()(images), labels, reduction="none")
    if not bool(losses.isfinite().any()):
        raise ModelError(
            f"weights: expected weights with which losses are finite, got none from those in "
            f"{file}; that training had diverged, take an earlier state of it"
        )


def _is_of(weights: Weights, data: ImageData) -> bool:
    """Whether weights say that they were trained on these very images, or on another split.

    Or with other images to test on. Where training images were added or left out it is not known.
    """
    told = set(weights.trained_on)
    found = {data.fingerprint, data.pool_fingerprint, data.train_fingerprint} if told else set()
    if weights.key and any(claimed.startswith(KEYED) for claimed in told):
        found |= {keyed_fingerprint(each, weights.key) for each in found}
    return not told.isdisjoint(found)


def _few(names: tuple[str, ...] | list[str]) -> list[str]:
    more = len(names) - 6
    return [*names[:6], f"and {more} more"] if more > 0 else [*names]
