"""The user's optimizer, fed with clipped and noised gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from privacy._fused.loader import Samples
from privacy._fused.module import Outputs
from privacy.errors import BudgetExceeded, PlanError, StepError
from privacy.ledger import Ledger
from privacy.noise import SecureGenerator
from privacy.plan import DPPlan
from privacy.update import ClippedSum
from privacy.validate import check_layers, check_trainable

__all__ = ["FusedOptimizer"]


class FusedOptimizer(torch.optim.Optimizer):
    """The user's optimizer, which `step` gives a clipped and noised gradient.

    Guarantee: one noised step for each Poisson sample, written down before the optimizer sees its
    gradient; never more steps than the target epsilon allows.

    Attributes:
        original_optimizer: The optimizer that was given.
        plan: What the training follows.
        ledger: What it has spent.
        non_finite: Examples whose gradient was not finite and counted as zero. Not covered by
            epsilon: do not publish.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        plan: DPPlan,
        loss_reduction: str,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        clipped: ClippedSum,
        outputs: Outputs,
        samples: Samples,
    ) -> None:
        # Not `super().__init__`: state and groups stay the original's, by `__getattr__`.
        self.original_optimizer, self.plan = optimizer, plan
        self.loss_reduction = loss_reduction
        self.ledger = Ledger()
        self.non_finite = 0
        self._module, self._parameters = module, dict(parameters)
        self._clipped, self._outputs, self._samples = clipped, outputs, samples
        self._generator = SecureGenerator()
        self._noised: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

    def __repr__(self) -> str:
        return f"FusedOptimizer({self.original_optimizer!r})"

    @property
    def noise_multiplier(self) -> float:
        """Noise over C; fixed."""
        assert self.plan.noise_multiplier is not None, "the engine makes plans with their noise"
        return self.plan.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """C; fixed."""
        return self.plan.max_grad_norm

    @property
    def expected_batch_size(self) -> int:
        """Expected examples in a Poisson sample."""
        return self.plan.batch_size

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips each example of the batch; adds noise and steps when the sample is complete.

        Returns:
            What `closure` returned, if it was given.

        Raises:
            StepError: There was not one backward pass on one sample, or a gradient came from
                elsewhere than the module's outputs.
            UnsupportedLayer: A layer mixes examples.
            BudgetExceeded: The steps that the target epsilon allows are spent.
        """
        if self.plan.target_epsilon is not None and self.ledger.steps >= self.plan.steps:
            raise BudgetExceeded(
                f"the {self.plan.steps} steps that target_epsilon={self.plan.target_epsilon:g} "
                "allows are spent; the next one was not taken"
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        check_layers(self._module)
        check_trainable(self._module, self._parameters)
        self._check_gradients()
        rows = self._outputs.rows()
        mask = self._samples.mask(rows)
        if self._samples.seen == 0:
            self._clipped.reset()
        losses = self._outputs.losses(loss_reduction=self.loss_reduction)
        self.non_finite += self._clipped.add(losses, mask)
        last = self._samples.last
        self._samples.advance(rows)
        self._outputs.step()
        if last:
            self._release()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, and the backward pass that no step was taken on.

        The clipped sum of a sample's earlier physical batches is kept.
        """
        self._outputs.forget()
        self.original_optimizer.zero_grad(set_to_none)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Says whether the next batch leaves its sample incomplete, as BatchMemoryManager does."""
        self._samples.signal(skip=do_skip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused.

        Raises:
            StepError: Always.
        """
        raise StepError(
            "parameters cannot join a private training under way: give the optimizer all of them "
            "before make_private"
        )

    def state_dict(self) -> dict[str, Any]:
        """The original optimizer's state, and under "privacy" the plan and the ledger."""
        privacy = {"plan": self.plan.to_dict(), "ledger": self.ledger.to_list()}
        return {**self.original_optimizer.state_dict(), "privacy": privacy}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken: epsilon never falls, noise and sampling are fresh.

        Raises:
            PlanError: The state has no ledger, is of another plan, or of fewer steps than here.
        """
        privacy = state_dict.get("privacy")
        if not isinstance(privacy, Mapping) or privacy.get("plan") != self.plan.to_dict():
            raise PlanError(
                'optimizer state: expected the plan of this training under "privacy", got '
                f"{privacy if privacy is None else dict(privacy).get('plan')}; resume from the "
                "state_dict() of this optimizer, with the settings it was made with"
            )
        ledger = Ledger.from_list(privacy.get("ledger", None))
        if ledger.steps < self.ledger.steps:
            raise PlanError(
                f"ledger: {self.ledger.steps} steps were taken here, the state knows "
                f"{ledger.steps}: epsilon never falls"
            )
        own = {key: value for key, value in state_dict.items() if key != "privacy"}
        self.original_optimizer.load_state_dict(own)
        self.ledger = ledger
        self._samples.begin()
        self._outputs.step()

    def _check_gradients(self) -> None:
        """Refuses gradients that did not come through the module's outputs."""
        found = [
            name
            for name, p in self._parameters.items()
            if p.grad is not None and p.grad is not self._noised.get(name)
        ]
        if found:
            raise StepError(
                f"{', '.join(found)}: a gradient came from elsewhere than the outputs of the "
                "module that make_private returned, so it is not clipped; leave penalties on "
                "parameters to the optimizer's weight_decay, and call the returned module"
            )

    def _release(self) -> None:
        """Adds the noise, writes it down, and only then lets the optimizer see the gradient."""
        gradients = self._clipped.noised_mean(
            self._generator,
            noise_multiplier=self.noise_multiplier,
            batch_size=self.plan.batch_size if self.loss_reduction == "mean" else 1,
        )
        self.ledger.record(self.plan.event(steps=1))
        # A frozen parameter may hold a raw gradient from before: the optimizer must not see it.
        self.original_optimizer.zero_grad()
        self._noised = dict(zip(self._parameters, gradients, strict=True))
        for name, gradient in self._noised.items():
            self._parameters[name].grad = gradient
        self.original_optimizer.step()
