"""The threat model: what an adversary may do to an image.

A norm, a radius and the range of a pixel. How an adversary searches that set is an attack
(`defenses.attacks.attack`); this room only says what is inside.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from defenses.errors import ThreatModelError
from defenses.quantities import is_real, is_word, shown
from defenses.shape import beside

__all__ = ["Norm", "ThreatModel"]

Norm = Literal["linf", "l2", "l1", "l0"]

_ORDER: Mapping[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}


@final
@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Perturbations of at most `eps` in `norm` that leave every pixel within `bounds`.

    Attributes:
        norm: `"linf"` (largest change of a pixel), `"l2"` (Euclidean length of the change), `"l1"`
            (sum of the changes) or `"l0"` (how many pixel positions change, the channels of a
            position counted together).
        eps: Radius, finite and above 0: in the units of the pixels, for `linf` at most the width
            of the bounds (a larger one allows every image); for `l0` a whole number of positions.
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
        if not is_word(self.norm, get_args(Norm)):
            expected = ", ".join(repr(name) for name in get_args(Norm))
            raise ThreatModelError(f"norm: expected one of {expected}; got {shown(self.norm)}")
        if not isinstance(self.bounds, tuple) or len(self.bounds) != 2:
            raise ThreatModelError(f"bounds: expected a pair (low, high), got {shown(self.bounds)}")
        if not all(map(is_real, self.bounds)) or self.bounds[0] >= self.bounds[1]:
            raise ThreatModelError(f"bounds: expected finite low < high, got {shown(self.bounds)}")
        if not is_real(self.eps) or self.eps <= 0:
            raise ThreatModelError(f"eps: expected a finite number above 0, got {shown(self.eps)}")
        if self.norm == "linf" and self.eps > self.width:
            raise ThreatModelError(
                f"eps: expected at most the width of the bounds, {self.width:g}, got {self.eps:g}; "
                "give eps in the units of the pixels (8/255, not 8)"
            )
        if self.norm == "l0" and self.eps != int(self.eps):
            raise ThreatModelError(
                f"eps: expected a whole number of pixel positions for l0, got {self.eps!r}"
            )

    @property
    def width(self) -> float:
        """The distance between the bounds."""
        return self.bounds[1] - self.bounds[0]

    def to_dict(self) -> dict[str, Any]:
        """The threat model as plain JSON values."""
        return {"norm": self.norm, "eps": self.eps, "bounds": list(self.bounds)}

    def contains(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Says for each example whether `adversarial` is a permitted change of `clean`.

        Up to floating-point tolerance: a pixel may be off by 4 units in the last place of the
        coarser of the two dtypes at the largest bound (4.8e-7 for float32 images in [0, 1]), an
        l2 length by that times the square root of the number of pixels, an l1 length by that
        times their number; for l0 such a pixel counts as unchanged. Pixels that are not finite
        are never inside.

        Both are floating point, [n, channels, ...] (or [n, pixels] without channels); the answers
        are booleans, [n].
        """
        _check_pair(clean, adversarial)
        pixel = max(self._tolerance(clean.dtype), self._tolerance(adversarial.dtype))
        values = _at_least_float32(adversarial).flatten(1)
        change = values - _at_least_float32(clean).flatten(1)
        if self.norm == "l0":
            moved = (change.abs() > pixel).view(clean.shape)
            size, slack = _by_position(moved).any(dim=1).sum(dim=1), 0.0
        else:
            size = self._length(change)
            slack = pixel * change.shape[1] ** (1 / _ORDER[self.norm])
        low, high = self.bounds
        in_bounds = ((values >= low - pixel) & (values <= high + pixel)).all(dim=1)
        return (size <= self.eps + slack) & in_bounds

    def project(self, clean: Tensor, candidate: Tensor) -> Tensor:
        """Moves `candidate` into the ball around `clean` and into the bounds.

        For `linf`, `l1` (Croce & Hein 2021, arXiv 2103.01208) and `l0` the nearest such point. For
        `l2` the nearest point of the ball, clipped to the bounds afterwards, which is inside but
        not always nearest. `clean` is expected to lie in the bounds.

        Args:
            clean: Images in the bounds, floating point, [n, channels, ...] or [n, pixels].
            candidate: Any finite images of the same shape.

        Returns:
            Images for which `contains` is true, [n, ...]; for l0 the positions that do not change
            are bit-identical to those of `clean`.
        """
        _check_pair(clean, candidate)
        if self.norm == "linf":
            inside = candidate.clamp(clean - self.eps, clean + self.eps)
        elif self.norm == "l2":
            change = candidate - clean
            length = self._length(change.flatten(1)).clamp_min(torch.finfo(change.dtype).tiny)
            factor = (self.eps / length).clamp_max(1.0)
            inside = clean + change * beside(factor, change)
        elif self.norm == "l1":
            wide = _at_least_float32(clean)
            change = _at_least_float32(candidate) - wide
            edge = torch.where(change > 0, self.bounds[1], self.bounds[0])
            room = (edge - wide).abs()
            shrunk = _onto_l1_ball(change.flatten(1), room.flatten(1), self.eps)
            inside = (clean + shrunk.view_as(change)).to(candidate.dtype)
        else:
            inside = self._keep_positions(clean, candidate)
        return inside.clamp(*self.bounds)

    def _keep_positions(self, clean: Tensor, candidate: Tensor) -> Tensor:
        """Keeps the candidate at the `eps` positions where going back to `clean` costs most."""
        wide = _at_least_float32(candidate)
        back = (wide - _at_least_float32(clean)).square()
        stay = (wide - wide.clamp(*self.bounds)).square()
        gain = _by_position(back - stay).sum(dim=1)
        kept = gain.topk(min(int(self.eps), gain.shape[1]), dim=1).indices
        keep = torch.zeros_like(gain, dtype=torch.bool).scatter_(1, kept, value=True)
        rows, positions = clean.shape[:1], clean.shape[2:] if clean.ndim > 2 else clean.shape[1:]
        channels = (1,) if clean.ndim > 2 else ()
        return torch.where(keep.view(*rows, *channels, *positions), candidate, clean)

    def check_images(self, images: Tensor) -> None:
        """Refuses images that are not floating point, not finite or outside the bounds."""
        low, high = self.bounds
        expected = f"expected images in [{low:g}, {high:g}]"
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ThreatModelError(f"{expected} as a floating-point tensor, got {got}")
        if images.ndim < 2:
            raise ThreatModelError(f"{expected} as a batch [n, ...], got {list(images.shape)}")
        if images.numel() == 0:
            return
        self._check_radius(images)
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
        """Measures each row of `change` in the norm, which is not l0."""
        if self.norm == "linf":  # `vector_norm` takes twenty times as long
            return change.abs().amax(dim=1)
        length: Tensor = torch.linalg.vector_norm(change, ord=_ORDER[self.norm], dim=1)
        return length

    def _check_radius(self, images: Tensor) -> None:
        """Refuses a radius that reaches every image there is: nothing would be measured."""
        pixels = images[0].numel()
        if self.norm == "l0":
            largest = float(_by_position(images[:1]).shape[2])
        else:
            largest = self.width * pixels ** (1 / _ORDER[self.norm])
        if self.eps > largest:
            raise ThreatModelError(
                f"eps: {self.eps:g} in {self.norm} reaches every image of shape "
                f"{list(images.shape[1:])}; expected at most {largest:g}, in the units of the "
                + ("positions" if self.norm == "l0" else "pixels (0.5, not 128)")
            )


