"""What the drop-in leaves to Opacus: its other modes, its checkpoints, its rules for modules."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import opacus
from opacus.accountants import create_accountant
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader

from privacy.errors import PlanError, PrivacyError, UnsupportedLayer
from privacy.opacus.account import Account
from privacy.opacus.optimizer import FusedOptimizer
from privacy.replacement import fix
from privacy.validate import check_layers

__all__ = ["OpacusModes", "given"]


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A method's `locals()` as Opacus' method of the same signature takes them.

    What is None was not given: Opacus has its own default for it.
    """
    return {n: value for n, value in arguments.items() if n != "self" and value is not None}


class OpacusModes:
    """The part of `PrivacyEngine` that is Opacus' own engine, with an account that cannot fall."""

    _account: Any
    _ledger: str | os.PathLike[str] | None
    _mechanism: str
    _original: Any
    _secure_mode: bool
    _trainings: list[FusedOptimizer]

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
        asked = given(locals())
        self._pickling().save_checkpoint(**asked)

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

        Its account is not trusted: it must fit what this engine trains with, and where it says less
        than what was spent here, the larger is charged. The module stays as it is where it does
        not fit.
        """
        asked, original = given(locals()), self._pickling()
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

    def validate(
        self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None
    ) -> None:
        """Refuses a module that mixes examples, by Opacus' rules and by ours."""
        check_layers(module)
        errors = ModuleValidator.validate(module, strict=False)
        if errors:
            raise UnsupportedLayer(
                f"{type(module).__name__}: {'; '.join(str(error) for error in errors)}"
            )

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy that passes `validate`: replaced by `privacy.fix`, and by Opacus what that leaves.

        Ours come first: they keep the weights, and refuse what they cannot keep.
        """
        module = ModuleValidator.fix(fix(copy.deepcopy(module)))
        cls().validate(module=module)
        return module

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

    def _opacus(self) -> Any:
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
                noise_multiplier=float(made[1].noise_multiplier),
                sampling_rate=1 / len(data_loader),
            )
        return made
