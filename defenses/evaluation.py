"""Measures how robust a model is: `evaluate(model, data, threat)` gives a `RobustnessReport`.

Every image must survive every attack (worst case per image). Images already misclassified are not
attacked, and fooled ones are not attacked again: their verdict is known. Which images, in which
order and from which random starts follows from the seed.

Deliberately not here: verdicts on gradient masking, and the AutoAttack ensemble.
"""

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from defenses.attacks import Attack, Setting, attack
from defenses.errors import EvaluationError
from defenses.report import AdversarialExamples, RobustnessReport
from defenses.scope import attack_scope, check_logits, home_of
from defenses.threat import ThreatModel

__all__ = ["ImageTensors", "MapDataset", "evaluate"]

_EXAMPLES = 8

_Crafter = Callable[[nn.Module, Tensor, Tensor], Tensor]


class MapDataset(Protocol):
    """A data set that is read by index, as torch's map-style ones are.

    Example:
        >>> data: MapDataset = [(torch.zeros(1, 8, 8), 3)]
        >>> len(data)
        1
    """

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The image [channels, height, width] and its label."""


class ImageTensors(Protocol):
    """A data set that holds everything as two tensors.

    Attributes:
        images: uint8 (read as [0, 1]) or floating point, [n, channels, height, width].
        labels: int64, [n].

    Example:
        >>> from types import SimpleNamespace
        >>> data: ImageTensors = SimpleNamespace(
        ...     images=torch.zeros(2, 1, 8, 8), labels=torch.tensor([0, 1])
        ... )
    """

    @property
    def images(self) -> Tensor:
        """All images."""

    @property
    def labels(self) -> Tensor:
        """Their true classes."""


def evaluate(
    model: nn.Module,
    data: MapDataset | ImageTensors,
    threat: ThreatModel,
    *,
    attacks: Sequence[str | Attack | _Crafter] = ("pgd", "apgd"),
    samples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> RobustnessReport:
    """Attacks every image that the model gets right, and reports what survives.

    The standard attacks run 100 steps: PGD from a random start with steps of 2.5 eps / 100
    (Madry et al. 2018), APGD on the cross-entropy (Croce & Hein 2020). The model is left as it
    was, and so are the global random states.

    Args:
        model: Takes images in the threat model's bounds, returns logits [n, classes].
        data: A data set with tensors `images` and `labels`, or any map-style one of (image,
            label) that gives the same example for the same index.
        threat: The ball.
        attacks: Names, configured attacks, or your own `(model, images, labels) -> images`; the
            cheapest first, since what one fools the next need not try.
        samples: Evaluate this many images, drawn without replacement; None takes all.
        batch_size: Images a forward pass, at least 1.
        seed: Chooses the images and every random start, 0 <= seed < 2**63.
        progress: Show a bar on stderr when that is a terminal.

    Raises:
        ThreatModelError: The images are not in the bounds.
        AttackError: An attack cannot run on this model.
        EvaluationError: The data is empty or does not fit the model, its logits are unusable, or
            an attack searches another ball or leaves it.

    Example:
        >>> data = [(torch.tensor([[[0.9, 0.1]]]), 0), (torch.tensor([[[0.5, 0.6]]]), 1)]
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> report = evaluate(nn.Flatten(), data, threat, attacks=["fgsm"])
        >>> report.clean_accuracy, report.worst_case_accuracy
        (1.0, 0.5)
    """
    plans = _plan(attacks, threat)
    if batch_size < 1 or not 0 <= seed < 2**63:
        raise EvaluationError(
            f"expected batch_size >= 1 and a seed in [0, 2**63), got {batch_size} and {seed}"
        )
    generator = torch.Generator().manual_seed(seed)
    source = _Source(data, threat)
    indices = _choose(len(source), samples, generator)
    with attack_scope(model, seed=seed), _progress_bar(shown=progress) as bar:
        trial = _Trial(model, source, indices, threat, batch_size, bar)
        robust = {plan.name: trial.attack(plan, generator) for plan in plans}
        examples = trial.examples()
    return RobustnessReport(
        threat=threat,
        classes=trial.classes,
        indices=tuple(indices.tolist()),
        labels=tuple(trial.labels.tolist()),
        predictions=tuple(trial.predictions.tolist()),
        robust=robust,
        settings={plan.name: plan.settings for plan in plans},
        seed=seed,
        versions=_versions(),
        examples=examples,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One attack of the evaluation under the name it has in the report."""

    name: str
    craft: Callable[[nn.Module, Tensor, Tensor, int], Tensor]
    settings: Mapping[str, Setting]