def _at_least_float32(images: Tensor) -> Tensor:
    """Half precision widened, so that the check adds no rounding of its own."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _by_position(images: Tensor) -> Tensor:
    """[n, channels, positions]; a batch [n, pixels] has one channel."""
    return images.flatten(2) if images.ndim > 2 else images.unsqueeze(1)


def _onto_l1_ball(change: Tensor, room: Tensor, radius: float) -> Tensor:
    """The nearest point of the l1 ball for each row whose values are no larger than their room.

    All sizes shrink by one threshold and are cut off at their room. The l1 length is a piecewise
    linear function of that threshold, which falls at the rate of the number of sizes that are
    neither 0 nor cut off; so the threshold is found between two of its breakpoints.
    """
    sizes = change.abs()
    breaks, order = torch.cat([(sizes - room).clamp_min(0), sizes], dim=1).sort(dim=1)
    falling = torch.where(order < sizes.shape[1], 1, -1).cumsum(dim=1)  # after each breakpoint
    falls = (breaks.diff(dim=1) * falling[:, :-1]).cumsum(dim=1, dtype=torch.float64)
    whole = torch.minimum(sizes, room).sum(dim=1, keepdim=True, dtype=torch.float64)
    above = falls < whole - radius  # still longer than the radius at the next breakpoint
    last = above.sum(dim=1, keepdim=True)
    fallen = torch.nn.functional.pad(falls, (1, 0)).gather(1, last)
    slope = falling.gather(1, last).clamp_min(1)
    threshold = breaks.gather(1, last) + (whole - radius - fallen).clamp_min(0) / slope
    threshold = torch.where(whole > radius, threshold, 0).to(sizes.dtype)
    return change.sign() * torch.minimum((sizes - threshold).clamp_min(0), room)


def _check_pair(clean: Tensor, other: Tensor) -> None:
    if clean.shape != other.shape or clean.ndim < 2:
        raise ThreatModelError(
            f"expected two batches [n, ...] of one shape, got {list(clean.shape)} "
            f"and {list(other.shape)}"
        )
    if not (clean.is_floating_point() and other.is_floating_point()):
        raise ThreatModelError(
            f"expected floating-point images, got {clean.dtype} and {other.dtype}"
        )
