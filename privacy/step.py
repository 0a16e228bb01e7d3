"""One private step: what is refused before the first one, and how each is released.

`attach` and the Opacus drop-in differ in where batches and losses come from. What makes a step
private is here, once: the refusals, and the order of ledger, noise and optimizer.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from privacy.accounting import GaussianSteps
from privacy.batch import Forward, call_model, mapped
from privacy.clipping import rule_of
from privacy.clipping.layers import Installation, install
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Tuner
from privacy.clipping.uses import UsesRule
from privacy.errors import NotFollowed, PlanError, StepError, UnsupportedLayer
from privacy.noise import SecureGenerator
from privacy.plan import DPPlan
from privacy.probe import probe, rehearse
from privacy.summation import Reduce, alone
from privacy.trial import Trial
from privacy.update import ClippedSum
from privacy.validate import check_layers, check_trainable, trainable_parameters

__all__ = ["LockedIterator", "Prepared", "RefusingLock", "Reserved", "prepare", "release"]

_Item = TypeVar("_Item")
_Kind = tuple[torch.dtype, torch.Size, torch.device]


class Reserved:
    """An optimizer that refuses every step but those asked for here, until `free`.

    A step of the user's own would train on nothing, or on what was written to `.grad` by hand,
    without noise and uncounted. Not seen: another optimizer on the same parameters, and one that
    this one wraps. A class because it holds the hook.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._asked = optimizer, False
        self._hook = optimizer.register_step_pre_hook(self._refuse)

    def step(self) -> None:
        """Lets the optimizer step."""
        try:
            self._asked = True
            self.optimizer.step()
        finally:
            self._asked = False

    def free(self) -> None:
        """Gives the optimizer back to its user."""
        self._hook.remove()

    def _refuse(self, _optimizer: object, _args: Any, _kwargs: Any) -> None:
        if not self._asked:
            raise StepError(
                "optimizer.step() was called beside the private step: backward() of an attached "
                "model leaves it no gradients, and what is in .grad otherwise has no noise; give "
                "the losses to the private step alone, or detach the training first"
            )


class RefusingLock:
    """A lock that refuses a second thread instead of letting it wait.

    It belongs to a thread, not to a call: a Ctrl-C that prevents its release locks out no retry.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StepError(
                "another thread is in a step of this training: a batch must not be added twice; "
                "iterate private.batches and call private.step in one thread"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class LockedIterator(Generic[_Item]):
    """An iterator that holds a lock while it advances: a second thread is refused."""

    def __init__(self, items: Iterator[_Item], lock: RefusingLock) -> None:
        self._items, self._lock = items, lock

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        with self._lock:
            return next(self._items)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A recorded model, and an optimizer that only `release` steps.

    `clipped` is the one owner of the clipping norm: it follows the noise where it is adaptive.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    clipped: ClippedSum
    installation: Installation
    reserved: Reserved
    kinds: Mapping[str, _Kind]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is a plain model: nothing is recorded or reserved for it."""

    def check_attached(self) -> None:
        """Refuses to go on after `undo`, also where the model is a newer training's by now."""
        if not self.installation.layers:
            raise StepError(
                "this training was detached: its model is a plain one, or another training's; "
                "attach the model (or call make_private) again, and go on with what that returns"
            )

    def check(self) -> None:
        """Refuses, at each step, layers that mix examples and parameters trained since."""
        check_layers(self.model)
        check_trainable(self.model, self.parameters)
        now = _kinds(self.parameters)
        if now != self.kinds:
            changed = [name for name, was in self.kinds.items() if now[name] != was]
            was, found = (_described(kinds[changed[0]]) for kinds in (self.kinds, now))
            raise StepError(
                f"{', '.join(changed)}: expected {was}, as when the model was "
                f"attached, got {found}; convert and move the model before attach, not after "
                "it: put it back, or call private.detach() and attach it again"
            )

    def undo(self) -> None:
        """Gives every layer its own forward back, and the optimizer to its user."""
        self.installation.remove()
        self.reserved.free()


