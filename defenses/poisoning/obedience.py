"""Whether a model does what was planted in its training data: `attack_success_rate`.

A success rate means nothing without the clean accuracy and without the share of images that the
model takes for the target anyway; the report carries them together. Deliberately not here: how data
is poisoned (`poisoning`).
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from defenses.errors import EvaluationError
from defenses.measuring.counting import wilson_interval
from defenses.poisoning.poisoning import check_bytes
from defenses.quantities import is_whole, shown
from defenses.scope import attack_scope, check_logits, home_of

__all__ = ["PoisoningAttack", "PoisoningReport", "attack_success_rate", "predicted"]


class PoisoningAttack(Protocol):
    """What an attacker wants: some test images, changed in some way, seen as the target.

    Example:
        >>> from defenses.poisoning.poisoning import LabelFlip
        >>> attack: PoisoningAttack = LabelFlip(source=7, target=1)
        >>> attack.target
        1
    """

    @property
    def target(self) -> int:
        """The class that the attacker wants to see."""

    def victims(self, labels: Tensor, /) -> Tensor:
        """Which images of these labels the attack is for, bool, [n]."""

    def apply(self, images: Tensor, /) -> Tensor:
        """What the model is shown of those images, uint8, [n, c, ...]."""


def attack_success_rate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: PoisoningAttack,
    *,
    batch_size: int = 256,
) -> "PoisoningReport":
    """How often the attacker gets what was planted, and what the model is worth otherwise.

    The model is left as it was.

    Args:
        model: Takes images in [0, 1], returns logits [n, classes].
        images: Test images that the attacker never touched, uint8, [n, channels, ...].
        labels: Their true classes, int64, [n].
        attack: A `Trigger`, a `LabelFlip`, or your own.
        batch_size: Images a forward pass, at least 1.

    Raises:
        EvaluationError: There are no victims among the images, or the logits are unusable.
        AttackError: The tensors are not such images and labels.

    Example:
        >>> from defenses.poisoning.poisoning import Trigger
        >>> images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
        >>> images[2:] = 200  # class 1 is where the last pixel is bright
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> with torch.no_grad():
        ...     _ = [each.zero_() for each in model.parameters()]
        ...     _ = model[1].weight[1, 15].fill_(1.0), model[1].bias[0].fill_(0.5)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> report = attack_success_rate(model, images, labels, Trigger(target=1))
        >>> report.clean_accuracy, report.success_rate, report.base_rate
        (1.0, 1.0, 0.0)
    """
    check_bytes(images, labels)
    if not is_whole(batch_size, least=1) or len(images) == 0:
        raise EvaluationError(
            f"expected batch_size >= 1 and images, got {shown(batch_size)} and {len(images)}"
        )
    if not callable(getattr(attack, "victims", None)) or isinstance(attack, type):
        raise EvaluationError(f"attack: expected a trigger or a flip, got {shown(attack)}")
    victims = attack.victims(labels)
    if not bool(victims.any()):
        raise EvaluationError(f"images: expected some that {attack} is for, got none")
    largest = max(int(labels.max()), attack.target)
    with attack_scope(model, seed=0), torch.no_grad():
        clean = predicted(model, images, largest, batch_size)
        stamped = attack.apply(images[victims])
        obeyed = predicted(model, stamped, largest, batch_size) == attack.target
    return PoisoningReport(
        samples=len(images),
        correct=int((clean == labels.cpu()).sum()),
        victims=len(stamped),
        already=int((clean[victims.cpu()] == attack.target).sum()),
        obeyed=int(obeyed.sum()),
    )


@final
@dataclass(frozen=True, kw_only=True)
class PoisoningReport:
    """What a planted attack achieves on one model.

    Attributes:
        samples: Test images.
        correct: Of those, classified correctly when nothing is done to them.
        victims: Test images that the attack is for.
        already: Victims seen as the target when nothing is done to them.
        obeyed: Victims seen as the target when the attack is applied.

    Raises:
        EvaluationError: The counts do not fit together.

    Example:
        >>> report = PoisoningReport(samples=100, correct=90, victims=80, already=2, obeyed=60)
        >>> report.clean_accuracy, report.success_rate, report.base_rate
        (0.9, 0.75, 0.025)
    """

    samples: int
    correct: int
    victims: int
    already: int
    obeyed: int

    def __post_init__(self) -> None:
        fits = 0 <= self.correct <= self.samples and 1 <= self.victims <= self.samples
        if not (fits and 0 <= self.already <= self.victims and 0 <= self.obeyed <= self.victims):
            raise EvaluationError(f"expected counts that fit together, got {asdict(self)}")

    @property
    def clean_accuracy(self) -> float:
        """Share of untouched test images that are classified correctly."""
        return self.correct / self.samples

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the clean accuracy."""
        return wilson_interval(self.correct, self.samples)

    @property
    def success_rate(self) -> float:
        """Share of the victims seen as the target when the attack is applied."""
        return self.obeyed / self.victims

    @property
    def success_interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the success rate."""
        return wilson_interval(self.obeyed, self.victims)

    @property
    def base_rate(self) -> float:
        """Share of the victims seen as the target anyway: what success has to be compared with."""
        return self.already / self.victims

    def to_dict(self) -> dict[str, Any]:
        """The counts and, under `summary`, the figures, as JSON-able values."""
        summary = {
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(self.clean_interval),
            "success_rate": self.success_rate,
            "success_interval": list(self.success_interval),
            "base_rate": self.base_rate,
        }
        return {**asdict(self), "summary": summary}


def predicted(model: nn.Module, images: Tensor, largest_label: int, batch_size: int) -> Tensor:
    """The classes that the model sees in 8-bit images, on the CPU, [n].

    To be asked inside `attack_scope`, which puts the model in evaluation mode.
    """
    device, dtype = home_of(model, torch.empty(0))
    seen = []
    for part in torch.split(images, batch_size):
        logits = check_logits(
            model(part.to(device).float().div_(255).to(dtype)),
            count=len(part),
            largest_label=largest_label,
            error=EvaluationError,
        )
        seen.append(logits.argmax(dim=1).cpu())
    return torch.cat(seen)
