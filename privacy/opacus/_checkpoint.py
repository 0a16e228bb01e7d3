"""Checkpoints of the drop-in: Opacus' own in its modes, with an account that is checked."""

from typing import Any

from torch import nn

from privacy.errors import PlanError

__all__ = ["Checkpoints"]


class Checkpoints:
    """What `PrivacyEngine` does with files."""

    _original: Any

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
        """Opacus' own in its modes; refused in the fused mode, for it is a pickle.

        Raises:
            PlanError: No training of this engine is in one of Opacus' modes.
        """
        self._pickling().save_checkpoint(
            path=path,
            module=module,
            optimizer=optimizer,
            noise_scheduler=noise_scheduler,
            grad_clip_scheduler=grad_clip_scheduler,
            checkpoint_dict=checkpoint_dict,
            module_state_dict_kwargs=module_state_dict_kwargs,
            torch_save_kwargs=torch_save_kwargs,
        )

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

        Raises:
            PlanError: No training of this engine is in one of Opacus' modes, or the file's account
                does not fit.
        """
        original = self._pickling()
        kept = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        try:
            return original.load_checkpoint(
                path=path,
                module=module,
                optimizer=optimizer,
                noise_scheduler=noise_scheduler,
                grad_clip_scheduler=grad_clip_scheduler,
                module_load_dict_kwargs=module_load_dict_kwargs,
                torch_load_kwargs=torch_load_kwargs,
            )
        except KeyError as error:
            module.load_state_dict(kept)
            raise PlanError(
                f"checkpoint: expected what save_checkpoint wrote, it lacks {error}"
            ) from error
        except BaseException:
            module.load_state_dict(kept)
            raise

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
