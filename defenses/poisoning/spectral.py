"""Spectral signatures: which training images of a class vary as no other class does.

A backdoor leaves a trace in what a network makes of the images: those that were planted in a class
add a direction of variance to it (Tran et al. 2018, arXiv 1811.00636), which shows best once the
ordinary variance is divided out (Hayase et al. 2021, arXiv 2104.11315). What is ordinary is taken
from the other classes. Deliberately not here: planting (`poisoning`) and removal; look at what is
flagged, or train again without it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from defenses.errors import EvaluationError
from defenses.poisoning.poisoning import check_bytes
from defenses.quantities import as_real, is_whole, is_word, shown
from defenses.scope import attack_scope, check_module, home_of

__all__ = ["SpectralReport", "spectral_scan"]

_FEWEST = 10  # images of a class, below which it has no direction to speak of
_WIDTH = 512  # numbers of a representation; longer ones are folded, which keeps memory bounded
_RIDGE = 0.1  # of the mean variance, added to each: a class has fewer images than directions
_CENTRE = 0.4  # quantile: in the clean half still where almost half of a class is planted
_MOST = 2 / 3  # of all flagged images in one class: more are no chance


@final
@dataclass(frozen=True, kw_only=True)
class SpectralReport:
    """How far each training image lies from the rest of its class.

    Attributes:
        layers: Dotted names of the layers that were looked at.
        false_alarms: Share of clean images that was to be flagged.
        labels: Class of each image, [n].
        scores: Distance from the class's bulk along its own direction, in standard deviations of
            the other classes, in the layer where that is largest, [n].
        threshold: Images with a larger score are flagged.

    Raises:
        EvaluationError: The parts do not fit together.

    Example:
        >>> report = SpectralReport(layers=("head",), false_alarms=0.05, labels=(0, 0, 1),
        ...                         scores=(1.0, 9.0, 2.0), threshold=3.0)
        >>> report.flagged, report.flagged_shares
        ((1,), {0: 0.5, 1: 0.0})
    """

    layers: tuple[str, ...]
    false_alarms: float
    labels: tuple[int, ...]
    scores: tuple[float, ...]
    threshold: float

    def __post_init__(self) -> None:
        if not self.labels or len(self.labels) != len(self.scores):
            raise EvaluationError(
                f"expected one label and score for each of n >= 1 images, got {len(self.labels)} "
                f"and {len(self.scores)}"
            )

    @property
    def flagged(self) -> tuple[int, ...]:
        """Indices of the images whose score is above the threshold, ascending."""
        return tuple(i for i, score in enumerate(self.scores) if score > self.threshold)

    @property
    def flagged_shares(self) -> dict[int, float]:
        """By class, the share of its images that is flagged."""
        flagged = [self.labels[index] for index in self.flagged]
        return {
            label: flagged.count(label) / self.labels.count(label)
            for label in sorted(set(self.labels))
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            "layers": list(self.layers),
            "false_alarms": self.false_alarms,
            "labels": list(self.labels),
            "scores": list(self.scores),
            "threshold": self.threshold,
            "flagged": list(self.flagged),
            "flagged_shares": {str(k): share for k, share in self.flagged_shares.items()},
        }


def spectral_scan(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None = None,
    false_alarms: float = 0.05,
    batch_size: int = 256,
) -> SpectralReport:
    """Scores the images a model was trained on, and flags those that are unlike their class.

    In each layer a class's representations are whitened by the mean covariance of the *other*
    classes; the direction in which it then varies most is its own. A score is the distance along
    it from the class's bulk, and the largest over the layers counts. A share of `false_alarms` of
    all images is flagged; where one class holds more than two thirds of them, the threshold is
    found anew without that class, and more of it is flagged.

    Measured with the default `Trigger`, on ten sets each that it was not tuned on (other seeds and
    classes, a small network): of 1, 5 and 10 % planted it found 100, 100 and 100 % on digits, and
    82, 98 and 99 % on 6000 images of Fashion-MNIST, where it missed those triggers that the model
    obeyed least. It flagged 5 % of clean sets, and of the clean images among planted ones 4 to
    6 %; with other patches up to 9 %.

    It says which images to look at, not whether a set is clean: a share of `false_alarms` is always
    flagged. What is not flagged is not thereby clean. A patch in a random place was found on digits
    to a half, a faint pattern over the whole image hardly, flipped labels by chance. A trigger that
    is planted in every class is not seen. Nor does a flag say that the model obeys: early layers
    show a stamp to a model that never learnt it; ask `backdoor_scan`, which decides, or
    `attack_success_rate`.

    The model is left as it was.

    Args:
        model: Trained on these images; takes them in [0, 1].
        images: uint8, [n, channels, ...].
        labels: As trained on, int64, [n]; at least two classes, of each that occurs 10 images.
        layer: Dotted name of a module, whose output alone is looked at; None takes what enters
            each `torch.nn.Conv2d` and `torch.nn.Linear` but the first.
        false_alarms: Share of images to flag where none is planted, in (0, 1).
        batch_size: Images a forward pass, at least 1.

    Raises:
        EvaluationError: A setting is out of range, no layer is there or was reached, the
            representations are not finite or all alike, or a class has too few images.
        AttackError: The tensors are not such images and labels.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> images = torch.randint(100, (40, 1, 2, 2), generator=draw, dtype=torch.uint8)
        >>> images[:3] = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> labels = torch.arange(40) // 20
        >>> spectral_scan(model, images, labels, false_alarms=0.1).flagged[:3]
        (0, 1, 2)
    """
    check_bytes(images, labels)
    false_alarms, told = as_real(false_alarms), shown(false_alarms)
    if not 0 < false_alarms < 1 or not is_whole(batch_size, least=1):
        raise EvaluationError(
            f"expected false_alarms in (0, 1) and batch_size >= 1, got {told} and "
            f"{shown(batch_size)}"
        )
    check_module(model)
    counts = Counter(labels.tolist())
    if len(counts) < 2 or min(counts.values()) < _FEWEST:
        raise EvaluationError(
            f"labels: expected two classes and at least {_FEWEST} images of each, got "
            f"{dict(counts)}"
        )
    found = _representations(model, images, layer, batch_size)
    found = {name: rows for name, rows in found.items() if bool((rows != rows[0]).any())}
    if not found:
        raise EvaluationError("representations: expected images to differ in some layer, all agree")
    classes = labels.cpu()
    scores = torch.stack([_scores(rows, classes) for rows in found.values()]).amax(dim=0)
    return SpectralReport(
        layers=tuple(found),
        false_alarms=false_alarms,
        labels=tuple(labels.tolist()),
        scores=tuple(scores.tolist()),
        threshold=_threshold(scores, classes, false_alarms),
    )


def _representations(
    model: nn.Module, images: Tensor, layer: str | None, batch_size: int
) -> dict[str, Tensor]:
    """What each layer makes of the images, folded, float64 on the CPU, [n, d], in their order."""
    modules = dict(model.named_modules())
    if layer is not None and not is_word(layer, modules):
        raise EvaluationError(f"layer: expected one of {', '.join(modules)}, got {shown(layer)}")
    watched = [layer] if layer is not None else _weighted(model)
    seen: dict[str, list[Tensor]] = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, inputs: Sequence[Any], output: Any) -> None:
            looked_at = inputs[0] if layer is None else output
            if not isinstance(looked_at, Tensor):
                raise EvaluationError(f"layer: expected {name!r} to give a tensor; name another")
            seen.setdefault(name, []).append(_fold(looked_at.detach().flatten(1)))

        return record

    device, dtype = home_of(model, torch.empty(0))
    handles = [modules[name].register_forward_hook(recorder(name)) for name in watched]
    try:
        with attack_scope(model, seed=0), torch.no_grad():
            for part in torch.split(images, batch_size):
                model(part.to(device).float().div_(255).to(dtype))
    finally:
        for handle in handles:
            handle.remove()
    found = {name: torch.cat(parts) for name, parts in seen.items()}
    # A layer that is used twice has no one representation; nor one that sees images in pieces.
    found = {name: rows for name, rows in found.items() if len(rows) == len(images)}
    if not found:
        raise EvaluationError(
            f"layer: expected one of {', '.join(watched)} to see each of {len(images)} images once"
        )
    if not all(bool(torch.isfinite(rows).all()) for rows in found.values()):
        raise EvaluationError("model: expected finite representations; has training diverged?")
    names = list(found)
    # What enters the first is the image itself: no work of the model, unless it has one layer.
    return {name: found[name] for name in (names[1:] or names)}


def _weighted(model: nn.Module) -> list[str]:
    kinds = (nn.Conv2d, nn.Linear)
    names: list[str] = [name for name, each in model.named_modules() if isinstance(each, kinds)]
    if not names:
        raise EvaluationError(
            "model: expected a torch.nn.Conv2d or torch.nn.Linear, got none; name the layer whose "
            "output to look at"
        )
    return names


def _fold(rows: Tensor) -> Tensor:
    """At most `_WIDTH` numbers a row that keep distances (feature hashing, arXiv 0902.2206)."""
    rows = rows.to("cpu", torch.float64, copy=True)
    width = rows.shape[1]
    if width <= _WIDTH:
        return rows
    draw = torch.Generator().manual_seed(0)
    place = torch.randint(_WIDTH, (width,), generator=draw)
    sign = torch.randint(2, (width,), generator=draw) * 2 - 1
    return rows.new_zeros(len(rows), _WIDTH).index_add_(1, place, rows * sign)


def _scores(rows: Tensor, classes: Tensor) -> Tensor:
    """How far each row is from its class's bulk along the class's own direction, [n]."""
    kinds = torch.tensor(sorted(set(classes.tolist())))
    covariances = torch.stack([torch.cov(rows[classes == kind].T, correction=0) for kind in kinds])
    scores = rows.new_zeros(len(rows))
    for position, kind in enumerate(kinds):
        ordinary = (covariances.sum(dim=0) - covariances[position]) / (len(kinds) - 1)
        along = rows @ _own_direction(covariances[position], ordinary)
        medians = torch.stack([along[classes == other].quantile(0.5) for other in kinds])
        elsewhere = medians[kinds != kind].quantile(0.5)
        own = along[classes == kind]
        # Where half of a class is planted, the clean half is the one that is like other classes.
        ends = own.quantile(torch.tensor([_CENTRE, 1 - _CENTRE], dtype=own.dtype))
        scores[classes == kind] = (own - ends[(ends - elsewhere).abs().argmin()]).abs()
    return scores


def _own_direction(covariance: Tensor, ordinary: Tensor) -> Tensor:
    """The direction of the largest variance, in units of the ordinary one, [d]."""
    ridge = _RIDGE * (ordinary + covariance).diagonal().mean()
    root = torch.linalg.cholesky(ordinary + ridge * torch.eye(len(ordinary), dtype=ordinary.dtype))
    half = torch.linalg.solve_triangular(root, covariance, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    first = torch.linalg.eigh(whitened).eigenvectors[:, -1:]
    direction: Tensor = torch.linalg.solve_triangular(root.T, first, upper=True)[:, 0]
    return direction


def _threshold(scores: Tensor, classes: Tensor, false_alarms: float) -> float:
    """What a share of the scores exceeds; of the other classes' if one class holds most of them."""
    threshold = scores.quantile(1 - false_alarms)
    flagged = Counter(classes[scores > threshold].tolist())
    for kind, count in flagged.most_common(1):
        if count > _MOST * flagged.total():
            threshold = scores[classes != kind].quantile(1 - false_alarms)
    return float(threshold)
