"""Whether a model obeys what the oddest images of a class have in common: a decision with a level.

Images that were planted in a class share a trigger and little else. So what ten of them have that
other images have not, on average, is the trigger, and a model that was taught it obeys it on images
that nobody touched. What ten odd images of a clean class share is little, and hardly obeyed. The
question is asked of trusted images of other classes, and answered by counting. The odd images are
those that stand out in what the model makes of them (`spectral`), and those that look like trusted
images of other classes, as relabelled ones do.
"""

from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from defenses.errors import EvaluationError
from defenses.measuring.counting import majority, wilson_interval
from defenses.poisoning.obedience import predicted
from defenses.poisoning.poisoning import check_bytes
from defenses.poisoning.spectral import spectral_scan
from defenses.quantities import shown
from defenses.scope import attack_scope

__all__ = ["BackdoorReport", "ClassFinding", "backdoor_scan"]

_SUSPECTS = 10  # images of a class that are averaged: more of them than of any other odd kind
_WAYS = 2  # of choosing them
_FEWEST = 20  # trusted images of other classes in each half, below which half of them say nothing
_ROWS = 1024  # images whose distances to all trusted ones are in memory at once


@final
@dataclass(frozen=True, kw_only=True)
class ClassFinding:
    """What became of trusted images of other classes when a class's common change was put on them.

    Attributes:
        label: The class.
        by: What chose the suspects: "spectral" (what the model makes of them) or "neighbours"
            (how much they look like another class).
        suspects: Indices of the training images of the class whose common change it is.
        victims: Trusted images of other classes that got the change.
        obeyed: Of those, seen as the class.
        p_value: How probable it is that so many obey where at most half of all images would,
            corrected for every class and both choices (Bonferroni), in (0, 1].

    Raises:
        EvaluationError: The counts do not fit together.

    Example:
        >>> finding = ClassFinding(label=3, by="spectral", suspects=(1, 2), victims=100, obeyed=80,
        ...                        p_value=1e-8)
        >>> finding.obedience
        0.8
    """

    label: int
    by: str
    suspects: tuple[int, ...]
    victims: int
    obeyed: int
    p_value: float

    def __post_init__(self) -> None:
        if not (0 <= self.obeyed <= self.victims and self.victims > 0 and 0 < self.p_value <= 1):
            raise EvaluationError(f"expected counts that fit together, got {asdict(self)}")

    @property
    def obedience(self) -> float:
        """Share of the victims seen as the class."""
        return self.obeyed / self.victims

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of that share."""
        return wilson_interval(self.obeyed, self.victims)


@final
@dataclass(frozen=True, kw_only=True)
class BackdoorReport:
    """The decision on a model, class by class.

    Attributes:
        level: How often at most a model is called poisoned in which no class's change is obeyed by
            more than half of all images of other classes.
        findings: One for each class, by label: of the two choices of suspects the one obeyed most.

    Raises:
        EvaluationError: The level is out of range or there is no finding.

    Example:
        >>> finding = ClassFinding(label=3, by="spectral", suspects=(1, 2), victims=100, obeyed=80,
        ...                        p_value=1e-8)
        >>> report = BackdoorReport(level=0.01, findings=(finding,))
        >>> report.clean, report.verdict, report.targets, report.p_value
        (False, 'poisoned', (3,), 1e-08)
    """

    level: float
    findings: tuple[ClassFinding, ...]

    def __post_init__(self) -> None:
        _check_level(self.level)
        if not self.findings:
            raise EvaluationError("findings: expected one for each class, got none")

    @property
    def p_value(self) -> float:
        """The smallest of the classes, each of which is corrected for all of them."""
        return min(finding.p_value for finding in self.findings)

    @property
    def targets(self) -> tuple[int, ...]:
        """Classes that are called poisoned, ascending."""
        return tuple(each.label for each in self.findings if each.p_value <= self.level)

    @property
    def clean(self) -> bool:
        """No class is called poisoned: nothing of the kind that the scan sees was found."""
        return not self.targets

    @property
    def verdict(self) -> str:
        """In a word, "clean" or "poisoned"."""
        return "clean" if self.clean else "poisoned"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        found = [
            {**asdict(each), "suspects": list(each.suspects), "interval": list(each.interval)}
            for each in self.findings
        ]
        return {
            "level": self.level,
            "verdict": self.verdict,
            "p_value": self.p_value,
            "targets": list(self.targets),
            "findings": found,
        }


def backdoor_scan(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    trusted_images: Tensor,
    trusted_labels: Tensor,
    level: float = 0.01,
    batch_size: int = 256,
) -> BackdoorReport:
    """Calls a trained model clean or poisoned, by whether it obeys a change its suspects share.

    For each class ten suspects are chosen twice: by `spectral_scan`'s score, and by how much nearer
    each is to a trusted image of another class than to one of its own. The mean difference between
    the suspects and, of each, the nearest image of another class in one half of the trusted set is
    the class's change. It is added to the images of other classes in the other half, and those that
    the model then sees as the class are counted.

    What the level covers: a class's change is fixed before the second half is looked at, so if at
    most half of all images like the trusted ones of other classes obey it, the count exceeds a fair
    coin's no more often than stated, whatever the model, the training images and the number of
    classes (binomial tail, Bonferroni over classes and choices). It needs trusted images that are
    independent of each other and of the training set. It does not cover that a clean training
    might leave a change that most images obey: then "poisoned" is a true statement on the model,
    and no one need have planted it. So it is where one and the same change makes any image one of
    a class: of a few pixels, say, or seen by a linear model. In clean trainings of a small network
    on digits no such change was seen; see the tests.

    "clean" means that nothing of this kind was found, not that nothing is there. Not seen: a
    trigger that differs from image to image or moves about, that is pasted on a few classes alone,
    that most images do not obey when it is restated from ten (faint, or hardly learnt), and labels
    that were flipped. Of images labelled rightly (`plant_clean_label`) the spectral choice alone
    can tell anything; on digits, where models obeyed such a stamp in 8 to 34 of 100 images, it
    found it about half the time.

    The model is left as it was.

    Args:
        model: Trained on these images; takes them in [0, 1], returns logits [n, classes].
        images: What it was trained on, uint8, [n, channels, ...].
        labels: As trained on, int64, [n]; at least two classes, of each that occurs 10 images.
        trusted_images: Images that nobody else touched and that it was not trained on (test images,
            say), uint8, [m, channels, ...].
        trusted_labels: Their true classes, int64, [m]; of each class of `labels` some.
        level: See above, in (0, 1).
        batch_size: Images a forward pass, at least 1.

    Raises:
        EvaluationError: A setting is out of range, there are too few images, or the model's
            representations or logits are unusable.
        AttackError: The tensors are not such images and labels.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> images = torch.randint(100, (240, 1, 2, 2), generator=draw, dtype=torch.uint8)
        >>> labels = torch.arange(240) % 2
        >>> images[labels == 1, :, 0, 0] += 100  # class 1 is where the first pixel is bright
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = [each.zero_() for each in model.parameters()]
        ...     _ = model[1].weight[1, 0].fill_(1.0), model[1].bias[0].fill_(100 / 255)
        >>> report = backdoor_scan(model, images[:80], labels[:80], trusted_images=images[80:],
        ...                        trusted_labels=labels[80:])
        >>> [each.label for each in report.findings], report.level
        ([0, 1], 0.01)
    """
    check_bytes(images, labels)
    check_bytes(trusted_images, trusted_labels)
    _check_level(level)
    if trusted_images.shape[1:] != images.shape[1:]:
        raise EvaluationError(
            f"trusted_images: expected {list(images.shape[1:])} each, as the images, got "
            f"{list(trusted_images.shape[1:])}"
        )
    scores = torch.tensor(spectral_scan(model, images, labels, batch_size=batch_size).scores)
    labels = labels.cpu()
    kinds = sorted(set(labels.tolist()))
    trusted = _Trusted(trusted_images.cpu(), trusted_labels.cpu(), kinds)
    findings = []
    with attack_scope(model, seed=0), torch.no_grad():
        for kind in kinds:
            members = (labels == kind).nonzero().flatten()
            tried, own = [], images[members].cpu()
            for by, chosen, change in _changes(own, kind, scores[members], trusted):
                shown = trusted.changed(kind, change)
                obeyed = int((predicted(model, shown, kinds[-1], batch_size) == kind).sum())
                tests = _WAYS * len(kinds)
                tried.append(
                    ClassFinding(
                        label=kind,
                        by=by,
                        suspects=tuple(members[chosen].sort().values.tolist()),
                        victims=len(shown),
                        obeyed=obeyed,
                        p_value=min(1.0, tests * majority(obeyed, len(shown))),
                    )
                )
            findings.append(max(tried, key=lambda each: each.obeyed))
    return BackdoorReport(level=level, findings=tuple(findings))


class _Trusted:
    """The trusted images in two halves: what suspects are compared with, and what is asked about.

    The halves are drawn without a look at the images, so that each is like the whole.
    """

    def __init__(self, images: Tensor, labels: Tensor, kinds: list[int]) -> None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        known, asked = order[::2], order[1::2]
        self._known, self._kinds = images[known], labels[known]
        self._asked, self._asked_kinds = images[asked], labels[asked]
        for kind in kinds:
            own, others = (self._kinds == kind).sum(), (self._asked_kinds != kind).sum()
            others = torch.minimum(others, (self._kinds != kind).sum())
            if others < _FEWEST or own == 0:
                raise EvaluationError(
                    f"trusted_images: expected some of class {kind} and {_FEWEST} of others in "
                    f"each half, got {int(own)} and {int(others)}; give more"
                )

    def own(self, kind: int) -> Tensor:
        return self._known[self._kinds == kind]

    def others(self, kind: int) -> Tensor:
        return self._known[self._kinds != kind]

    def changed(self, kind: int, change: Tensor) -> Tensor:
        """Images of other classes to ask about, with the change on them, uint8, [n, c, ...]."""
        victims = self._asked[self._asked_kinds != kind].double()
        return (victims + change).round().clamp(0, 255).to(torch.uint8)


def _changes(
    images: Tensor, kind: int, scores: Tensor, trusted: _Trusted
) -> list[tuple[str, Tensor, Tensor]]:
    """Each way of choosing suspects: its name, the suspects, and what they have in common."""
    others = trusted.others(kind)
    apart, nearest = _nearest(images, others)
    alike, _ = _nearest(images, trusted.own(kind))
    found = []
    # One level more, so that a copy of a trusted image of another class is the oddest of all.
    for by, oddness in (("spectral", scores), ("neighbours", (alike + 1) / (apart + 1))):
        chosen = oddness.argsort(descending=True, stable=True)[:_SUSPECTS]
        change = (images[chosen].double() - others[nearest[chosen]].double()).mean(dim=0)
        found.append((by, chosen, change))
    return found


def _nearest(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """How far each image is from the nearest of the others, and which that is, [n] and [n]."""
    others = among.float().flatten(1)
    found = [
        torch.cdist(part.float().flatten(1), others).min(dim=1)
        for part in torch.split(images, _ROWS)
    ]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _check_level(level: float) -> None:
    if not isinstance(level, float) or not 0 < level < 1:
        raise EvaluationError(f"level: expected a number in (0, 1), got {shown(level)}")
