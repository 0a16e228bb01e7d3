"""A model under suspicion: some images, and what fools it on them.

What several checks need is attacked once and kept. Deliberately not here: any judgement.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.by_name import attack, attack_names
from defenses.errors import AttackError, EvaluationError
from defenses.measuring.images import choose_images
from defenses.measuring.measurement import Measurement, checked_logits
from defenses.quantities import shown
from defenses.scope import attack_scope
from defenses.threat import ThreatModel

__all__ = ["CheckSettings", "Subject"]

_BY_GRADIENT = frozenset({"pgd", "apgd", "apgdt", "fab"})


@final
@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """How thoroughly to check.

    Attributes:
        samples: Images to look at, at least 1; fewer where there are fewer.
        steps: Of the iterative attack, at least 1; twice as many are run for comparison.
        queries: Of the black-box attack for each image, at least 1.
        draws: Of random noise for each image, at least 1.
        planted: Vulnerabilities to plant, at least 1.
        spot: Images on which the standard AutoAttack, and rescaled logits, are tried after the
            evaluation's own attacks, at least 1; fewer where there are fewer.
        surrogate: Another model of the same task, plainly trained, for the transfer attack.

    Raises:
        EvaluationError: A number is below 1, or the surrogate is no module.

    Example:
        >>> CheckSettings(samples=0)
        Traceback (most recent call last):
        ...
        defenses.errors.EvaluationError: samples: expected a whole number, at least 1, got 0
    """

    samples: int = 256
    steps: int = 50
    queries: int = 500
    draws: int = 20
    planted: int = 32
    spot: int = 128
    surrogate: nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "queries", "draws", "planted", "spot"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise EvaluationError(
                    f"{name}: expected a whole number, at least 1, got {shown(value)}"
                )
        if self.surrogate is not None and not isinstance(self.surrogate, nn.Module):
            raise EvaluationError(
                f"surrogate: expected a torch.nn.Module, got {type(self.surrogate).__name__}"
            )


@final
class Subject:
    """A model with the images that it is checked on; used inside an `attack_scope`.

    Some of the measurement's clean images, where the model is; the attacks that the robust accuracy
    rests on; and the model `unasked`, a copy from before it was asked anything, if there is one.
    """

    def __init__(
        self,
        measurement: Measurement,
        settings: CheckSettings,
        attacks: Sequence[Attack],
        *,
        unasked: nn.Module | None,
    ) -> None:
        indices = measurement.indices
        generator = torch.Generator().manual_seed(measurement.seed_of("samples"))
        few = choose_images(len(indices), min(settings.samples, len(indices)), generator)
        self._measurement = replace(measurement, indices=indices[few])
        source, chosen = measurement.source, self._measurement.indices
        self.images = measurement.at_home(source.images(chosen))
        self.labels = source.labels(chosen).to(self.images.device)
        self.model, self.threat = measurement.model, measurement.threat
        self.seed, self.batch_size = measurement.seed, measurement.batch_size
        self.settings, self.attacks, self.unasked = settings, tuple(attacks), unasked

    @cached_property
    def logits(self) -> Tensor:
        """What the model answers to the clean images, [n, classes]."""
        return self.answer(self.images, "clean")

    @cached_property
    def again(self) -> Tensor:
        """What it answers when it is asked the same once more, [n, classes]."""
        return self.answer(self.images, "again")

    @cached_property
    def right(self) -> Tensor:
        """Is each clean image classified correctly, [n]."""
        return self.logits.argmax(dim=1) == self.labels

    @property
    def count(self) -> int:
        """How many clean images are classified correctly: no others can be fooled."""
        return int(self.right.sum())

    @cached_property
    def iterated(self) -> Tensor:
        """What the iterative attack fools, [n]."""
        return self.fooled_by(self.iterative(self.threat, self.settings.steps))

    @cached_property
    def iterated_longer(self) -> Tensor:
        """What the iterative attack fools with twice the steps, [n]."""
        return self.fooled_by(self.iterative(self.threat, 2 * self.settings.steps))

    @property
    def white_box(self) -> Tensor:
        """What the iterative attack fools with either number of steps, [n]."""
        return self.iterated | self.iterated_longer

    @cached_property
    def stepped(self) -> Tensor:
        """What a single step of full length fools, [n]."""
        return self.fooled_by(self.single_step(1.0))

    @cached_property
    def spot(self) -> Tensor:
        """Which images the evaluation's attacks are tried on once more, [n]."""
        return torch.arange(len(self.images), device=self.images.device) < self.settings.spot

    @cached_property
    def attacked(self) -> Tensor:
        """Which of those the evaluation's attacks fool, [n]."""
        fooled = torch.zeros_like(self.right)
        for each in self.attacks:
            fooled |= self.fooled_by(each, among=self.spot & ~fooled)
        return fooled

    def missed_by_gradient(self, found: Tensor) -> Tensor:
        """Which of these images no gradient attack fools, the evaluation's own included, [n]."""
        missed = found & ~self.white_box
        for each in self.attacks:
            if each.name in _BY_GRADIENT and bool(missed.any()):
                missed &= ~self.fooled_by(each, among=missed)
        return missed

    def iterative(self, threat: ThreatModel, steps: int) -> Attack:
        """Projected gradient steps from a random start (Madry et al. 2018); in l1 of Auto-PGD."""
        names = [name for name in ("pgd", "apgd") if name in attack_names(threat.norm)]
        if not names:
            raise AttackError(f"there is no iterative {threat.norm} attack by the gradient")
        return attack(names[0], threat, steps=steps)

    def single_step(self, share: float) -> Attack:
        """One gradient step of `share` of the radius, from the image itself."""
        threat, length = self.threat, share * self.threat.eps
        if "pgd" not in attack_names(threat.norm):
            raise AttackError(f"there is no {threat.norm} attack by one gradient step")
        return attack("pgd", threat, steps=1, step_size=length, random_start=False)

    def answer(
        self,
        images: Tensor,
        where: str,
        *,
        batch_size: int | None = None,
        mode: Callable[[], AbstractContextManager[None]] = torch.no_grad,
        watched: bool = False,
        of: nn.Module | None = None,
    ) -> Tensor:
        """The logits for images of the model, or `of` another, [k, classes].

        Random draws have the seed of `where`; `watched` images require a gradient.
        """
        found, largest, model = [], int(self.labels.max()), of or self.model
        with attack_scope(model, seed=self._measurement.seed_of(where)), mode():
            for part in torch.split(images, batch_size or self.batch_size):
                given = part.detach().clone()  # not a view of what others are asked about
                given.requires_grad_(watched)
                found.append(checked_logits(model, given, largest_label=largest).detach())
        return torch.cat(found)

    def fooled_by(
        self, search: Attack, *, among: Tensor | None = None, seen_by: nn.Module | None = None
    ) -> Tensor:
        """Which correct images an attack fools, of those it is tried `among`, [n].

        `seen_by` is the model that the attack searches; None shows it this one.
        """
        tried = self.right if among is None else self.right & among
        fooled = torch.zeros_like(self.right)
        positions = tried.nonzero().flatten()
        for part in self._measurement.batches(f"check: {search.name}", positions):
            where = f"{search!r}/{int(part[0])}"
            seed, searched = self._measurement.seed_of(where), seen_by or self.model
            found = search(searched, self.images[part], self.labels[part], seed=seed)
            fooled[part] = self.mistaken(found.to(self.images), part, f"{where}/found")
        return fooled

    def mistaken(self, images: Tensor, rows: Tensor | slice, where: str) -> Tensor:
        """Which of these versions of the images of `rows` the model gets wrong, [k]."""
        return self.answer(images, where).argmax(dim=1) != self.labels[rows]

    def input_gradients(self) -> Tensor:
        """The cross-entropy's gradient for every clean image, [n, ...]."""
        gradients = []
        _ = self.logits  # an answer that cannot be used has no gradient to speak of
        with attack_scope(self.model, seed=self._measurement.seed_of("gradients")):
            for rows in torch.split(torch.arange(len(self.images)), self.batch_size):
                part = self.images[rows].clone().requires_grad_()
                logits = self.model(part)
                if not logits.requires_grad:
                    raise AttackError(
                        "no gradient reaches the images: is part of the model detached or under "
                        "no_grad?"
                    )
                loss = F.cross_entropy(logits, self.labels[rows], reduction="sum")
                (gradient,) = torch.autograd.grad(loss, part, allow_unused=True)
                gradients.append(torch.zeros_like(part) if gradient is None else gradient)
        return torch.cat(gradients)
