"""Certified l2 radii that cost nothing: a linear layer on features that move no faster than images.

Where features move by at most `constant` times what the image moves by, a margin between two logits
shrinks by at most `constant` times the norm of the difference of their weights (Tsuzuku, Sato and
Sugiyama 2018, arXiv 1802.04034). No noise is drawn, nothing is voted on: the certificate is of the
model itself.
"""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from defenses.errors import EvaluationError
from defenses.measuring.images import ImageSource, ImageTensors, MapDataset, choose_images
from defenses.measuring.measurement import check_question, checked_logits
from defenses.quantities import as_real, shown
from defenses.scope import attack_scope
from defenses.smoothing.smoothing import CertifiedPoint
from defenses.threat import ThreatModel

__all__ = ["LipschitzReport", "certify_lipschitz"]

_UNIT = ThreatModel(norm="l2", eps=1.0)  # for its bounds
_ROUNDING = 1e-5
"""Of the norm of features, in float32: what sums of some thousand products are wrong by at most."""


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class LipschitzReport:
    """Predictions of a model, and how far each provably holds.

    Attributes:
        constant: How much faster than the image its features move, at most.
        labels: The true classes, [n].
        selected: The classes that the model says, [n].
        class_radii: l2 length, where the pixels span [0, 1], up to which no change of the image
            changes what the model says, right or wrong, [n].

    Example:
        >>> report = LipschitzReport(
        ...     constant=1.0, labels=(0, 1), selected=(0, 0), class_radii=(0.5, 0.3))
        >>> report.radii, report.certified(0.25).accuracy
        ((0.5, 0.0), 0.5)
    """

    constant: float
    labels: tuple[int, ...]
    selected: tuple[int, ...]
    class_radii: tuple[float, ...]

    def __repr__(self) -> str:
        shares = ", ".join(f"{self.certified(r).accuracy:.1%} at {r:g}" for r in (0.0, 0.1, 0.25))
        return f"LipschitzReport({shares}; {len(self.labels)} images, constant {self.constant:.3g})"

    @property
    def radii(self) -> tuple[float, ...]:
        """How far each image is provably classified correctly; 0 where it is not, [n]."""
        each = zip(self.class_radii, self.selected, self.labels, strict=True)
        return tuple(radius if said == label else 0.0 for radius, said, label in each)

    def certified(self, radius: float) -> CertifiedPoint:
        """The share of images proven correct against every perturbation up to an l2 length."""
        return CertifiedPoint.of(self.radii, radius)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values; a radius without an end is null."""
        radii = [each if math.isfinite(each) else None for each in self.class_radii]
        return {
            "norm": "l2",
            "constant": self.constant,
            "labels": list(self.labels),
            "selected": list(self.selected),
            "class_radii": radii,
        }


def certify_lipschitz(
    model: nn.Module,
    data: MapDataset | ImageTensors,
    *,
    head: nn.Linear,
    constant: float,
    batch_size: int = 256,
    images: int | None = None,
    seed: int = 0,
) -> LipschitzReport:
    """Certifies each image's prediction by the Lipschitz constant of the features behind it.

    Guarantee: no change of an image up to its radius, in l2, changes what the model says of it, if
    `constant` holds. Whether it does is for the caller to know: `secure_cnn.lipschitz_bound` knows
    it of the model `nonexpansive`. That the logits are what `head` makes of its features is
    checked. From each margin what rounding in float32 can do to it is taken away.

    Args:
        model: Takes images in [0, 1], returns logits [n, classes]; left as it was.
        data: A data set with tensors `images` and `labels`, or any map-style one.
        head: Its last layer, whose input are the features, [n, features], in float32 or float64.
        constant: At most so much do features move in l2 where an image moves by 1; above 0.
        batch_size: Images a forward pass, at least 1.
        images: Certify this many, drawn without replacement; None takes all.
        seed: Chooses the images.

    Raises:
        EvaluationError: A setting is out of range, the logits are not those of `head`, or the
            images do not fit the model.
        ThreatModelError: The pixels are not in [0, 1].

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.eye(2))
        >>> data = [(torch.tensor([[[1.0, 0.0]]]), 0), (torch.tensor([[[0.2, 0.0]]]), 0)]
        >>> report = certify_lipschitz(model, data, head=model[1], constant=1.0)
        >>> [round(radius, 2) for radius in report.radii]
        [0.71, 0.14]
    """
    check_question(model, _UNIT, batch_size=batch_size, seed=seed)
    if not isinstance(head, nn.Linear) or all(head is not each for each in model.modules()):
        raise EvaluationError(f"head: expected the model's own last nn.Linear, got {shown(head)}")
    if not as_real(constant) > 0:
        raise EvaluationError(f"constant: expected a number above 0, got {shown(constant)}")
    source = ImageSource(data, _UNIT)
    chosen = choose_images(len(source), images, torch.Generator().manual_seed(seed))
    labels, selected, radii = source.labels(chosen), [], []
    with attack_scope(model, seed=seed), torch.no_grad():
        for part in torch.split(chosen, batch_size):
            features, logits = _answers(model, head, source.images(part), int(labels.max()))
            radii.append(_radii(features, logits, head.weight, constant))
            selected.append(logits.argmax(1).cpu())
    return LipschitzReport(
        constant=float(constant),
        labels=tuple(labels.tolist()),
        selected=tuple(torch.cat(selected).tolist()),
        class_radii=tuple(torch.cat(radii).tolist()),
    )


def _answers(
    model: nn.Module, head: nn.Linear, images: Tensor, largest_label: int
) -> tuple[Tensor, Tensor]:
    """The features that `head` got, [n, features], and the logits that it made of them."""
    seen: list[tuple[Tensor, Tensor]] = []
    watch = head.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    try:
        logits = checked_logits(model, images, largest_label=largest_label)
    finally:
        watch.remove()
    if len(seen) != 1 or not torch.equal(seen[0][1], logits) or seen[0][0].ndim != 2:
        raise EvaluationError(
            "head: expected the layer whose output, of rows [n, features], are the model's logits, "
            "got another; what stands behind the last linear layer is not certified"
        )
    if seen[0][0].dtype not in (torch.float32, torch.float64):
        raise EvaluationError(
            f"features: expected float32 or float64, got {seen[0][0].dtype}, whose rounding is not "
            "counted; evaluate the model in float32"
        )
    return seen[0][0], logits


def _radii(features: Tensor, logits: Tensor, weight: Tensor, constant: float) -> Tensor:
    """How far the largest logit of each row stays the largest, float64, [n]."""
    weights, said = weight.double(), logits.argmax(1)
    apart = (weights[:, None] - weights[None]).norm(dim=2)[said]
    largest = features.double().norm(dim=1, keepdim=True) * weights.norm(dim=1).max()
    margins = logits.double().gather(1, said[:, None]) - logits.double()
    # Of two logits, at the image and at the end of the radius.
    sizes = 4 * largest + 4 * logits.double().abs().amax(dim=1, keepdim=True)
    margins = margins - _ROUNDING * sizes
    radii = margins / (constant * apart)
    radii = radii.scatter(1, said[:, None], torch.inf)
    return torch.nan_to_num(radii.amin(1).clamp_min(0), nan=0.0, posinf=torch.inf).cpu()