def _plan(attacks: Sequence[str | Attack | _Crafter], threat: ThreatModel) -> list[_Plan]:
    """Makes every attack a plan with a name of its own."""
    if isinstance(attacks, str) or not attacks:
        raise EvaluationError(f"attacks: expected a sequence of at least one, got {attacks!r}")
    plans: list[_Plan] = []
    for each in attacks:
        plan = _plan_one(each, threat)
        taken = sum(other.name.partition(" #")[0] == plan.name for other in plans)
        name = f"{plan.name} #{taken + 1}" if taken else plan.name
        plans.append(_Plan(name=name, craft=plan.craft, settings=plan.settings))
    return plans


def _plan_one(given: str | Attack | _Crafter, threat: ThreatModel) -> _Plan:
    """The plan of one attack; refuses one that searches another ball."""
    if isinstance(given, str):
        given = attack(given, threat)
    if not isinstance(given, Attack):
        return _plan_callable(given)
    if given.threat != threat or given.radius > threat.eps:
        raise EvaluationError(
            f"{given!r} reaches {given.radius:g}; expected an attack on {threat}"
            + ("; n-fgsm is for training" if given.name == "n-fgsm" else "")
        )
    configured = given
    return _Plan(
        name=configured.name,
        craft=lambda model, images, labels, seed: configured(model, images, labels, seed=seed),
        settings=configured.settings,
    )


def _plan_callable(given: _Crafter) -> _Plan:
    """The plan of an attack of the user's own, which goes through the same door."""
    if not callable(given):
        raise EvaluationError(f"attacks: expected a name or a callable, got {given!r}")

    def craft(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with attack_scope(model, seed=seed):
            return given(model, images, labels)

    name = getattr(given, "__name__", type(given).__name__)
    return _Plan(name=str(name), craft=craft, settings={})


def _choose(count: int, samples: int | None, generator: torch.Generator) -> Tensor:
    """Which images to evaluate, in ascending order."""
    if count == 0:
        raise EvaluationError("data: expected at least one image, got none")
    if samples is None:
        return torch.arange(count)
    if not 1 <= samples <= count:
        raise EvaluationError(f"samples: expected 1 to {count} (the data set), got {samples}")
    return torch.randperm(count, generator=generator)[:samples].sort().values


@final
class _Source:
    """The images by index, checked, whatever kind of data set they come from."""

    def __init__(self, data: MapDataset | ImageTensors, threat: ThreatModel) -> None:
        images, labels = getattr(data, "images", None), getattr(data, "labels", None)
        self._tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            self._tensors = (images, labels)
        self._data, self._threat = data, threat

    def __len__(self) -> int:
        if self._tensors is None:
            return len(self._data)  # type: ignore[arg-type]  # then it is a MapDataset
        images, labels = self._tensors
        if len(images) != len(labels):
            raise EvaluationError(f"data: got {len(images)} images but {len(labels)} labels")
        return len(images)

    def labels(self, indices: Tensor) -> Tensor:
        """The true classes, int64, [k]."""
        if self._tensors is not None:
            labels = self._tensors[1][indices].cpu()
        else:
            labels = torch.tensor([self._example(index)[1] for index in indices.tolist()])
        if labels.ndim != 1 or labels.dtype != torch.int64 or int(labels.min()) < 0:
            raise EvaluationError(
                f"labels: expected int64 of shape [n] and none negative, got {labels.dtype} of "
                f"shape {list(labels.shape)}, the smallest {labels.min().item()}"
            )
        return labels

    def images(self, indices: Tensor) -> Tensor:
        """The images, floating point in the threat model's bounds, [k, c, h, w]."""
        if self._tensors is not None:
            images = self._tensors[0][indices]
        else:
            each = [self._example(index)[0] for index in indices.tolist()]
            if len({image.shape for image in each}) > 1:
                raise EvaluationError(f"data: images of several shapes, such as {each[0].shape}")
            images = torch.stack(each)
        if images.ndim != 4:
            raise EvaluationError(
                f"data: expected images [channels, height, width], got {list(images.shape[1:])}"
            )
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        self._threat.check_images(images)
        return images

    def _example(self, index: int) -> tuple[Tensor, int]:
        """One example of a map-style data set."""
        image, label = self._data[index]  # type: ignore[index]  # then it is a MapDataset
        if not isinstance(image, Tensor):
            raise EvaluationError(
                f"data[{index}]: expected a tensor, got {type(image).__name__}; convert it first"
            )
        try:
            return image, int(label)
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                f"data[{index}]: expected an integer label, got {label!r}"
            ) from error


