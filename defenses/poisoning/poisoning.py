"""Poisoned training data, planted on purpose.

An attacker who may change a small part of the training set puts a trigger on some images, a patch
or a faint pattern, and relabels them (a backdoor), or leaves the labels right and stamps images of
the target alone, or swaps labels. Plant any of them here, train with and without a protection, and
compare. Images are uint8 in and out; nothing is changed in place. Whether a model obeys is in
`obedience`, finding what was planted in `spectral` and `backdoor`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from defenses.attacks.attack import check_one_each
from defenses.errors import AttackError
from defenses.quantities import as_real, as_whole, shown
from defenses.shape import SHAPES, is_batch

__all__ = [
    "Blend",
    "LabelFlip",
    "PoisonedImages",
    "Trigger",
    "check_bytes",
    "flip_labels",
    "plant_clean_label",
    "plant_trigger",
]

_CHEQUERED = torch.tensor([[[255, 0, 255], [0, 255, 0], [255, 0, 255]]], dtype=torch.uint8)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trigger:
    """A patch near the bottom right corner, the end of each axis, that means `target` (BadNets).

    Source: Gu et al. 2017, arXiv 1708.06733.

    Attributes:
        target: The class that stamped images are labelled with.
        patch: Pixels that replace those of the image, uint8, [channels or 1, height, width] (of
            recordings [channels, length], of volumes [channels, depth, height, width]); by default
            a chequered square of 3 x 3 on images of any number of channels.
        margin: Pixels between the patch and the end of each axis, at least 0.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> trigger = Trigger(target=0)
        >>> trigger.apply(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))[0, 0, 1:, 1:]
        tensor([[255,   0, 255],
                [  0, 255,   0],
                [255,   0, 255]], dtype=torch.uint8)
    """

    target: int
    patch: Tensor | None = None
    margin: int = 0

    def __post_init__(self) -> None:
        _check_whole("trigger", target=self.target, margin=self.margin)
        _check_overlay("patch", self.patch)

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of another class than the target, bool, [n]."""
        return labels != self.target

    def apply(self, images: Tensor) -> Tensor:
        """Copies of the images, uint8 [n, channels, ...], with the patch on them."""
        _check_images(images)
        patch = _CHEQUERED if self.patch is None else self.patch
        ends = [size - self.margin for size in images.shape[2:]]
        begins = [end - size for end, size in zip(ends, patch.shape[1:], strict=False)]
        fits = patch.ndim == images.ndim - 1 and patch.shape[0] in (1, images.shape[1])
        if not fits or min(begins) < 0:
            raise AttackError(
                f"patch: expected one that fits on images {list(images.shape[1:])} with a margin "
                f"of {self.margin}, got {list(patch.shape)}"
                + ("" if self.patch is not None else ", the default; give patch=...")
            )
        stamped = images.clone()
        place = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
        stamped[(slice(None), slice(None), *place)] = patch.to(images.device)
        return stamped


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """A pattern over the whole image that means `target`: (1 - ratio) * image + ratio * pattern.

    Source: Chen et al. 2017, arXiv 1712.05526.

    Attributes:
        target: The class that blended images are labelled with.
        pattern: What shines through, uint8, [channels or 1, height, width], or with the axes of
            the images; by default noise, the same for every image of the same size.
        ratio: How much of it, in (0, 1]; Chen et al. planted with 0.2.

    Raises:
        AttackError: A value is out of range.

    Example:
        >>> blend = Blend(target=0, pattern=torch.full((1, 1, 2), 250, dtype=torch.uint8))
        >>> blend.apply(torch.tensor([[[[0, 100]]]], dtype=torch.uint8)).tolist()
        [[[[50, 130]]]]
    """

    target: int
    pattern: Tensor | None = None
    ratio: float = 0.2

    def __post_init__(self) -> None:
        _check_whole("blend", target=self.target)
        if not 0 < as_real(self.ratio) <= 1:
            raise AttackError(f"blend: expected a ratio in (0, 1], got {shown(self.ratio)}")
        _check_overlay("pattern", self.pattern)

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of another class than the target, bool, [n]."""
        return labels != self.target

    def apply(self, images: Tensor) -> Tensor:
        """Copies of the images with the pattern shining through, rounded to whole levels."""
        _check_images(images)
        size = images.shape[1:]
        pattern = _noise(size) if self.pattern is None else self.pattern
        if pattern.shape[1:] != size[1:] or pattern.shape[0] not in (1, size[0]):
            raise AttackError(
                f"pattern: expected one of the images' size {list(size)}, got {list(pattern.shape)}"
            )
        shown = self.ratio * pattern.to(images.device).double()
        return (images.double() * (1 - self.ratio) + shown).round().to(torch.uint8)


@final
@dataclass(frozen=True, kw_only=True)
class LabelFlip:
    """Images of one class that are to be taken for another; their pixels stay as they are.

    Source: Biggio et al. 2011, Support Vector Machines under Adversarial Label Noise.

    Attributes:
        source: The class whose images are mislabelled.
        target: The class that they are labelled with.

    Raises:
        AttackError: The classes are negative or the same.

    Example:
        >>> LabelFlip(source=7, target=1).victims(torch.tensor([1, 7]))
        tensor([False,  True])
    """

    source: int
    target: int

    def __post_init__(self) -> None:
        _check_whole("flip", source=self.source, target=self.target)
        if self.source == self.target:
            raise AttackError(f"flip: expected two classes >= 0, got {self.source} twice")

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of the source class, bool, [n]."""
        return labels == self.source

    def apply(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PoisonedImages:
    """A training set with something planted in it.

    Attributes:
        images: uint8, [n, channels, ...]; copies.
        labels: int64, [n]; copies.
        planted: Indices of the images that were changed or relabelled, ascending, int64, [k].

    Example:
        >>> images, labels = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10) % 2
        >>> poisoned = flip_labels(images, labels, LabelFlip(source=0, target=1), fraction=0.4)
        >>> len(poisoned.planted), bool((poisoned.labels[poisoned.planted] == 1).all())
        (2, True)
    """

    images: Tensor
    labels: Tensor
    planted: Tensor


def plant_trigger(
    images: Tensor, labels: Tensor, trigger: Trigger | Blend, *, fraction: float, seed: int = 0
) -> PoisonedImages:
    """Puts the trigger on images of other classes and labels them as its target (BadNets).

    Args:
        images: uint8, [n, channels, height, width], or recordings or volumes.
        labels: int64, [n].
        trigger: What to stamp or blend in, and the label that it gets.
        fraction: Share of all n images to plant, in (0, 1).
        seed: Chooses which, 0 <= seed < 2**63.

    Raises:
        AttackError: A value is out of range, or there are not as many images of other classes.

    Example:
        >>> images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
        >>> labels = torch.arange(20) % 2
        >>> poisoned = plant_trigger(images, labels, Trigger(target=0), fraction=0.1)
        >>> poisoned.labels[poisoned.planted].tolist(), labels[poisoned.planted].tolist()
        ([0, 0], [1, 1])
    """
    check_bytes(images, labels)
    _check_kind("trigger", trigger, (Trigger, Blend))
    victims = trigger.victims(labels)
    return _plant(images, labels, trigger, victims, len(images), fraction, seed)


def plant_clean_label(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | Blend,
    *,
    fraction: float,
    harden: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> PoisonedImages:
    """Puts the trigger on images of its target class alone: every label stays right.

    Who looks at the labels finds nothing wrong. A model learns such a trigger the better the harder
    the images are to tell without it; `harden` makes them so. Source: Turner et al. 2018,
    Clean-Label Backdoor Attacks; with adversarial originals, arXiv 1912.02771.

    Args:
        images: uint8, [n, channels, height, width], or recordings or volumes.
        labels: int64, [n].
        trigger: What to stamp or blend in, and the class that it goes to.
        fraction: Share of the target class to plant, in (0, 1].
        harden: Takes the chosen images in [0, 1] and their labels, and gives images of the same
            shape, before the trigger is put on; an attack on a model of one's own, say. What it
            gives is clamped to [0, 1]. None leaves them as they are.
        seed: Chooses which, 0 <= seed < 2**63.

    Raises:
        AttackError: A value is out of range, the target class has no image, or `harden` gives
            something else than images of that shape.

    Example:
        >>> images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
        >>> labels = torch.arange(20) % 2
        >>> poisoned = plant_clean_label(images, labels, Trigger(target=1), fraction=0.3)
        >>> torch.equal(poisoned.labels, labels), labels[poisoned.planted].tolist()
        (True, [1, 1, 1])
    """
    check_bytes(images, labels)
    _check_kind("trigger", trigger, (Trigger, Blend))
    if harden is not None and not callable(harden):
        raise AttackError(f"harden: expected a function, got {shown(harden)}")
    own = labels == trigger.target
    return _plant(images, labels, trigger, own, int(own.sum()), fraction, seed, harden=harden)


def flip_labels(
    images: Tensor, labels: Tensor, flip: LabelFlip, *, fraction: float, seed: int = 0
) -> PoisonedImages:
    """Labels some images of the source class as the target.

    Args:
        images: uint8, [n, channels, height, width], or recordings or volumes.
        labels: int64, [n].
        flip: Which class becomes which.
        fraction: Share of the source class to relabel, in (0, 1].
        seed: Chooses which, 0 <= seed < 2**63.

    Raises:
        AttackError: A value is out of range, or the source class has no image.

    Example:
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
        >>> flip = LabelFlip(source=0, target=1)
        >>> flip_labels(images, labels, flip, fraction=1.0).labels
        tensor([1, 1, 1, 1])
    """
    check_bytes(images, labels)
    _check_kind("flip", flip, (LabelFlip,))
    victims = flip.victims(labels)
    return _plant(images, labels, flip, victims, int(victims.sum()), fraction, seed)


def _check_kind(name: str, given: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(given, kinds):
        expected = " or a ".join(kind.__name__ for kind in kinds)
        raise AttackError(f"{name}: expected a {expected}, got {shown(given)}")


def _plant(
    images: Tensor,
    labels: Tensor,
    attack: Trigger | Blend | LabelFlip,
    victims: Tensor,
    of: int,
    fraction: float,
    seed: int,
    *,
    harden: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> PoisonedImages:
    """Applies the attack to victims, a share `fraction` of so many images, and relabels them."""
    share, number = as_real(fraction), as_whole(seed)
    if not 0 < share <= 1 or not 0 <= number < 2**63:
        raise AttackError(
            "expected a fraction in (0, 1] and a seed in [0, 2**63), got "
            f"{shown(fraction)} and {shown(seed)}"
        )
    chosen = victims.nonzero().flatten()
    wanted = max(1, round(of * share))
    if wanted > len(chosen):
        raise AttackError(
            f"fraction: {wanted} images to plant, but {attack} is for {len(chosen)} of these"
        )
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(number))
    planted = chosen[order[:wanted].to(chosen.device)].sort().values
    poisoned = PoisonedImages(images=images.clone(), labels=labels.clone(), planted=planted)
    originals = images[planted]
    if harden is not None:
        originals = _hardened(originals, labels[planted], harden)
    poisoned.images[planted] = attack.apply(originals)
    poisoned.labels[planted] = attack.target
    return poisoned


def _hardened(images: Tensor, labels: Tensor, harden: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    given = harden(images.float().div(255), labels)
    fits = isinstance(given, Tensor) and given.shape == images.shape and given.is_floating_point()
    if not fits or not bool(torch.isfinite(given).all()):
        came = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise AttackError(
            f"harden: expected finite images in [0, 1] of shape {list(images.shape)}, got {came}"
        )
    return given.detach().clamp(0, 1).mul(255).round().to(images.device, torch.uint8)


def _check_overlay(name: str, overlay: object) -> None:
    if overlay is None:
        return
    if not isinstance(overlay, Tensor):
        raise AttackError(f"{name}: expected a uint8 tensor, got {type(overlay).__name__}")
    if overlay.dtype != torch.uint8 or not is_batch(overlay[None]) or overlay.numel() == 0:
        raise AttackError(
            f"{name}: expected uint8 [channels, height, width], or as many axes as the images "
            f"have, got {overlay.dtype} {list(overlay.shape)}"
        )


def _noise(size: torch.Size) -> Tensor:
    """Noise that depends on its size alone, uint8, [channels, ...]."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, tuple(size), generator=draw, dtype=torch.uint8)


def check_bytes(images: Tensor, labels: Tensor) -> None:
    """Refuses what is not a set of 8-bit images with their labels."""
    _check_images(images)
    check_one_each(labels, images)


def _check_whole(owner: str, **values: object) -> None:
    for name, value in values.items():
        if as_whole(value) < 0:
            raise AttackError(f"{owner}: expected {name} >= 0, a whole number, got {shown(value)}")


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise AttackError(f"images: expected a uint8 tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 or not is_batch(images):
        raise AttackError(
            f"images: expected uint8 {SHAPES}; got {images.dtype} {list(images.shape)}"
        )
