"""Poisoned training data, planted on purpose.

An attacker who may change a small part of the training set stamps a trigger on some images and
relabels them (a backdoor), or swaps labels. Plant either one here, train with and without a
protection, and compare. Images are uint8 in and out; nothing is changed in place. Deliberately not
here: whether a model obeys (`obedience`), and finding what was planted (`spectral`).
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from defenses.errors import AttackError

__all__ = [
    "LabelFlip",
    "PoisonedImages",
    "Trigger",
    "check_bytes",
    "flip_labels",
    "plant_trigger",
]

_CHEQUERED = torch.tensor([[[255, 0, 255], [0, 255, 0], [255, 0, 255]]], dtype=torch.uint8)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trigger:
    """A patch near the bottom right corner that means `target` (BadNets).

    Source: Gu et al. 2017, arXiv 1708.06733.

    Attributes:
        target: The class that stamped images are labelled with.
        patch: Pixels that replace those of the image, uint8, [channels, height, width]; by default
            a chequered square of 3 x 3 on images of any number of channels.
        margin: Pixels between the patch and the bottom and right edges, at least 0.

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
        if self.target < 0 or self.margin < 0:
            raise AttackError(
                f"trigger: expected target >= 0 and margin >= 0, got {self.target} and "
                f"{self.margin}"
            )
        if self.patch is not None and (
            self.patch.dtype != torch.uint8 or self.patch.ndim != 3 or self.patch.numel() == 0
        ):
            raise AttackError(
                "patch: expected uint8 [channels, height, width], got "
                f"{self.patch.dtype} {list(self.patch.shape)}"
            )

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of another class than the target, bool, [n].

        Example:
            >>> Trigger(target=0).victims(torch.tensor([0, 1]))
            tensor([False,  True])
        """
        return labels != self.target

    def apply(self, images: Tensor) -> Tensor:
        """Copies of the images with the patch on them.

        Args:
            images: uint8, [n, channels, height, width].

        Raises:
            AttackError: They are not that, or the patch does not fit on them.

        Example:
            >>> image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
            >>> int((Trigger(target=0).apply(image) != image).sum())
            5
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise AttackError(
                "images: expected uint8 [n, channels, height, width], got "
                f"{images.dtype} {list(images.shape)}"
            )
        patch = _CHEQUERED if self.patch is None else self.patch
        bottom, right = images.shape[2] - self.margin, images.shape[3] - self.margin
        top, left = bottom - patch.shape[1], right - patch.shape[2]
        if top < 0 or left < 0 or patch.shape[0] not in (1, images.shape[1]):
            raise AttackError(
                f"patch: expected one that fits on images {list(images.shape[1:])} with a margin "
                f"of {self.margin}, got {list(patch.shape)}"
            )
        stamped = images.clone()
        stamped[:, :, top:bottom, left:right] = patch.to(images.device)
        return stamped


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
        if min(self.source, self.target) < 0 or self.source == self.target:
            raise AttackError(
                f"flip: expected two classes >= 0, got {self.source} and {self.target}"
            )

    def victims(self, labels: Tensor) -> Tensor:
        """Every image of the source class, bool, [n].

        Example:
            >>> LabelFlip(source=0, target=1).victims(torch.tensor([0, 1]))
            tensor([ True, False])
        """
        return labels == self.source

    def apply(self, images: Tensor) -> Tensor:
        """The images themselves.

        Example:
            >>> images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
            >>> LabelFlip(source=0, target=1).apply(images) is images
            True
        """
        return images


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PoisonedImages:
    """A training set with something planted in it.

    Attributes:
        images: uint8, [n, channels, height, width]; copies.
        labels: int64, [n]; copies.
        planted: Indices of the images that were changed or relabelled, ascending, int64, [k].

    Example:
        >>> sorted(PoisonedImages.__dataclass_fields__)
        ['images', 'labels', 'planted']
    """

    images: Tensor
    labels: Tensor
    planted: Tensor


def plant_trigger(
    images: Tensor, labels: Tensor, trigger: Trigger, *, fraction: float, seed: int = 0
) -> PoisonedImages:
    """Stamps the trigger on images of other classes and labels them as its target (BadNets).

    Args:
        images: uint8, [n, channels, height, width].
        labels: int64, [n].
        trigger: What to stamp, and the label that it gets.
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
    return _plant(images, labels, trigger, len(images) * fraction, fraction, seed)


def flip_labels(
    images: Tensor, labels: Tensor, flip: LabelFlip, *, fraction: float, seed: int = 0
) -> PoisonedImages:
    """Labels some images of the source class as the target.

    Args:
        images: uint8, [n, channels, height, width].
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
    count = int(flip.victims(labels).sum()) * fraction
    return _plant(images, labels, flip, count, fraction, seed)


def _plant(
    images: Tensor,
    labels: Tensor,
    attack: Trigger | LabelFlip,
    count: float,
    fraction: float,
    seed: int,
) -> PoisonedImages:
    """Applies the attack to so many of its victims and relabels them."""
    check_bytes(images, labels)
    if not 0 < fraction <= 1 or not 0 <= seed < 2**63:
        raise AttackError(
            f"expected a fraction in (0, 1] and a seed in [0, 2**63), got {fraction} and {seed}"
        )
    victims = attack.victims(labels).nonzero().flatten()
    wanted = max(1, round(count))
    if wanted > len(victims):
        raise AttackError(
            f"fraction: {wanted} images to plant, but {attack} is for {len(victims)} of these"
        )
    order = torch.randperm(len(victims), generator=torch.Generator().manual_seed(seed))
    planted = victims[order[:wanted].to(victims.device)].sort().values
    poisoned = PoisonedImages(images=images.clone(), labels=labels.clone(), planted=planted)
    poisoned.images[planted] = attack.apply(images[planted])
    poisoned.labels[planted] = attack.target
    return poisoned


def check_bytes(images: Tensor, labels: Tensor) -> None:
    """Refuses what is not a set of 8-bit images with their labels.

    Raises:
        AttackError: Saying what came instead.

    Example:
        >>> check_bytes(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise AttackError(
            "images: expected uint8 [n, channels, height, width], got "
            f"{images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise AttackError(
            f"labels: expected int64 [{len(images)}], one for each image, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
