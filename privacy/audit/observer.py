"""The observer: what one step of somebody's private training wrote to the gradients.

It sits outside of the path it watches: public hooks on the model and on the optimizer, and the rows
that were read. From them it knows what the definition of DP-SGD would have added up, so that what
is left of the gradient must be the noise and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from privacy.audit.canaries import Canaries, PlainGradients
from privacy.audit.release import Release
from privacy.clipping.watch import admitted
from privacy.errors import StepError

__all__ = ["Observation", "Observer"]

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Observation:
    """One step as the auditor sees it, in units of the clipping norm.

    Attributes:
        residual: What was released less what the definition adds up; float [d]. In an honest step
            it is the noise: sigma times standard normal numbers.
        scores: One a canary: the component along its direction of what neither the other examples
            nor the definition's treatment of them explains; float [k].
        was_in: Which canaries were in the step's sample, bool [k].
        sums: Norms of what the definition adds up of the other examples and of the canaries [2].
        excess: By how much more than that was added up, along each of the two; noise apart [2].
        total: What the definition adds up of all, float [d].
        beyond: What was added, noise apart nothing, towards what is clipped off of each physical
            batch, and of each canary beyond its share; float [b + k].
    """

    residual: Tensor
    scores: Tensor
    was_in: Tensor
    sums: Tensor
    excess: Tensor
    total: Tensor
    beyond: Tensor
    examples: int


@final
@admitted
class Observer:
    """Watches the steps of one training; a class because a step is put together from its batches.

    Its `release` is what it saw of everything but the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        canaries: Canaries,
        gradients: PlainGradients,
        *,
        max_grad_norm: float,
        batch_size: int,
    ) -> None:
        self._model, self._canaries, self._gradients = model, canaries, gradients
        self._max_grad_norm, self._batch_size = max_grad_norm, batch_size
        self._rows = torch.empty(0, dtype=torch.int64)
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._others: Tensor | None = None
        self._was_in = torch.zeros(0, dtype=torch.bool)
        self._seen: list[Tensor] = []
        self._escapes: list[Tensor] = []
        self._examples = 0
        self.release = Release(model, optimizer, canaries.images)
        self._handles = [
            model.register_forward_pre_hook(self._put_canaries_back),
            model.register_forward_hook(self._remember_call),
            optimizer.register_step_pre_hook(self._read_gradients),
        ]

    def close(self) -> None:
        """Takes every hook off again."""
        self.release.close()
        for handle in self._handles:
            handle.remove()

    def losses(
        self,
        objective: Objective,
        images: Tensor,
        labels: Tensor,
        taken: Tensor,
        owners: Tensor,
    ) -> Tensor:
        """The losses of one physical batch: the objective's, and the auditor's own for canaries.

        `taken` is for each row its canary's number or -1, int64 [k]; later rows are filling.
        `owners` is the unit in whose mean it counts, or -1 where it counts in none.
        """
        if self._others is None:
            self._begin()
        filling = torch.full((len(images) - len(taken),), -1)
        self._rows = torch.cat([taken, filling]).to(images.device)
        self._calls = []
        losses = objective(self._model, images, labels)
        if losses.dim() > 1:
            raise StepError(
                f"losses: expected one loss an example, shape [{len(images)}], got "
                f"{list(losses.shape)}: the audit knows no gradient of copies; audit the same "
                "training with one copy of each example"
            )
        calls, self._calls = self._calls, []
        if not calls:
            raise StepError("losses: the objective did not run the model that is audited")
        chosen = self._of_rows(self._canaries.weights)
        own = (calls[-1][1].flatten(1) * chosen).sum(1)
        losses = torch.where(self._rows >= 0, own, losses)
        self._account(losses, calls, owners.to(images.device))
        self._rows = torch.empty(0, dtype=torch.int64)
        return losses

    def observation(self) -> Observation:
        """What was seen since the last one; the optimizer has stepped exactly once in between."""
        if len(self._seen) != 1 or self._others is None:
            raise StepError(
                f"optimizer: expected one step a sample, got {len(self._seen)}; give the audit the "
                "optimizer that the private step calls"
            )
        self.release.stepped()
        scale = self._batch_size / self._max_grad_norm
        own = self._canaries.clipped * self._was_in.to(self._others.device)[:, None]
        residual = self._seen[0] * scale - self._others - own.sum(0)
        directions = self._canaries.directions
        scores = directions @ residual + (directions * own).sum(1)
        expected = torch.stack([self._others, own.sum(0)])
        excess = nn.functional.normalize(expected, dim=1) @ residual
        towards = nn.functional.normalize(torch.stack(self._escapes), dim=1)
        beyond = torch.cat([towards @ residual, scores - self._was_in.to(scores)])
        self._others, self._seen = None, []
        sums, total = expected.norm(dim=1), expected.sum(0)
        return Observation(
            residual, scores, self._was_in, sums, excess, total, beyond, self._examples
        )

    def _begin(self) -> None:
        """A step's first batch: canaries are aimed at the present parameters."""
        self._canaries.aim(self._gradients, max_grad_norm=self._max_grad_norm)
        self._others = torch.zeros_like(self._canaries.clipped[0])
        self._was_in = torch.zeros(len(self._canaries.clipped), dtype=torch.bool)
        self._seen, self._escapes, self._examples = [], [], 0

    def _account(self, losses: Tensor, calls: list[tuple[Tensor, Tensor]], owners: Tensor) -> None:
        """Adds what the definition says that this batch contributes, in units of C."""
        outputs = [output for _, output in calls]
        found = torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True)
        pairs = [(images, g) for (images, _), g in zip(calls, found, strict=True) if g is not None]
        assert self._others is not None, "the step was begun"
        numbers = self._rows[: len(owners)]
        own = torch.unique(numbers[numbers >= 0])
        self._was_in[own.cpu()] = True
        units = torch.unique(owners[owners >= 0])
        self._examples += len(units)
        # What an unclipped batch would add beyond the clipped one.
        oversize = self._canaries.oversize[own] - 1
        escape = (self._canaries.clipped[own] * oversize[:, None]).sum(0)
        others = torch.unique(owners[(numbers < 0) & (owners >= 0)])
        most = int(torch.bincount(owners[owners >= 0]).max()) if len(units) else 1
        # A split of nothing would be one empty part, and nothing can be vectorised over none.
        at_once = max(1, self._gradients.rows_at_once // most)
        for some in torch.split(others, at_once) if len(others) else ():
            rows = torch.isin(owners, some).nonzero().squeeze(1)
            of_units = torch.searchsorted(some, owners[rows])
            clipped, off = self._sums([(x[rows], g[rows]) for x, g in pairs], of_units)
            self._others += clipped
            escape += off
        self._escapes.append(escape)

    def _sums(self, pairs: list[tuple[Tensor, Tensor]], of_units: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of some units' clipped gradients by the definition and of what is clipped off.

        The gradient of a unit is the mean of those of its rows.
        """
        rows = torch.stack([self._gradients(x, g) for x, g in pairs]).sum(0)
        sizes = of_units.bincount()
        total = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, of_units, rows)
        total /= sizes[:, None]
        norms = total.norm(dim=1, keepdim=True) / self._max_grad_norm
        clipped = total / norms.clamp(min=1.0) / self._max_grad_norm
        clipped = torch.where(norms.isfinite(), clipped, torch.zeros_like(clipped))
        off = torch.where(norms.isfinite(), total / self._max_grad_norm - clipped, 0.0)
        return clipped.sum(0), off.sum(0)

    def _of_rows(self, of_canaries: Tensor) -> Tensor:
        """A canary's value in its row, zeros in all others."""
        chosen = of_canaries[self._rows.clamp(min=0)]
        is_canary = (self._rows >= 0).view(-1, *[1] * (chosen.dim() - 1))
        return torch.where(is_canary, chosen, torch.zeros_like(chosen))

    def _put_canaries_back(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Undoes what augmentation or an attack did to canaries: their gradient must be known."""
        images = inputs[0]
        if len(images) != len(self._rows) or not bool((self._rows >= 0).any()):
            return None
        is_canary = (self._rows >= 0).view(-1, *[1] * (images.dim() - 1))
        return (torch.where(is_canary, self._of_rows(self._canaries.images), images), *inputs[1:])

    def _remember_call(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the model was called with while its outputs can reach the losses."""
        if isinstance(output, Tensor) and output.requires_grad:
            self._calls.append((inputs[0].detach(), output))

    def _read_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The released gradient, at the moment in which the optimizer takes it."""
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self._model.named_parameters()
        }
        self._seen.append(self._gradients.flattened(found))
        self.release.before()
