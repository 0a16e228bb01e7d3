"""The user's optimizer, fed with clipped and noised gradients.

It has the attributes of Opacus' optimizer: each write has its effect, or is refused by name.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from privacy.accounting import GaussianSteps
from privacy.errors import BudgetExceeded, PlanError, StepError
from privacy.ledger import Ledger
from privacy.noise import SecureGenerator
from privacy.opacus.account import Account, checked_ledger
from privacy.opacus.budget import Budget
from privacy.opacus.loader import Samples
from privacy.opacus.module import Outputs
from privacy.opacus.refusals import (
    OPTIMIZER,
    Followed,
    as_opacus_raises,
    check_reduction,
    refusal,
)
from privacy.plan import DPPlan
from privacy.step import Prepared, RefusingLock, release
from privacy.validate import positive

__all__ = ["FusedOptimizer"]


def _of_original(name: str) -> Any:
    """An attribute that is read from and written to the original optimizer."""

    def read(self: "FusedOptimizer") -> Any:
        """The original optimizer's own."""
        return getattr(self.original_optimizer, name)

    def write(self: "FusedOptimizer", value: Any) -> None:
        setattr(self.original_optimizer, name, value)

    return property(read, write)


class FusedOptimizer(Followed, torch.optim.Optimizer):
    """The user's optimizer, which `step` gives a clipped and noised gradient.

    Guarantee: one noised step for each Poisson sample, written down with its own noise before the
    optimizer sees its gradient; never more than the target epsilon allows. `non_finite` counts
    examples whose gradient was not finite and counted as zero: not covered by epsilon, do not
    publish it.
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

    original_optimizer: torch.optim.Optimizer
    plan: DPPlan
    ledger: Ledger
    non_finite: int
    _noise_multiplier: float
    state = _of_original("state")
    defaults = _of_original("defaults")

    def __init__(
        self,
        plan: DPPlan,
        prepared: Prepared,
        outputs: Outputs,
        samples: Samples,
        account: Account,
        ledger: Ledger,
        loss_reduction: str,
    ) -> None:
        # Not `super().__init__`: state and groups stay the original's.
        vars(self).update(
            original_optimizer=prepared.reserved.optimizer,
            plan=plan,
            ledger=ledger,
            non_finite=0,
            _prepared=prepared,
            _outputs=outputs,
            _samples=samples,
            _account=account,
            _budget=Budget(plan),
            _generator=SecureGenerator(),
            _lock=RefusingLock(),
            _noised={},
            _noise_multiplier=plan.event().noise_multiplier,
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

    @property
    def noise_multiplier(self) -> float:
        """Noise over C of the steps to come; less than planned spends a target epsilon sooner."""
        return float(self._noise_multiplier)

    @noise_multiplier.setter
    def noise_multiplier(self, noise: float) -> None:
        noise, least = positive("noise_multiplier", noise), self.plan.event().noise_multiplier
        if self.ledger.path is not None and noise != least:
            raise PlanError(
                f"noise_multiplier: the ledger's file is bound to {least:g}; for a schedule make "
                "the engine without a ledger"
            )
        self._account.expect(noise_multiplier=noise, sampling_rate=self.plan.sampling_rate)
        self._noise_multiplier = noise

    @property
    def max_grad_norm(self) -> float:
        """C of the samples to come."""
        return float(self._prepared.clipped.max_grad_norm)

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float) -> None:
        norm = positive("max_grad_norm", norm)
        self._refuse_within_a_sample("max_grad_norm")
        self._prepared.clipped.max_grad_norm = norm

    @property
    def expected_batch_size(self) -> int:
        """What a mean divides by; the sampling rate stays what it is."""
        return int(self._batch_size)

    @expected_batch_size.setter
    def expected_batch_size(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise PlanError(f"expected_batch_size: expected a whole number >= 1, got {size!r}")
        self._batch_size = size

    @property
    def loss_reduction(self) -> str:
        """How the user's loss joins its rows."""
        return str(self._loss_reduction)

    @loss_reduction.setter
    def loss_reduction(self, reduction: str) -> None:
        check_reduction(reduction)
        self._refuse_within_a_sample("loss_reduction")
        self._loss_reduction = reduction

    @property
    def step_hook(self) -> Callable[["FusedOptimizer"], None] | None:
        """Called between noise and step; the account does not depend on it."""
        hook: Callable[[FusedOptimizer], None] | None = self._step_hook
        return hook

    @step_hook.setter
    def step_hook(self, hook: Callable[["FusedOptimizer"], None] | None) -> None:
        if hook is not None and not callable(hook):
            raise StepError(f"step_hook: expected a function of the optimizer, got {hook!r}")
        self._step_hook = hook

    @property
    def generator(self) -> None:
        """None: the noise has a cryptographic generator, which nobody else may hold."""

    @generator.setter
    def generator(self, generator: object) -> None:
        if generator is not None:
            raise refusal(self, "generator", self.refused)

    @property
    def secure_mode(self) -> bool:
        """Always true."""
        return True

    @secure_mode.setter
    def secure_mode(self, secure: bool) -> None:
        if secure is not True:
            raise refusal(self, "secure_mode", self.refused)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return list(self._prepared.parameters.values())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The original optimizer's own."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        held = Counter(id(p) for group in groups for p in group["params"])
        before = Counter(id(p) for group in self.param_groups for p in group["params"])
        if held != before:
            raise StepError(
                "param_groups: expected the parameters that the optimizer holds, each once; "
                "parameters cannot join or leave a private training under way"
            )
        self.original_optimizer.param_groups = groups

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: a batch is one backward pass, and each of its examples counts once."""
        return 1

    def attach_step_hook(self, fn: Callable[["FusedOptimizer"], None]) -> None:
        """Sets `step_hook`. Unlike in Opacus, steps are accounted with or without a hook."""
        self.step_hook = fn

    @as_opacus_raises()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips each example of the batch; adds noise and steps when the sample is complete.

        Refused are steps beyond the target epsilon, and gradients that did not come from one
        backward pass on one sample through the module's outputs. Returns what `closure` returned.
        """
        self._prepared.check_attached()
        self._check_budget()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            # It may have stepped itself.
            self._check_budget()
        with self._lock:
            self._step()
        return result

    def _step(self) -> None:
        self._prepared.check()
        self._check_gradients()
        rows, clipped = self._outputs.rows(), self._prepared.clipped
        mask = self._samples.mask(rows)
        if self._samples.seen == 0:
            clipped.reset()
        losses = self._outputs.losses(loss_reduction=self.loss_reduction)
        vars(self)["non_finite"] += clipped.add(losses, mask)
        last = self._samples.last
        self._samples.advance(rows)
        self._outputs.step()
        if last:
            release(
                self._prepared,
                self._generator,
                self._next_event(),
                record=self._record,
                batch_size=self.expected_batch_size if self.loss_reduction == "mean" else 1,
                before_step=self._before_step,
            )

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
        """Refused always."""
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

        Refused is a state without a ledger, of another plan, of fewer steps than were taken here,
        or with steps that a training with this plan did not take.
        """
        ledger = checked_ledger(
            state_dict,
            plan=self.plan,
            noise_multiplier=max(self.plan.event().noise_multiplier, self.noise_multiplier),
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

    def _next_event(self) -> GaussianSteps:
        return GaussianSteps(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.plan.sampling_rate, steps=1
        )

    def _record(self, event: GaussianSteps) -> None:
        """Writes a step down, in the training's ledger and in the engine's account."""
        self.ledger.record(event)
        self._account.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sampling_rate)

    def _before_step(self) -> None:
        """Remembers the noised gradients, which stay in `.grad`, and calls the user's hook."""
        self._noised = {name: p.grad for name, p in self._prepared.parameters.items()}
        if self._step_hook is not None:
            self._step_hook(self)

    def _check_budget(self) -> None:
        target, plan = self.plan.target_epsilon, self.plan
        if target is None:
            return
        steps = [*self._account.events, self._next_event()]
        planned = all(
            event.noise_multiplier >= plan.event().noise_multiplier
            and event.sampling_rate <= plan.sampling_rate
            for event in steps
        )
        taken = max(self.ledger.steps, sum(event.steps for event in steps[:-1]))
        if not (taken < plan.steps if planned else self._budget.covers(*steps)):
            raise BudgetExceeded(
                f"the {plan.steps} steps that target_epsilon={target:g} allows are spent; the next "
                "one was not taken"
                if planned
                else f"one more step with noise {self.noise_multiplier:g} would exceed "
                f"target_epsilon={target:g}: it was calculated for {plan.steps} steps with noise "
                f"{plan.event().noise_multiplier:g}; the step was not taken"
            )

    def _check_gradients(self) -> None:
        """Refuses gradients that did not come through the module's outputs."""
        named = self._prepared.parameters.items()
        found = [n for n, p in named if p.grad is not None and p.grad is not self._noised.get(n)]
        if found:
            raise StepError(
                f"{', '.join(found)}: a gradient came from elsewhere than the outputs of the "
                "module that make_private returned, so it is not clipped; leave penalties on "
                "parameters to the optimizer's weight_decay, and call the returned module"
            )
        written = [
            f"{name}.{kept}"
            for name, p in named
            for kept in ("grad_sample", "summed_grad")
            if getattr(p, kept, None) is not None
        ]
        if written:
            raise StepError(
                f"{', '.join(written)}: nothing here reads it, and no gradient of an example is "
                'kept; change the loss instead, or choose grad_sample_mode="hooks"'
            )

    def _refuse_within_a_sample(self, name: str) -> None:
        """Clipping and noise of one sample use the same values."""
        if self._samples.seen:
            raise StepError(
                f"{name}: the present sample was begun with another value; write it after the "
                "step that completes the sample"
            )