def prepare(
    plan: DPPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    samples: int,
    examples: Callable[[], Any],
    forward: Forward = call_model,
    tuner: Tuner | None = None,
) -> Prepared:
    """Refuses whatever would void the guarantee, then records the model's layers.

    The plan must be for so many `samples`; `examples` reads a few, a batch of any structure, once
    plan, model and optimizer are known to fit, and `forward` runs the model on such a batch. Where
    this raises, model and optimizer stay as they were.
    """
    _check_plan(plan, samples)
    parameters = trainable_parameters(model, optimizer)
    check_layers(model)
    device = next(iter(parameters.values())).device
    few = mapped(lambda tensor: tensor.to(device), examples())
    trial = Trial(model=model, examples=few, forward=forward)
    probe(trial)
    tape = Tape()
    clipped = ClippedSum(
        parameters,
        tape,
        max_grad_norm=plan.max_grad_norm,
        clipping=plan.clipping,
        float_safe=plan.float_safe,
    )
    clipped.check_range(examples=samples, noise_multiplier=plan.event().noise_multiplier)
    reserved = Reserved(optimizer)
    try:
        installation = _recorded(trial, parameters, tape, tuner or Tuner())
    except BaseException:
        reserved.free()
        raise
    return Prepared(model, parameters, clipped, installation, reserved, _kinds(parameters))


def _kinds(parameters: Mapping[str, nn.Parameter]) -> dict[str, _Kind]:
    """What each parameter is made of."""
    return {name: (p.dtype, p.shape, p.device) for name, p in parameters.items()}


def _described(kind: _Kind) -> str:
    dtype, shape, device = kind
    return f"{dtype} {list(shape)} on {device}"


def _recorded(
    trial: Trial, parameters: Mapping[str, nn.Parameter], tape: Tape, tuner: Tuner
) -> Installation:
    """Records the model and rehearses a step.

    A module whose own parameters cannot be followed is then recorded with all that is inside of it.
    """
    whole: set[str] = set()
    first: UnsupportedLayer | None = None
    while True:
        rule = partial(rule_of, tuner=tuner, whole=frozenset(whole))
        installation = install(trial.model, tape, rule)
        try:
            rehearse(trial, parameters, tape)
        except BaseException as error:
            followed = {n for n, r in installation.rules.items() if isinstance(r, UsesRule)}
            installation.remove()
            if not isinstance(error, UnsupportedLayer):
                raise
            first = first or error
            named = isinstance(error, NotFollowed) and followed & _labels(error, trial.model)
            if not (more := named or followed):
                if error is first:
                    raise
                raise UnsupportedLayer(f"{first}; run again as a whole: {error}") from error
            whole |= more
        else:
            return installation


def _labels(error: NotFollowed, model: nn.Module) -> set[str]:
    """The layers that an error names, as they are recorded."""
    return {name or type(model).__name__ for name in error.layers}


def release(
    prepared: Prepared,
    generator: SecureGenerator,
    event: GaussianSteps,
    *,
    record: Callable[[GaussianSteps], None],
    batch_size: int,
    before_step: Callable[[], None] | None = None,
    reduce: Reduce = alone,
) -> None:
    """Writes the step down, adds the noise, and only then lets the optimizer see it.

    Written first: an adaptive clipping norm moves with the noise, and an interruption between the
    two must not make a release free. What `record` raises keeps the sample unreleased. The sum is
    divided by a public `batch_size`, never the secret size of the sample. `before_step` is called
    when the noised gradients are in `.grad`. `reduce` adds the clipped sums of all processes up;
    the noise is added once, to that.
    """
    record(event)
    gradients = prepared.clipped.noised_mean(
        generator, noise_multiplier=event.noise_multiplier, batch_size=batch_size, reduce=reduce
    )
    # A frozen parameter may hold a raw gradient from before: the optimizer must not see it.
    prepared.reserved.optimizer.zero_grad()
    for parameter, gradient in zip(prepared.parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    if before_step is not None:
        before_step()
    prepared.reserved.step()


def _check_plan(plan: DPPlan, samples: int) -> None:
    """Refuses a plan without noise, for another data set, or that costs more than its target."""
    if not isinstance(plan, DPPlan):
        raise PlanError(f"plan: expected a privacy.DPPlan, got {type(plan).__name__}")
    plan.event()
    if samples != plan.samples:
        raise PlanError(
            f"samples: the plan is for {plan.samples}, the data set has {samples}"
            f"{'' if plan.unit == 'example' else ' persons'}; make the plan for this data set"
        )
    if plan.target_epsilon is not None and plan.epsilon() > plan.target_epsilon:
        raise PlanError(
            f"target_epsilon: the plan's {plan.steps} steps cost {plan.epsilon():.4g}, more than "
            f"the target of {plan.target_epsilon:g}; calibrate the plan again after changing it"
        )
