"""Images from the gradient that a client shares: how many are told, under which protection.

A client of the first round has a model's first weights, a few images, and shares one gradient.
Whoever receives it finds labels by the last bias, and images by `privacy.leakage.invert`. An image
counts as identified if, of many of the same data set, it is the nearest to what was found.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from privacy.leakage import (
    Inversion,
    input_of_linear,
    invert,
    labels_of,
    similarity,
)
from privacy.statistics import clopper_pearson
from secure_cnn.data import Split
from secure_cnn.errors import ModelError, RunError
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.leakage import arguments
from secure_cnn.leakage.sharing import Gradient, Protection, Sharing
from secure_cnn.progress import part_progress
from secure_cnn.record import InversionRecord

__all__ = ["InversionSettings", "Picture", "measure_inversion"]

_ERROR = 0.025
"""Of each end of an interval."""
_BATCH = 250
_EXACT = 100.0
"""Decibels, at which nobody sees a difference any more."""
_OTHER_LABEL = 1e6
"""A distance that no two images have."""

_Space = Callable[[Tensor], Tensor]
"""Where images are compared: `[n, c, height, width]` to `[n, values]`."""


@final
@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """How inversion is measured.

    Attributes:
        protections: What clients share, one after the other, of the same images.
        batches: Images of a gradient.
        repeats: Gradients of each size and protection, at least.
        images: Images of each size and protection, about: of few in a gradient more are inverted.
        candidates: Images among which the right one is looked for, those that gradients are made
            of among them; a data set of fewer gives all.
        inversion: How images are searched for.
        seed: Chooses images and draws noise.

    Raises:
        RunError: A number is out of range.
    """

    protections: tuple[Sharing, ...] = (
        Sharing(),
        Sharing(max_grad_norm=1.0),
        Sharing(max_grad_norm=1.0, noise_multiplier=1.0),
    )
    batches: tuple[int, ...] = (1, 4, 8)
    repeats: int = 2
    images: int = 16
    candidates: int = 1000
    inversion: Inversion = Inversion()  # noqa: RUF009  # it is frozen
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.tuple_of("protections", self.protections, Sharing)
        for size in arguments.tuple_of("batches", self.batches, object):
            arguments.whole("batches", size, least=1)
        for name, least in (("repeats", 1), ("images", 1), ("candidates", 2), ("seed", 0)):
            arguments.whole(name, getattr(self, name), least=least)
        arguments.instance("inversion", self.inversion, Inversion)

    @property
    def gradients(self) -> int:
        """How many are inverted."""
        return len(self.protections) * sum(self.of(batch) for batch in self.batches)

    def of(self, batch: int) -> int:
        """How many of so many images each, under each protection."""
        return max(self.repeats, self.images // batch)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """The first batch of a row: originals and, for each, what was found of it.

    Both are floats in [0, 1], `[batch, channels, height, width]`, in the same order.
    """

    protection: Protection
    batch: int
    originals: Tensor
    found: Tensor


@final
@dataclass(frozen=True)
class _Found:
    """Of one gradient: who was identified, how alike they are, and both."""

    identified: int
    psnr: list[float]
    ssim: list[float]
    originals: Tensor
    images: Tensor


def measure_inversion(
    model: nn.Module, images: Split, settings: InversionSettings, *, stop: StopRequest
) -> tuple[tuple[InversionRecord, ...], tuple[Picture, ...]]:
    """How many images are told from gradients that were shared, for each protection and batch.

    Rank. Of `candidates` images drawn by the seed, the first ones are shared in gradients, the same
    under each protection. One is identified if no other is nearer to what was found of it: by the
    Euclidean distance of pixels; or, where a linear layer is all that is trained, by that of its
    inputs, which the gradient gives away exactly. Which of a batch's reconstructions is of which of
    its images is no question that an attacker has: they are paired one to one, those of the same
    found label first, so that distances are least in sum. By that alone, of images with nothing
    told about them, a share of at most batch / candidates would be identified.

    Guarantee: the model is left as it was; the global random state is not moved; the same seed
    gives the same figures.

    Args:
        model: As the client has it: at the first round with its first weights. It is asked in
            evaluation mode, on the CPU.
        images: Of those that it is for.
        settings: What is shared, how often, and how it is searched.
        stop: Looked at after every step of every search.

    Returns:
        For each protection and batch size, in their order, the figures and a picture. Intervals are
        Clopper and Pearson's at 95 % over the images.

    Raises:
        Stopped: A stop was requested.
        RunError: There are too few images.
        ModelError: The last layer has no bias, so that no labels follow.
    """
    target = _Target.of(model, images, settings)
    rows: list[InversionRecord] = []
    pictures: list[Picture] = []
    done = 0
    with part_progress("gradient", settings.gradients) as advance:
        for sharing in settings.protections:
            for batch in settings.batches:
                every = []
                for repeat in range(settings.of(batch)):
                    every.append(target.found(sharing, batch, repeat, stop))
                    done += 1
                    advance(done)
                rows.append(_row(sharing, batch, every, len(target.candidates)))
                first = every[0]
                pictures.append(
                    Picture(
                        protection=sharing.protection,
                        batch=batch,
                        originals=first.originals,
                        found=first.images,
                    )
                )
    return tuple(rows), tuple(pictures)


@final
@dataclass(frozen=True)
class _Target:
    """A client's model, the images that it may have, and where they are compared."""

    model: nn.Module
    candidates: Tensor
    labels: Tensor
    settings: InversionSettings
    last: str
    space: _Space
    places: Tensor  # of the candidates

    @classmethod
    def of(cls, model: nn.Module, images: Split, settings: InversionSettings) -> "_Target":
        model = copy.deepcopy(model).cpu().eval()
        last = _last_linear(model)
        random = torch.Generator().manual_seed(settings.seed)
        chosen = torch.randperm(len(images), generator=random)[: settings.candidates]
        shared, batch = max((settings.of(size) * size, size) for size in settings.batches)
        if len(chosen) < max(2, shared):
            raise RunError(
                f"inversion: expected at least {max(2, shared)} images and candidates for "
                f"{settings.of(batch)} gradients of {batch}, got {len(chosen)}"
            )
        candidates, labels = images.batch(chosen)
        space = _inputs_of(model, last) if _is_all_that_learns(model, last) else _pixels
        with torch.no_grad():
            places = torch.cat([space(part) for part in torch.split(candidates, _BATCH)])
        return cls(model, candidates, labels, settings, last, space, places)

    def found(self, sharing: Sharing, batch: int, repeat: int, stop: StopRequest) -> _Found:
        """Shares the gradient of a few images, and finds them again."""
        rows = torch.arange(repeat * batch, (repeat + 1) * batch)
        originals, seeds = self.candidates[rows], [self.settings.seed, batch, repeat]
        noise, start = (int(each) for each in np.random.SeedSequence(seeds).generate_state(2))
        random = torch.Generator().manual_seed(noise)
        gradient = sharing(self.model, originals, self.labels[rows], random)
        labels = self._labels(gradient, batch, sharing)
        found = invert(
            self.model,
            gradient,
            shape=(originals.shape[1], originals.shape[2], originals.shape[3]),
            labels=labels,
            inversion=replace(self.settings.inversion, seed=start),
            stop=lambda: stop.requested,
        ).images
        stop_here(stop)
        if self.space is _pixels:
            places = found.flatten(1)
        else:
            weight, bias = gradient[f"{self.last}weight"], gradient[f"{self.last}bias"]
            places = torch.stack(list(_inputs(weight, bias, labels)))
        order = _paired(places, self.places[rows], labels[:, None] != self.labels[rows][None])
        alike = [similarity(each, own) for each, own in zip(found[order], originals, strict=True)]
        return _Found(
            identified=_identified(places[order], self.places, rows),
            psnr=[min(_EXACT, ratio) for ratio, _ in alike],
            ssim=[structure for _, structure in alike],
            originals=originals,
            images=found[order],
        )

    def _labels(self, gradient: Gradient, batch: int, sharing: Sharing) -> Tensor:
        """From the last bias; where clipping has shortened it, after it was made longer again.

        A class that no image has stands at the mean probability, which before training is one over
        the number of classes, times the factor of the clipping.
        """
        bias = gradient[f"{self.last}bias"]
        if sharing.max_grad_norm is not None:
            bias = bias / (bias.max().clamp_min(1e-30) * len(bias))
        return labels_of(bias, count=batch)


