"""The engine: what Opacus' users call, and what has become of it.

The mode "fused" is ours. Other modes, checkpoints and rules for modules are left to Opacus' own
engine, with an account that cannot fall.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import opacus
import torch
from opacus.accountants import create_accountant
from torch import nn
from torch.utils.data import DataLoader

from privacy.batch import Forward
from privacy.errors import PlanError, PrivacyError
from privacy.ledger import Ledger
from privacy.opacus import compatible
from privacy.opacus.account import ACCOUNTS, Account
from privacy.opacus.loader import Samples, plan_for, poisson_loader, warn_of_groups
from privacy.opacus.module import FusedModule, Outputs
from privacy.opacus.optimizer import FusedOptimizer
from privacy.opacus.refusals import (
    ENGINE,
    Followed,
    as_opacus_raises,
    check_reduction,
    check_settings,
    check_unrecorded,
    refuse_adaptive,
)
from privacy.plan import DPPlan
from privacy.validate import check_module

__all__ = ["PrivacyEngine"]

_FUSED = "fused"


class PrivacyEngine(Followed):
    """Opacus' `PrivacyEngine` with `grad_sample_mode="fused"` added, and that the default.

    Guarantee, in the fused mode: what `optimizer.step()` writes to the parameters is
    (`get_epsilon(delta)`, delta)-differentially private in the loader's data set under adding or
    removing one example, given that what the loss takes from labels alone keeps examples apart.
    (The loss is followed from the module's outputs on, and refused where rows meet there; weights
    that were normalised over the labels of a batch before are not seen.)
    What differs from Opacus is listed in `privacy.opacus`.

    Args:
        accountant: "prv" or "rdp"; the fused mode reports the tighter of both whichever is named.
        secure_mode: For Opacus' own modes.
        ledger: A file, or where there is none yet, in which the one training of this engine writes
            each step before its release; a training that goes back to an earlier state has spent
            what it had spent. For the fused mode; see `privacy.Ledger.open`.

    Example:
        >>> dataset = torch.utils.data.TensorDataset(torch.rand(64, 4), torch.arange(64) % 2)
        >>> model = nn.Linear(4, 2)
        >>> engine = PrivacyEngine()
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(dataset, batch_size=16),
        ...     noise_multiplier=2.0,
        ...     max_grad_norm=1.0,
        ... )
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(images), labels).backward()
        ...     optimizer.step()
        >>> round(engine.get_epsilon(delta=1e-3), 1)
        0.8
    """

    refused = ENGINE

    _account: Any
    _ledger: str | os.PathLike[str] | None
    _mechanism: str
    _original: Any
    _secure_mode: bool
    _trainings: list[FusedOptimizer]

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        account = ACCOUNTS.get(accountant)
        vars(self).update(
            _mechanism=accountant,
            _secure_mode=secure_mode,
            _ledger=ledger,
            _account=None if account is None else account(),
            _trainings=[],
            _original=None,
        )

    def __repr__(self) -> str:
        return (
            f"PrivacyEngine(accountant={self._mechanism!r}, secure_mode={self._secure_mode}, "
            f"ledger={self._ledger!r})"
        )

    @as_opacus_raises()
    def make_private(  # noqa: PLR0913  (Opacus' interface)
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = _FUSED,
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        target_unclipped_quantile: float | None = None,
        clipbound_learning_rate: float | None = None,
        max_clipbound: float | None = None,
        min_clipbound: float | None = None,
        unclipped_num_std: float | None = None,
        forward: Forward | None = None,
    ) -> Any:
        """Makes module, optimizer and loader private, with the noise given.

        What is not named below is as in Opacus; the fused mode takes the defaults only.

        Args:
            module: In training mode; its outputs are tensors with a row an example, alone or in
                tuples, dictionaries and dataclasses.
            optimizer: Holds exactly the module's trainable parameters.
            data_loader: Over a map-style data set, with a `batch_size` and without a sampler of its
                own.
            noise_multiplier: Noise over C, > 0.
            max_grad_norm: C, > 0.
            loss_reduction: How the user's loss joins its rows, "mean" or "sum".
            grad_sample_mode: "fused", or one of Opacus'.
            rand_on_empty: Without effect in the fused mode.
            forward: How the loop calls the module on a batch, for the fused mode and where batches
                are no `(inputs, target)`: `lambda model, batch: model(**batch)`.
        """
        asked = _given(locals())
        if grad_sample_mode != _FUSED:
            return self._noted(self._opacus(module, forward).make_private(**asked), data_loader)
        refuse_adaptive(asked)
        check_settings(batch_first, poisson_sampling, clipping, noise_generator, wrap_model)
        self._check_engine(target=False)
        plan = plan_for(data_loader, max_grad_norm, epochs=1)
        plan = dataclasses.replace(plan, noise_multiplier=noise_multiplier)
        return self._fuse(plan, module, optimizer, data_loader, loss_reduction, forward)

    @as_opacus_raises()
    def make_private_with_epsilon(  # noqa: PLR0913  (Opacus' interface)
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = _FUSED,
        wrap_model: bool = True,
        forward: Forward | None = None,
    ) -> Any:
        """Makes module, optimizer and loader private, with the least noise for a budget.

        Guarantee, in the fused mode: `get_epsilon(target_delta)` never exceeds `target_epsilon`.
        The step after `epochs` passes over the loader, at least 1, raises `BudgetExceeded`.
        `target_delta` is in (0, 1 / len(dataset)); everything else is as for `make_private`, and
        an engine that was used before is refused.
        """
        asked = _given(locals())
        if grad_sample_mode != _FUSED:
            original = self._opacus(module, forward)
            return self._noted(original.make_private_with_epsilon(**asked), data_loader)
        check_settings(batch_first, poisson_sampling, clipping, noise_generator, wrap_model)
        self._check_engine(target=True)
        plan = plan_for(data_loader, max_grad_norm, epochs=epochs)
        plan = plan.calibrate(epsilon=target_epsilon, delta=target_delta)
        return self._fuse(plan, module, optimizer, data_loader, loss_reduction, forward)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon of everything spent so far, at `delta` in (0, 1)."""
        return float(self.accountant.get_epsilon(delta))

    def _fuse(
        self,
        plan: DPPlan,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        loss_reduction: str,
        forward: Forward | None,
    ) -> tuple[FusedModule, FusedOptimizer, DataLoader[Any]]:
        """The private three, on this engine's account; where this raises nothing has changed."""
        if self._ledger is not None and self._trainings:
            raise PlanError(
                "ledger: a file is one training's, and this engine has made one private; use a new "
                "PrivacyEngine with a file of its own"
            )
        warn_of_groups(plan, loader)
        ledger = Ledger() if self._ledger is None else Ledger.open(self._ledger)
        check_reduction(loss_reduction)
        prepared, padding = compatible.prepared(plan, module, optimizer, loader, forward)
        outputs = Outputs()
        samples = Samples(prefetching=loader.num_workers > 0, check=prepared.check_attached)
        try:
            # After every refusal: what does not train is not noted in account or file.
            self._account.expect(
                noise_multiplier=plan.event().noise_multiplier, sampling_rate=plan.sampling_rate
            )
            if ledger.path is not None:
                ledger.bind(plan)
                self._account.cover(ledger.events)
            private = FusedOptimizer(
                plan, prepared, outputs, samples, self._account, ledger, loss_reduction
            )
            batches = poisson_loader(loader, samples, rate=plan.sampling_rate, padding=padding)
        except BaseException:
            prepared.undo()
            raise
        optimizer.zero_grad()
        self._trainings.append(private)
        return FusedModule(prepared, outputs), private, batches

    def _check_engine(self, *, target: bool) -> None:
        """Refuses what would mix accounts, or go on beyond a target."""
        if self._mechanism not in ACCOUNTS:
            raise PlanError(
                f"accountant: expected one of {', '.join(ACCOUNTS)} in the fused mode, got "
                f"{self._mechanism!r}; Opacus' gdp is an approximation that can understate epsilon"
            )
        if self._original is not None:
            raise PlanError(
                "grad_sample_mode: this engine has been used in one of Opacus' modes; use a new "
                "PrivacyEngine for the fused mode, and add their epsilons up"
            )
        targets = [training.plan.target_epsilon for training in self._trainings]
        if (target and targets) or any(epsilon is not None for epsilon in targets):
            raise PlanError(
                "target_epsilon: this engine has made another training private, and budgets add "
                "up; use a new PrivacyEngine where one has a target"
            )

    @property
    def accountant(self) -> Any:
        """The engine's account, one of Opacus' accountants: what is written to it counts."""
        if self._account is None:
            # Of Opacus' own modes only: it warns of this one.
            self._account = create_accountant(mechanism=self._mechanism)
        return self._account

    @property
    def secure_mode(self) -> bool:
        """As it was given; the fused mode's noise is cryptographic in any case."""
        return self._secure_mode

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Opacus' own in its modes; refused in the fused mode, for it is a pickle."""
        self._pickling().save_checkpoint(**_given(locals()))

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Opacus' own in its modes, as `save_checkpoint`; it trusts the file with running code.

        Its account is not trusted: it must fit what this engine trains with, and the larger is
        charged where it says less than was spent here. The module stays as it is where it does not
        fit.
        """
        asked, original = _given(locals()), self._pickling()
        kept = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        try:
            return original.load_checkpoint(**asked)
        except BaseException as error:
            module.load_state_dict(kept)
            if not isinstance(error, KeyError):
                raise
            raise PlanError(
                f"checkpoint: expected what save_checkpoint wrote, it lacks {error}"
            ) from error

    def is_compatible(
        self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None
    ) -> bool:
        """Whether `validate` passes."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except PrivacyError:
            return False
        return True

    @as_opacus_raises()
    def validate(
        self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None
    ) -> None:
        """Refuses what `make_private` would, by Opacus' rules and by ours, and changes nothing.

        With optimizer and loader the answer is that of `make_private`; without them it is as much
        of it as the module tells by its layers.
        """
        compatible.validate(module, optimizer, data_loader)

    @classmethod
    @as_opacus_raises()
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy that passes `validate`: replaced by `privacy.fix`, and by Opacus what that leaves.

        Ours come first: they keep the weights, and refuse what they cannot keep.
        """
        return compatible.compatible(module)

    def _pickling(self) -> Any:
        """Opacus' engine where one of its modes is in use."""
        if self._original is None:
            raise PlanError(
                "checkpoint: Opacus' format is a pickle, which runs code when it is loaded; save "
                "module.state_dict() and optimizer.state_dict(), which holds plan and ledger too, "
                "in a format that does not (secure_cnn.archive.save seals them), and give them to "
                "load_state_dict() after make_private with the same settings"
            )
        return self._original

    def _opacus(self, module: nn.Module, forward: Forward | None) -> Any:
        """Opacus' engine, made when one of its modes is first asked for: it warns, or refuses."""
        if self._trainings:
            raise PlanError(
                "grad_sample_mode: this engine has made a training private in the fused mode; use "
                "a new PrivacyEngine for another mode, and add their epsilons up"
            )
        if self._ledger is not None:
            raise PlanError(
                "ledger: Opacus' own modes do not write to it; use the fused mode, or leave it out"
            )
        if forward is not None:
            raise PlanError(
                "forward: Opacus' own modes do not ask how the module is called; leave it out"
            )
        check_unrecorded(check_module(module))
        if self._original is None:
            self._original = opacus.PrivacyEngine(
                accountant=self._mechanism, secure_mode=self.secure_mode
            )
            self._original.accountant = self.accountant
        return self._original

    def _noted(self, made: Any, data_loader: DataLoader[Any]) -> Any:
        """What Opacus made; the account notes the noise and rate with which it trains."""
        if isinstance(self._account, Account):
            self._account.expect(
                noise_multiplier=float(made[1].noise_multiplier), sampling_rate=1 / len(data_loader)
            )
        return made


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A method's `locals()` as Opacus takes them; for what is None it has its own default."""
    return {n: value for n, value in arguments.items() if n != "self" and value is not None}
