"""Sealed checkpoints under Lightning's trainer: one plug-in, nothing else in the code changes.

The only module that knows Lightning, which the extra ``lightning`` brings.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from secure_cnn.archive.errors import MissingExtra, StateError, StorageError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.slots import AnyIdentity, AnyRecipient
from secure_cnn.archive.keys import check_identity, check_recipients, check_signer, check_trusted
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.loading import load
from secure_cnn.archive.sealing import save

try:
    from lightning.fabric.plugins import (  # type: ignore[import-not-found,unused-ignore]
        CheckpointIO,
    )
except ImportError:
    CheckpointIO = object  # type: ignore[assignment,misc,unused-ignore]

__all__ = ["SealedCheckpointIO"]


@final
class SealedCheckpointIO(CheckpointIO):  # type: ignore[misc,unused-ignore]
    """What Lightning's trainer writes is sealed, what it reads must be sealed, and nothing runs.

    Give it to the trainer: ``Trainer(plugins=[SealedCheckpointIO(...)])``. A checkpoint may hold
    tensors, numbers, texts and plain containers; whatever else a callback, a scheduler or the
    hyperparameters put in is refused when saving, by its path. `LightningModule`'s
    `load_from_checkpoint` does not ask plug-ins: resume by ``fit(ckpt_path=...)``, or use
    `load_checkpoint` and `load_state_dict`. Strategies that write sharded checkpoints on their own,
    such as FSDP, do not ask plug-ins either; for these see
    `secure_cnn.archive.adapters.distributed`.

    Args:
        identity: Opens what is loaded; None if this trainer never resumes.
        trusted: Whose signatures count when loading; the signer's own if None and there is a
            signer, else nobody's.
        expect: Claims that must be in what is loaded.
    """

    def __init__(
        self,
        *,
        recipients: Sequence[AnyRecipient],
        signer: Signer | None = None,
        claims: Mapping[str, JSON] | None = None,
        identity: AnyIdentity | None = None,
        trusted: Sequence[Verifier] | None = None,
        expect: Mapping[str, object] | None = None,
    ) -> None:
        if CheckpointIO is object:
            raise MissingExtra("the plug-in for Lightning", "lightning")
        self._recipients, self._signer = check_recipients(recipients), check_signer(signer)
        self._identity = None if identity is None else check_identity(identity)
        self._claims, self._expect = claims, expect
        trusted = [signer.verifier] if trusted is None and signer else trusted
        self._trusted = None if trusted is None else check_trusted(trusted)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Seals a checkpoint, over an older one if there is one; the folder is made."""
        if storage_options is not None:
            raise StateError("storage_options: expected None, got some; leave them out")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot make its folder: {error.strerror}") from error
        save(
            path,
            checkpoint,
            recipients=self._recipients,
            signer=self._signer,
            claims=self._claims,
            overwrite=True,
        )

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A sealed checkpoint; its tensors are in main memory, Lightning moves them on its own."""
        if self._identity is None:
            raise StateError(
                f"{path}: expected an identity to open it with; give one to the plugin"
            )
        if map_location not in (None, "cpu", torch.device("cpu")):
            raise StateError(f"map_location: expected None or the CPU, got {map_location!r}")
        state = load(path, identity=self._identity, trusted=self._trusted, expect=self._expect)
        if not isinstance(state, dict):
            raise StateError(f"{path}: expected a checkpoint of Lightning, got another state")
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint if it is there; the copies of it stay readable."""
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot remove: {os.strerror(error.errno or 0)}") from error
