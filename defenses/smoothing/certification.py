"""Certification by randomised smoothing: how far each prediction provably holds.

`certify` asks the model about many noisy copies of each image (Cohen et al. 2019, arXiv
1902.02918). What it proves holds for the smoothed classifier, which answers with the class seen
most often under noise; train with `GaussianAugmentation`, or there is little to certify.

In floats, `x + noise` is more than x shifted: the rounding of the sum tells which x it was, and a
classifier that looks at it gets false certificates (Voracek & Hein 2023, arXiv 2207.07209). As they
prescribe, noise here is rounded to whole levels and added to whole levels: rounding the noisy image
and rounding the noise are then the same thing, so that the exact theory holds behind the rounding.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from typing import Any, TypeGuard, final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.oracle import channels_last
from defenses.errors import EvaluationError
from defenses.measuring.images import ImageSource, ImageTensors, MapDataset, choose_images
from defenses.measuring.journal import Journal, digest_of, digest_of_model
from defenses.measuring.measurement import check_question, progress_bar, versions
from defenses.quantities import LARGEST_SIGMA
from defenses.scope import attack_scope, check_logits, home_of
from defenses.smoothing.smoothing import CertificationReport, Smoothing
from defenses.threat import ThreatModel

__all__ = ["GridNoise", "certify"]

_PACKAGES = ("torch", "numpy", "scipy")  # on which counts depend
_UNIT = ThreatModel(norm="l2", eps=1.0)  # for its bounds
_LEVELS = 255
_WORD_BITS, _GUIDE_BITS = 64, 16
_REACH = 9.3  # in sigmas; what lies beyond has less than half of the smallest probability of a word
_DIGITS = 45
_SEVERAL = np.iinfo(np.int16).min
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def certify(
    model: nn.Module,
    data: MapDataset | ImageTensors,
    smoothing: Smoothing,
    *,
    batch_size: int = 256,
    images: int | None = None,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CertificationReport:
    """Certifies each image's prediction under Gaussian noise, or abstains.

    Guarantee: that of `CertificationReport`, for images on the grid of 8-bit pixels. It holds in
    floating point too (Voracek & Hein 2023, arXiv 2207.07209): levels and rounded noise are added
    as integers, and the model sees nothing else, so no rounding of a sum can betray the image.
    It assumes that the seeded words of numpy's PCG64 are as good as coin tosses, and that the class
    the model gives to one image in evaluation mode is a function of that image alone.

    The noisy copies are not clipped to [0, 1]. The model and the global random states are left as
    they were. The images and noise follow from the seed, whatever the batch size.

    Args:
        model: Takes images in [0, 1] and somewhat beyond, returns logits [n, classes].
        data: A data set with tensors `images` and `labels`, or any map-style one of (image, label);
            uint8, or floating point with every pixel a k / 255.
        smoothing: Noise, samples and chance of error.
        batch_size: Noisy copies a forward pass, of one image or of several, at least 1.
        images: Certify this many, drawn without replacement; None takes all.
        seed: Chooses the images and all noise, 0 <= seed < 2**63.
        state: A file kept while it runs, from which a killed certification goes on; None keeps
            none. It is refused for another model, other images or settings.
        progress: Show a bar on stderr when that is a terminal.

    Raises:
        EvaluationError: A setting is out of range, the images are not on the grid or do not fit the
            model, its logits are unusable, or the state is another certification's.
        ThreatModelError: The pixels are not in [0, 1].

    Example:
        >>> data = [(torch.tensor([[[1.0, 0.0]]]), 0), (torch.tensor([[[0.0, 0.2]]]), 1)]
        >>> report = certify(nn.Flatten(), data, Smoothing(sigma=0.25, samples=1000))
        >>> [round(radius, 1) for radius in report.radii]  # the true ones are 0.71 and 0.14
        [0.6, 0.1]
    """
    if not isinstance(smoothing, Smoothing):
        raise EvaluationError(f"smoothing: expected a Smoothing, got {type(smoothing).__name__}")
    check_question(model, _UNIT, batch_size=batch_size, seed=seed)
    noise = GridNoise(smoothing.sigma)
    chosen = _Chosen.read(data, images, seed)
    smoothing.check_sampler(noise.error * chosen.levels[0].numel())
    identity = {
        "model": digest_of_model(model),
        "images": chosen.digest,
        "settings": digest_of(repr(smoothing), str(seed)),
        "versions": ", ".join(f"{k} {v}" for k, v in versions(*_PACKAGES).items()),
    }
    journal = Journal(state, identity)
    found = _Found.resumed(journal.found, len(chosen), smoothing)
    with attack_scope(model, seed=seed), torch.no_grad(), progress_bar(shown=progress) as bar:
        task = bar.add_task("certify", total=len(chosen), completed=len(found.hits), speed="")
        voter = _Voter(model, noise, chosen, batch_size)
        for block in chosen.blocks(len(found.hits), max(1, batch_size // smoothing.samples)):
            found.add(*_certify_block(voter, block, smoothing, seed))
            journal.write(asdict(found))
            bar.update(task, completed=len(found.hits))
    return CertificationReport(
        smoothing=smoothing,
        classes=found.classes,
        indices=tuple(chosen.indices.tolist()),
        labels=tuple(chosen.labels.tolist()),
        selected=tuple(found.selected),
        hits=tuple(found.hits),
        seed=seed,
        images=chosen.digest,
        versions=versions(*_PACKAGES),
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The images to certify, in whole levels of 1 / 255."""

    indices: Tensor
    levels: Tensor  # int16, [n, channels, ...]
    labels: Tensor

    @classmethod
    def read(cls, data: MapDataset | ImageTensors, count: int | None, seed: int) -> "_Chosen":
        """Reads and checks all of them before hours are spent on the first."""
        source = ImageSource(data, _UNIT)
        indices = choose_images(len(source), count, torch.Generator().manual_seed(seed))
        pixels = source.images(indices).cpu()
        levels = (pixels * _LEVELS).round()
        off = int((levels / _LEVELS != pixels).flatten(1).any(dim=1).sum())
        if off:
            raise EvaluationError(
                f"data: expected every pixel to be a k / 255, but {off} of {len(pixels)} images "
                "have others; certify the 8-bit images themselves, before any resizing in floats"
            )
        return cls(indices=indices, levels=levels.to(torch.int16), labels=source.labels(indices))

    @property
    def digest(self) -> str:
        return digest_of(self.indices, self.levels, self.labels)

    def __len__(self) -> int:
        return len(self.indices)

    def blocks(self, start: int, size: int) -> "Iterator[_Chosen]":
        """The images from number `start` on, so many at a time."""
        for first in range(start, len(self), size):
            part = slice(first, first + size)
            yield _Chosen(
                indices=self.indices[part], levels=self.levels[part], labels=self.labels[part]
            )


