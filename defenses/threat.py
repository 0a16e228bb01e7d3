"""The threat model: what an adversary may do to an image.

A norm, a radius and the range of a pixel. How an adversary searches that set is an attack
(`defenses.attacks`); this room only says what is inside.
"""

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from defenses.errors import ThreatModelError

__all__ = ["Norm", "ThreatModel"]

Norm = Literal["linf", "l2"]


@final
@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Perturbations of at most `eps` in `norm` that leave every pixel within `bounds`.

    Attributes:
        norm: `"linf"` (largest change of a pixel) or `"l2"` (Euclidean length of the change).
        eps: Radius, in the units of the pixels; finite, above 0, and for `linf` at most the
            width of the bounds (a larger one allows every image).
        bounds: Smallest and largest pixel value. Models take images in this range and
            normalise inside.

    Raises:
        ThreatModelError: A field is outside its range.

    Example:
        >>> threat = ThreatModel(norm="linf", eps=8 / 255)
        >>> threat.bounds
        (0.0, 1.0)
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            expected = " or ".join(repr(name) for name in get_args(Norm))
            raise ThreatModelError(f"norm: expected {expected}, got {self.norm!r}")
        if not isinstance(self.bounds, tuple) or len(self.bounds) != 2:
            raise ThreatModelError(f"bounds: expected a pair (low, high), got {self.bounds!r}")
        if not all(_is_real(value) for value in self.bounds) or self.bounds[0] >= self.bounds[1]:
            raise ThreatModelError(f"bounds: expected finite low < high, got {self.bounds!r}")
        if not _is_real(self.eps) or self.eps <= 0:
            raise ThreatModelError(f"eps: expected a finite number above 0, got {self.eps!r}")
        if self.norm == "linf" and self.eps > self.width:
            raise ThreatModelError(
                f"eps: expected at most the width of the bounds, {self.width:g}, got {self.eps:g}; "
                "give eps in the units of the pixels (8/255, not 8)"
            )

    @property
    def width(self) -> float:
        """The distance between the bounds.

        Example:
            >>> ThreatModel(norm="l2", eps=0.5, bounds=(-1.0, 1.0)).width
            2.0
        """
        return self.bounds[1] - self.bounds[0]

    def contains(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Says for each example whether `adversarial` is a permitted change of `clean`.

        Up to floating-point tolerance: a pixel may be off by 4 units in the last place of the
        coarser of the two dtypes at the largest bound (4.8e-7 for float32 images in [0, 1]), an
        l2 length by that times the square root of the number of pixels. Pixels that are not
        finite are never inside.

        Args:
            clean: Images, floating point, [n, ...].
            adversarial: Their changed versions, same shape and device.

        Returns:
            Booleans, [n].

        Raises:
            ThreatModelError: The shapes differ or a tensor is not floating point.

        Example:
            >>> threat = ThreatModel(norm="linf", eps=0.1)
            >>> clean = torch.full((2, 1, 1, 1), 0.5)
            >>> threat.contains(clean, clean + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)).tolist()
            [True, False]
        """
        _check_pair(clean, adversarial)
        pixel = max(self._tolerance(clean.dtype), self._tolerance(adversarial.dtype))
        values = _at_least_float32(adversarial).flatten(1)
        size = self._length(values - _at_least_float32(clean).flatten(1))
        slack = pixel if self.norm == "linf" else pixel * math.sqrt(values.shape[1])
        low, high = self.bounds
        in_bounds = ((values >= low - pixel) & (values <= high + pixel)).all(dim=1)
        return (size <= self.eps + slack) & in_bounds

    def project(self, clean: Tensor, candidate: Tensor) -> Tensor:
        """Moves `candidate` into the ball around `clean` and into the bounds.

        For `linf` the nearest such point; for `l2` the change is shortened first and clipped to
        the bounds afterwards, which is inside but not always nearest. `clean` is expected to lie
        in the bounds.

        Args:
            clean: Images in the bounds, floating point, [n, ...].
            candidate: Any finite images of the same shape.

        Returns:
            Images for which `contains` is true, [n, ...].

        Raises:
            ThreatModelError: The shapes differ or a tensor is not floating point.

        Example:
            >>> threat = ThreatModel(norm="l2", eps=0.5)
            >>> threat.project(torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]]])).flatten()
            tensor([0.3000, 0.4000])
        """
        _check_pair(clean, candidate)
        if self.norm == "linf":
            inside = candidate.clamp(clean - self.eps, clean + self.eps)
        else:
            change = candidate - clean
            length = self._length(change.flatten(1)).clamp_min(torch.finfo(change.dtype).tiny)
            factor = (self.eps / length).clamp_max(1.0)
            inside = clean + change * factor.view(-1, *[1] * (change.ndim - 1))
        return inside.clamp(*self.bounds)

    def check_images(self, images: Tensor) -> None:
        """Refuses images that are not floating point, not finite or outside the bounds.

        Args:
            images: Images, [n, channels, height, width]; may be empty.

        Raises:
            ThreatModelError: With the range that was found.

        Example:
            >>> ThreatModel(norm="linf", eps=0.1).check_images(torch.full((1, 1, 2, 2), 2.5))
            Traceback (most recent call last):
            ...
            defenses.errors.ThreatModelError: expected images in [0, 1], got [2.5, 2.5]; ...
        """
        low, high = self.bounds
        expected = f"expected images in [{low:g}, {high:g}]"
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ThreatModelError(f"{expected} as a floating-point tensor, got {got}")
        if images.numel() == 0:
            return
        smallest, largest = (float(value) for value in torch.aminmax(images))
        slack = self._tolerance(images.dtype)
        if not (smallest >= low - slack and largest <= high + slack):
            raise ThreatModelError(
                f"{expected}, got [{smallest:g}, {largest:g}]; if they are normalised, "
                "put the normalisation inside the model and give it the plain pixels"
            )

    def _tolerance(self, dtype: torch.dtype) -> float:
        """By how much arithmetic in `dtype` may push one pixel over an edge."""
        return 4 * torch.finfo(dtype).eps * max(abs(self.bounds[0]), abs(self.bounds[1]))

    def _length(self, change: Tensor) -> Tensor:
        """Measures each row of `change` in the norm."""
        order = math.inf if self.norm == "linf" else 2
        length: Tensor = torch.linalg.vector_norm(change, ord=order, dim=1)
        return length


def _is_real(value: object) -> bool:
    """A finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least_float32(images: Tensor) -> Tensor:
    """Half precision widened, so that the check adds no rounding of its own."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _check_pair(clean: Tensor, other: Tensor) -> None:
    """Refuses tensors that are not two floating-point batches of the same shape."""
    if clean.shape != other.shape or clean.ndim < 2:
        raise ThreatModelError(
            f"expected two batches [n, ...] of one shape, got {list(clean.shape)} "
            f"and {list(other.shape)}"
        )
    if not (clean.is_floating_point() and other.is_floating_point()):
        raise ThreatModelError(
            f"expected floating-point images, got {clean.dtype} and {other.dtype}"
        )
