"""What may be written to the private optimizer while it trains, and what each write does."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import nn

from privacy._fused.loader import Samples
from privacy._fused.writes import refusal
from privacy.accounting import GaussianSteps
from privacy.errors import PlanError, StepError
from privacy.ledger import Ledger
from privacy.plan import DPPlan
from privacy.update import ClippedSum

__all__ = ["Account", "Settings"]

_LOSS_REDUCTIONS = ("mean", "sum")


class Account(Protocol):
    """Where every step is written down beside the training's own ledger: the engine's account."""

    @property
    def events(self) -> list[GaussianSteps]:
        """Everything spent by the engine."""

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Writes one step down."""

    def cover(self, events: Iterable[GaussianSteps]) -> None:
        """Charges at least these."""

    def expect(self, *, noise_multiplier: float, sampling_rate: float) -> None:
        """Says with what the training goes on."""


class Settings:
    """The private optimizer's attributes: those of Opacus' optimizer, each with its effect."""

    ledger: Ledger
    plan: DPPlan
    original_optimizer: Any
    refused: ClassVar[Mapping[str, str]]
    _account: Account
    _batch_size: int
    _clipped: ClippedSum
    _loss_reduction: str
    _noise_multiplier: float
    _parameters: dict[str, nn.Parameter]
    _samples: Samples
    _step_hook: Any

    @property
    def noise_multiplier(self) -> float:
        """Noise over C of the steps to come; with a target epsilon not less than the plan's."""
        return float(self._noise_multiplier)

    @noise_multiplier.setter
    def noise_multiplier(self, noise: float) -> None:
        noise = _positive("noise_multiplier", noise)
        least = self.plan.noise_multiplier or 0.0
        if self.plan.target_epsilon is not None and noise < least * (1 - 1e-9):
            raise PlanError(
                f"noise_multiplier: expected at least {least:g}, which target_epsilon="
                f"{self.plan.target_epsilon:g} was calculated with, got {noise:g}; for a schedule "
                "use make_private with a noise_multiplier, and read get_epsilon(delta)"
            )
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
        return float(self._clipped.max_grad_norm)

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float) -> None:
        norm = _positive("max_grad_norm", norm)
        self._refuse_within_a_sample("max_grad_norm")
        self._clipped.max_grad_norm = norm

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
        if reduction not in _LOSS_REDUCTIONS:
            raise PlanError(f'loss_reduction: expected "mean" or "sum", got {reduction!r}')
        self._refuse_within_a_sample("loss_reduction")
        self._loss_reduction = reduction

    @property
    def step_hook(self) -> Callable[["Settings"], None] | None:
        """Called between noise and step; the account does not need it."""
        hook: Callable[[Settings], None] | None = self._step_hook
        return hook

    @step_hook.setter
    def step_hook(self, hook: Callable[["Settings"], None] | None) -> None:
        if hook is not None and not callable(hook):
            raise StepError(f"step_hook: expected a function of the optimizer, got {hook!r}")
        self._step_hook = hook

    @property
    def generator(self) -> None:
        """None: see its refusal."""

    @generator.setter
    def generator(self, generator: object) -> None:
        if generator is not None:
            raise refusal(self, "generator", self.refused)

    @property
    def secure_mode(self) -> bool:
        """True."""
        return True

    @secure_mode.setter
    def secure_mode(self, secure: bool) -> None:
        if secure is not True:
            raise refusal(self, "secure_mode", self.refused)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return list(self._parameters.values())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The original optimizer's own."""
        groups: list[dict[str, Any]] = self.original_optimizer.param_groups
        return groups

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
    def state(self) -> Any:
        """The original optimizer's own."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The original optimizer's own."""
        defaults: dict[str, Any] = self.original_optimizer.defaults
        return defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def _refuse_within_a_sample(self, name: str) -> None:
        """Clipping and noise of one sample use the same values."""
        if self._samples.seen:
            raise StepError(
                f"{name}: the present sample was begun with another value; write it after the "
                "step that completes the sample"
            )


def _positive(name: str, value: object) -> float:
    """A finite number > 0."""
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not (valid and math.isfinite(value) and value > 0):  # type: ignore[operator, arg-type]
        raise PlanError(f"{name}: expected a finite number > 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]