@final
@dataclass(kw_only=True)
class _Found:
    """What is known of the first images; grows as the certification goes on."""

    classes: int
    selected: list[int]
    hits: list[int]

    @classmethod
    def resumed(cls, content: dict[str, Any], count: int, smoothing: Smoothing) -> "_Found":
        """What a state file holds, or nothing yet; refused where no certification leaves it."""
        if not content:
            return cls(classes=0, selected=[], hits=[])
        classes, selected, hits = (content.get(key) for key in ("classes", "selected", "hits"))
        if (
            type(classes) is not int
            or classes < 2
            or not _all_within(selected, classes - 1)
            or not _all_within(hits, smoothing.samples)
            or not 0 < len(selected) == len(hits) <= count
        ):
            raise EvaluationError(
                f"state: expected a class and at most {smoothing.samples} hits for each of at most "
                f"{count} images; no certification leaves this one, give another path"
            )
        return cls(classes=classes, selected=selected, hits=hits)

    def add(self, selected: Tensor, hits: Tensor, classes: int) -> None:
        self.classes = classes
        self.selected += selected.tolist()
        self.hits += hits.tolist()


def _all_within(values: object, most: int) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers from 0 to `most`."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= most for value in values
    )


def _certify_block(
    voter: "_Voter", block: _Chosen, smoothing: Smoothing, seed: int
) -> tuple[Tensor, Tensor, int]:
    """The selected class and its hits, [b] each, on independent noise; and how many classes."""
    # One stream an image: what others are in the block, and what came before, changes nothing.
    streams = [np.random.default_rng([seed, index]) for index in block.indices.tolist()]
    selected = voter.votes(block.levels, streams, smoothing.selection).argmax(dim=1)
    votes = voter.votes(block.levels, streams, smoothing.samples)
    return selected, votes.gather(1, selected[:, None]).flatten(), votes.shape[1]


