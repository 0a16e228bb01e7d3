"""The user's optimizer, fed with clipped and noised gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from privacy._fused.loader import Samples
from privacy._fused.module import Outputs
from privacy._fused.resumption import checked_ledger
from privacy._fused.settings import Account, Settings
from privacy._fused.writes import OPTIMIZER, Followed, refusal
from privacy.accounting import GaussianSteps, epsilon_of
from privacy.errors import BudgetExceeded, StepError
from privacy.ledger import Ledger
from privacy.noise import SecureGenerator
from privacy.plan import DPPlan
from privacy.step import Reserved, Turn
from privacy.update import ClippedSum
from privacy.validate import check_layers, check_trainable

__all__ = ["FusedOptimizer"]


class FusedOptimizer(Followed, Settings, torch.optim.Optimizer):
    """The user's optimizer, which `step` gives a clipped and noised gradient.

    Guarantee: one noised step for each Poisson sample, written down with its own noise before the
    optimizer sees its gradient; never more than the target epsilon allows.

    Attributes:
        original_optimizer: The optimizer that was given.
        plan: What the training began with.
        ledger: What it has spent.
        non_finite: Examples whose gradient was not finite and counted as zero. Not covered by
            epsilon: do not publish.
    """

    followed = frozenset(
        {
            *("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction"),
            *("step_hook", "generator", "secure_mode", "param_groups", "state", "defaults"),
            # What torch's schedulers of the learning rate put on an optimizer.
            *("step", "_opt_called"),
        }
    )
    refused = OPTIMIZER

    def __init__(
        self,
        reserved: Reserved,
        *,
        plan: DPPlan,
        loss_reduction: str,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        clipped: ClippedSum,
        outputs: Outputs,
        samples: Samples,
        account: Account,
        ledger: Ledger,
    ) -> None:
        # Not `super().__init__`: state and groups stay the original's.
        assert plan.noise_multiplier is not None, "the engine makes plans with their noise"
        vars(self).update(
            original_optimizer=reserved.optimizer,
            plan=plan,
            ledger=ledger,
            non_finite=0,
            _module=module,
            _parameters=dict(parameters),
            _clipped=clipped,
            _outputs=outputs,
            _samples=samples,
            _account=account,
            _generator=SecureGenerator(),
            _reserved=reserved,
            _turn=Turn(),
            _noised={},
            _noise_multiplier=plan.noise_multiplier,
            _batch_size=plan.batch_size,
            _loss_reduction=loss_reduction,
            _step_hook=None,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":
            raise AttributeError(name)
        if name in self.refused:
            raise refusal(self, name, self.refused)
        return getattr(self.original_optimizer, name)

    def __getstate__(self) -> NoReturn:
        raise StepError(
            "a private optimizer is not copied or pickled: two would step on one sample; save "
            "its state_dict() and load that after make_private"
        )

    def __repr__(self) -> str:
        return f"FusedOptimizer({self.original_optimizer!r})"

    def attach_step_hook(self, fn: Callable[[Settings], None]) -> None:
        """Sets `step_hook`; Opacus loses its account by that, this one does not."""
        self.step_hook = fn

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips each example of the batch; adds noise and steps when the sample is complete.

        Returns:
            What `closure` returned, if it was given.

        Raises:
            StepError: There was not one backward pass on one sample, or a gradient came from
                elsewhere than the module's outputs.
            UnsupportedLayer: A layer mixes examples.
            BudgetExceeded: The steps that the target epsilon allows are spent.
            PlanError: The account holds what is not a history.
        """
        self._check_budget()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            # It may have stepped itself.
            self._check_budget()
        with self._turn:
            self._step()
        return result

    def _step(self) -> None:
        """`step`, while no other thread is in one."""
        check_layers(self._module)
        check_trainable(self._module, self._parameters)
        self._check_gradients()
        rows = self._outputs.rows()
        mask = self._samples.mask(rows)
        if self._samples.seen == 0:
            self._clipped.reset()
        losses = self._outputs.losses(loss_reduction=self.loss_reduction)
        vars(self)["non_finite"] += self._clipped.add(losses, mask)
        last = self._samples.last
        self._samples.advance(rows)
        self._outputs.step()
        if last:
            self._release()

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
            "add_param_group: parameters cannot join a private training under way: give the "
            "optimizer all of them before make_private"
        )

    def state_dict(self) -> dict[str, Any]:
        """The original optimizer's state, and under "privacy" the plan and the ledger."""
        privacy = {"plan": self.plan.to_dict(), "ledger": self.ledger.to_list()}
        return {**self.original_optimizer.state_dict(), "privacy": privacy}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken: epsilon never falls, noise and sampling are fresh.

        Raises:
            PlanError: The state has no ledger, is of another plan, of fewer steps than here, or
                holds steps that a training with this plan did not take.
        """
        least = self.plan.noise_multiplier or 0.0
        ledger = checked_ledger(
            state_dict,
            plan=self.plan,
            noise_multiplier=max(least, self.noise_multiplier),
            # A file may know more than the state: then the larger count holds.
            spent=self.ledger if self.ledger.path is None else Ledger(),
        )
        own = {key: value for key, value in state_dict.items() if key != "privacy"}
        self.original_optimizer.load_state_dict(own)
        if self.ledger.path is None:
            vars(self)["ledger"] = ledger
        else:
            self.ledger.resume(state_dict["privacy"]["ledger"])
        self._samples.begin()
        self._outputs.step()
        self._account.cover(self.ledger.events)

    def _check_budget(self) -> None:
        """Refuses the step that would exceed the target."""
        target, plan = self.plan.target_epsilon, self.plan
        if target is None:
            return
        spent = self._account.events
        steps = max(self.ledger.steps, sum(event.steps for event in spent))
        planned = all(
            event.noise_multiplier >= (plan.noise_multiplier or 0.0)
            and event.sampling_rate <= plan.sampling_rate
            for event in spent
        )
        if planned:
            exceeded = steps >= plan.steps
        else:
            event = GaussianSteps(
                noise_multiplier=self.noise_multiplier, sampling_rate=plan.sampling_rate, steps=1
            )
            exceeded = epsilon_of([*spent, event], plan.delta_or_own(None)) > target
        if exceeded:
            raise BudgetExceeded(
                f"the {plan.steps} steps that target_epsilon={target:g} allows are spent; the next "
                "one was not taken"
            )

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
        written = [
            f"{name}.{kept}"
            for name, p in self._parameters.items()
            for kept in ("grad_sample", "summed_grad")
            if getattr(p, kept, None) is not None
        ]
        if written:
            raise StepError(
                f"{', '.join(written)}: nothing here reads it, and no gradient of an example is "
                'kept; change the loss instead, or choose grad_sample_mode="hooks"'
            )

    def _release(self) -> None:
        """Writes the step down, adds the noise, and only then lets the optimizer see it."""
        noise, rate = self.noise_multiplier, self.plan.sampling_rate
        self.ledger.record(GaussianSteps(noise_multiplier=noise, sampling_rate=rate, steps=1))
        self._account.step(noise_multiplier=noise, sample_rate=rate)
        gradients = self._clipped.noised_mean(
            self._generator,
            noise_multiplier=noise,
            batch_size=self.expected_batch_size if self.loss_reduction == "mean" else 1,
        )
        # A frozen parameter may hold a raw gradient from before: the optimizer must not see it.
        self.original_optimizer.zero_grad()
        self._noised = dict(zip(self._parameters, gradients, strict=True))
        for name, gradient in self._noised.items():
            self._parameters[name].grad = gradient
        if self._step_hook is not None:
            self._step_hook(self)
        self._reserved.step()