def _row(sharing: Sharing, batch: int, every: list[_Found], candidates: int) -> InversionRecord:
    identified, asked = sum(each.identified for each in every), batch * len(every)
    low, high = clopper_pearson(identified, asked, error=_ERROR)
    return InversionRecord(
        protection=sharing.protection,
        batch=batch,
        identified=identified,
        asked=asked,
        candidates=candidates,
        low=low,
        high=high,
        psnr=sum(sum(each.psnr) for each in every) / asked,
        ssim=sum(sum(each.ssim) for each in every) / asked,
    )


def _paired(found: Tensor, originals: Tensor, differs: Tensor) -> Tensor:
    """Which of the found is of each original, one to one: equal labels first, then distances."""
    apart = torch.cdist(found.double(), originals.double()) + _OTHER_LABEL * differs
    mine, theirs = optimize.linear_sum_assignment(apart.numpy())
    order = torch.empty(len(originals), dtype=torch.int64)
    order[torch.from_numpy(theirs)] = torch.from_numpy(mine)
    return order


def _identified(found: Tensor, candidates: Tensor, own: Tensor) -> int:
    """To how many no candidate is nearer than their own, whose rows are given."""
    apart = torch.cdist(found.double(), candidates.double())
    return int((apart.gather(1, own[:, None]) <= apart.amin(1, keepdim=True)).sum())


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def _inputs_of(model: nn.Module, last: str) -> _Space:
    """What a linear layer of a model is given, by images."""
    layer = model.get_submodule(last.removesuffix("."))
    seen: list[Tensor] = []

    def inputs(images: Tensor) -> Tensor:
        watch = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        try:
            model(images)
        finally:
            watch.remove()
        return seen.pop()

    return inputs


def _inputs(weight: Tensor, bias: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Of the last layer, for each label: the input, or where several have it the mean of them.

    A class that no image has stands for what all images add to every class alike, as far as their
    probabilities are alike; what a label has beside it is its own images'. Exact for one image.
    """
    present = torch.zeros(len(bias), dtype=torch.bool)
    present[labels] = True
    absent = ~present if not bool(present.all()) else present
    for label in labels.tolist():
        row, value = weight[label] - weight[absent].mean(0), bias[label] - bias[absent].mean()
        # Where images cancel each other out, nothing follows.
        yield input_of_linear(row[None], value[None]) if value else row


def _last_linear(model: nn.Module) -> str:
    """The name of the last linear layer, with the dot that its parameters' names have after it."""
    found = [
        f"{name}." if name else ""
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None and layer.bias.requires_grad
    ]
    if not found:
        raise ModelError(
            "inversion: expected a linear layer with a bias at the end of the model, which tells "
            "the labels, got none that is trained"
        )
    return found[-1]


def _is_all_that_learns(model: nn.Module, last: str) -> bool:
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    return learning == {f"{last}weight", f"{last}bias"}