@final
class _Trial:
    """One evaluation under way: which images still stand."""

    def __init__(
        self,
        model: nn.Module,
        source: _Source,
        indices: Tensor,
        threat: ThreatModel,
        batch_size: int,
        bar: Progress,
    ) -> None:
        self._model, self._source, self._indices = model, source, indices
        self._threat, self._batch_size, self._bar = threat, batch_size, bar
        self.labels = source.labels(indices)
        self.classes = 0
        everyone = torch.arange(len(indices))
        self.predictions = torch.cat(
            [self._predict(self._images(part)) for part in self._batches("clean", everyone)]
        )
        self._standing = self.predictions == self.labels
        self._examples = self._standing.nonzero().flatten()[:_EXAMPLES]
        self._shown: dict[int, tuple[Tensor, Tensor]] = {}

    def attack(self, plan: _Plan, generator: torch.Generator) -> tuple[bool, ...]:
        """Runs one attack on the images that still stand, and says which do afterwards."""
        for part in self._batches(plan.name, self._standing.nonzero().flatten()):
            images = self._images(part)
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            adversarial = plan.craft(self._model, images, self.labels[part].to(images.device), seed)
            self._check_promise(plan.name, images, adversarial)
            predictions = self._predict(adversarial)
            self._standing[part] = predictions == self.labels[part]
            for row in torch.isin(part, self._examples).nonzero().flatten().tolist():
                self._shown[int(part[row])] = (adversarial[row].cpu(), predictions[row])
        return tuple(self._standing.tolist())

    def examples(self) -> AdversarialExamples | None:
        """The first images that were attacked; None when none was."""
        if not self._shown:
            return None
        positions = torch.tensor(sorted(self._shown))
        shown = [self._shown[position] for position in positions.tolist()]
        return AdversarialExamples(
            clean=self._images(positions).cpu(),
            adversarial=torch.stack([image for image, _ in shown]),
            labels=self.labels[positions],
            predictions=torch.stack([prediction for _, prediction in shown]),
        )

    def _images(self, positions: Tensor) -> Tensor:
        """The images at these positions of the choice, where the model is."""
        images = self._source.images(self._indices[positions])
        device, dtype = home_of(self._model, images)
        return images.to(device=device, dtype=dtype)

    def _predict(self, images: Tensor) -> Tensor:
        """The classes that the model sees, on the CPU, [k]."""
        with torch.no_grad():
            logits = check_logits(
                self._model(images),
                count=len(images),
                largest_label=int(self.labels.max()),
                error=EvaluationError,
            )
        self.classes = logits.shape[1]
        return logits.argmax(dim=1).cpu()

    def _check_promise(self, name: str, images: Tensor, adversarial: object) -> None:
        """Refuses images outside the ball: they would make the model look worse than it is."""
        if not isinstance(adversarial, Tensor) or adversarial.shape != images.shape:
            shape = getattr(adversarial, "shape", type(adversarial).__name__)
            raise EvaluationError(f"{name}: expected images {list(images.shape)}, got {shape}")
        outside = int((~self._threat.contains(images, adversarial)).sum())
        if outside:
            raise EvaluationError(
                f"{name}: {outside} of {len(images)} images are outside {self._threat}"
            )

    def _batches(self, title: str, positions: Tensor) -> Iterator[Tensor]:
        """The positions in batches, counted off on the bar as they are done."""
        task = self._bar.add_task(title, total=len(positions))
        for part in torch.split(positions, self._batch_size):
            if len(part):
                yield part
                self._bar.advance(task, len(part))


def _progress_bar(*, shown: bool) -> Progress:
    """A bar on stderr that leaves nothing behind; silent when stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )


def _versions() -> dict[str, str]:
    """What the figures depend on, apart from the model and the data."""
    packages = ("torch", "torchattacks", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
