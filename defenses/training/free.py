"""Free adversarial training: a perturbation that the training's own backward passes move on.

It is carried from one example to the next in its place, so no private update may take its losses.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Setting, check_classes, check_setting, check_threat
from defenses.errors import AttackError
from defenses.quantities import is_whole, shown
from defenses.shape import is_batch
from defenses.threat import ThreatModel
from defenses.training.objective import AdversarialObjective

__all__ = ["FreeAdversarialTraining", "replayed"]


@final
class FreeAdversarialTraining(AdversarialObjective):
    """Cross-entropy on images with a perturbation that every backward pass moves on.

    After Shafahi et al. (2019, arXiv 1904.12843): a batch is trained on several times in a row, and
    each time the gradient that the update takes anyway also moves the perturbation.

    The perturbation lives in a place of the batch, not with an image: it is carried to whatever
    example comes there next, as in the paper. So a loss depends on earlier examples of others, and
    no private update may take it. Give it batches through `replayed`; it learns nothing of the
    images of a batch that comes once.

    Args:
        threat: The ball to train for, `linf` only; its bounds are those of the images.
        replays: How often each batch is to come in a row (m), at least 1; for `settings` and
            `replayed`, the losses do not depend on it.
        seed: Unused, nothing is drawn.

    Attributes:
        threat: The ball at full strength.
        replays: How often each batch is to come in a row.

    Raises:
        AttackError: A value cannot be.

    Example:
        >>> objective = FreeAdversarialTraining(ThreatModel(norm="linf", eps=0.1), replays=2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))]
        >>> for images, labels in replayed(batches, objective.replays):
        ...     objective(model, images, labels).mean().backward()
    """

    per_example: ClassVar[bool] = False
    reason: ClassVar[str] = (
        "free adversarial training carries a perturbation found on one example to the next one in "
        "its place; use n-fgsm, which is as cheap"
    )

    def __init__(
        self,
        threat: ThreatModel,
        *,
        replays: int = 8,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        check_threat(threat, "free", norms=("linf",))
        check_setting("free: replays", replays, int)
        super().__init__(seed=seed, label_smoothing=label_smoothing)
        self.threat, self.replays = threat, replays
        self._change: Tensor | None = None

    def _own_settings(self) -> dict[str, Setting]:
        return {"method": "free", "replays": self.replays}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Takes the losses on the perturbed images; their backward pass moves the perturbation."""
        images = self._at_home(self.threat, model, images, labels)
        change = self._change_for(images)
        low, high = self.threat.bounds
        perturbed = (images.detach() + change).clamp_(low, high)
        if torch.is_grad_enabled() and len(images):
            perturbed.requires_grad_().register_hook(  # type: ignore[no-untyped-call]
                _Mover(change, self._strength * self.threat.eps)
            )
        return self._cross_entropy(check_classes(model(perturbed), labels), labels)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have: the perturbation too."""
        change = {} if self._change is None else {"change": self._change.clone()}
        return super().state_dict() | change

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of an objective alike; what is none changes nothing."""
        held = state.get("change") if isinstance(state, Mapping) else None
        if held is not None and not (isinstance(held, Tensor) and is_batch(held)):
            raise AttackError(
                "expected the state_dict of a free objective, with the perturbation of a batch "
                f"under 'change', got {shown(held)}"
            )
        super().load_state_dict(state)
        self._change = None if held is None else held.clone()

    def _change_for(self, images: Tensor) -> Tensor:
        """The perturbation of as many places as there are images; new places start at zero."""
        held = self._change
        if held is None or held.shape[1:] != images.shape[1:] or held.dtype != images.dtype:
            held = images.new_zeros(0, *images.shape[1:])
        held = held.to(images.device)
        if len(held) < len(images):
            held = torch.cat([held, torch.zeros_like(images[len(held) :])])
        self._change = held
        return held[: len(images)]


def replayed(
    batches: Iterable[tuple[Tensor, Tensor]], times: int, *, done: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives each batch several times in a row.

    Args:
        batches: Images and labels.
        times: How often each comes, at least 1.
        done: How often the first batch has come already.

    Raises:
        AttackError: A number is out of its range.

    Example:
        >>> batches = [(torch.zeros(1), torch.tensor([0])), (torch.ones(1), torch.tensor([1]))]
        >>> [int(labels) for _, labels in replayed(batches, 3, done=1)]
        [0, 0, 1, 1, 1]
    """
    if not isinstance(batches, Iterable):
        raise AttackError(f"replayed: expected batches to go through, got {shown(batches)}")
    check_setting("replayed: times", times, int)
    if not is_whole(done):
        raise AttackError(f"replayed: expected done as a whole number, got {shown(done)}")
    for batch in batches:
        for _ in range(done, times):
            yield batch
        done = 0


@dataclass(frozen=True)
class _Mover:
    """A hook: moves the change of each place by eps along the sign of its gradient."""

    change: Tensor
    eps: float

    def __call__(self, gradient: Tensor) -> None:
        with torch.no_grad():
            self.change.add_(gradient.sign(), alpha=self.eps).clamp_(-self.eps, self.eps)