@final
class GridNoise:
    """The distribution of N(0, sigma^2) rounded to the nearest k / 255, given as k.

    Sigma, in (0, 10], is the standard deviation before rounding, where the pixels span [0, 1].

    Guarantee: on uniform 64-bit words, every probability P(k <= j) is right to 2^-65, since it is
    computed in exact decimal arithmetic and not in floats. A class because it holds that table.

    Attributes:
        error: How far one number's distribution may be from the exact one, as total variation.
    """

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma <= LARGEST_SIGMA:
            raise EvaluationError(f"sigma: expected a number in (0, {LARGEST_SIGMA}], got {sigma}")
        below = _words_below(Decimal(sigma) * _LEVELS)
        self._lowest = -len(below)
        # P(k <= j) = 1 - P(k <= -1 - j): the noise is exactly symmetric.
        thresholds = below + [2**_WORD_BITS - words for words in reversed(below)]
        self._thresholds = np.array(thresholds, dtype=np.uint64)
        self._guide = self._guide_table()
        self.error = (len(thresholds) + 1) * 2.0 ** -(_WORD_BITS + 1)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Independent whole levels, int16, on the CPU; how draws are cut into calls changes none.

        The generator's uniform words are taken for fair coins; only its own state moves.
        """
        words = generator.bit_generator.random_raw(math.prod(shape))
        drawn = self._guide[words >> (_WORD_BITS - _GUIDE_BITS)]
        unsure = np.flatnonzero(drawn == _SEVERAL)
        drawn[unsure] = self._search(words[unsure])
        return torch.from_numpy(drawn).view(shape)

    def _search(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int16]:
        """The smallest j with word / 2^64 < P(k <= j)."""
        found = np.searchsorted(self._thresholds, words, side="right") + self._lowest
        return found.astype(np.int16)

    def _guide_table(self) -> npt.NDArray[np.int16]:
        """By a word's first 16 bits: the number that all such words give, or that they differ."""
        first = np.arange(2**_GUIDE_BITS, dtype=np.uint64) << np.uint64(_WORD_BITS - _GUIDE_BITS)
        last = first + np.uint64(2 ** (_WORD_BITS - _GUIDE_BITS) - 1)
        low, high = self._search(first), self._search(last)
        return np.where(low == high, low, np.int16(_SEVERAL))


def _words_below(scale: Decimal) -> list[int]:
    """2^64 P(k <= j), rounded, for j from the lowest with a word of its own up to -1."""
    reach = math.ceil(Decimal(_REACH) * scale)
    words = [_words_below_level(Decimal(2 * j + 1) / (2 * scale)) for j in range(-reach, 0)]
    return [count for count in words if count > 0]


def _words_below_level(x: Decimal) -> int:
    """2^64 times the standard normal distribution function at x <= 0, rounded.

    By the series 1/2 + phi(x) (x + x^3 / 3 + x^5 / 15 + ...), whose terms all have one sign.
    """
    if x < -_REACH:
        return 0
    with localcontext() as context:
        context.prec = _DIGITS
        total, term, odd = Decimal(0), x, 1
        while abs(term) > Decimal(10) ** -_DIGITS:
            total += term
            odd += 2
            term *= x * x / odd
        density = (-x * x / 2).exp() / (2 * _PI).sqrt()
        words = (Decimal("0.5") + density * total) * 2**_WORD_BITS
        return int(words.to_integral_value())


@final
class _Voter:
    """The model, asked about noisy copies of images; knows the layout in which it is faster."""

    def __init__(
        self, model: nn.Module, noise: GridNoise, chosen: _Chosen, batch_size: int
    ) -> None:
        self._model, self._noise, self._batch_size = model, noise, batch_size
        self._largest_label = int(chosen.labels.max())
        self._device, self._dtype = home_of(model, torch.empty(0))
        self._channels_last = self._device.type == "cpu" and chosen.levels.ndim == 4
        try:
            self._logits(chosen.levels[:1])
        except RuntimeError as error:
            if not self._channels_last or "view size is not compatible" not in str(error):
                raise
            self._channels_last = False

    def votes(self, levels: Tensor, streams: list[np.random.Generator], samples: int) -> Tensor:
        """How often each class is seen in noisy copies of each image, int64, [b, classes]."""
        share = max(1, self._batch_size // len(levels))
        counts = []
        for start in range(0, samples, share):
            shape = (min(share, samples - start), *levels.shape[1:])
            drawn = torch.stack([self._noise.draw(stream, shape) for stream in streams])
            logits = self._logits((levels[:, None] + drawn).flatten(0, 1))
            seen = logits.argmax(dim=1).view(len(levels), -1)
            counts.append(F.one_hot(seen, logits.shape[1]).sum(dim=1))
        return torch.stack(counts).sum(dim=0).cpu()

    def _logits(self, levels: Tensor) -> Tensor:
        """What the model says of images in whole levels, in range or not, [n, classes]."""
        # An exact integer, divided once: the same float whatever image and noise added up to it.
        exact = levels.to(self._device).to(torch.promote_types(self._dtype, torch.float32))
        pixels = exact.div_(_LEVELS).to(self._dtype)
        return check_logits(
            self._model(channels_last(pixels) if self._channels_last else pixels),
            count=len(levels),
            largest_label=self._largest_label,
            error=EvaluationError,
        )
