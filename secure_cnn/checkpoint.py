"""Checkpoints of a run: a model with its claims, or a training under way; sealed when asked for.

A model's file holds the tensors of its state dict under their own names. What a file needs for
rebuilding the model is in its claims, as plain values: no class is ever looked up by a name from a
file other than one of `MODELS`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from secure_cnn import archive
from secure_cnn.archive.keys import check_identity, check_recipients, check_signer, check_trusted
from secure_cnn.errors import ModelError, RunError
from secure_cnn.models import Architecture, load_weights
from secure_cnn.own_network import OwnNetwork

__all__ = [
    "LoadedModel",
    "Sealing",
    "Unlocking",
    "check_model",
    "check_sealing",
    "check_unlocking",
    "model_digest",
    "read_model",
    "read_state",
    "write_model",
    "write_state",
]

_CLAIMS = "claims"
_ROOM_FOR_FIGURES = 1 << 14
"""Bytes that a model's claims take but for names: what is found of it, versions, attacks."""


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """To whom checkpoints are encrypted, at least one, and who signs them, if anybody.

    Example:
        >>> identity = archive.generate_identity()
        >>> len(Sealing(recipients=(identity.recipient,)).recipients)
        1
    """

    recipients: Sequence[archive.AnyRecipient]
    signer: archive.Signer | None = None

    def __post_init__(self) -> None:
        # A tuple of its own: a list that is emptied later must not take the recipients away.
        object.__setattr__(self, "recipients", check_recipients(self.recipients))
        check_signer(self.signer)
        if not self.recipients:
            raise RunError(
                "sealing: expected at least one recipient, got none: nobody could open the file"
            )


@dataclass(frozen=True, kw_only=True)
class Unlocking:
    """What opens sealed checkpoints, and whose signatures count; None asks for no signature.

    Example:
        >>> Unlocking(identity=archive.generate_identity()).trusted is None
        True
    """

    identity: archive.AnyIdentity
    trusted: Sequence[archive.Verifier] | None = None

    def __post_init__(self) -> None:
        check_identity(self.identity)
        if self.trusted is not None:
            object.__setattr__(self, "trusted", check_trusted(self.trusted))


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model read back, in evaluation mode on the CPU, with what its file claims.

    Claims are bound into a sealed file; the private ones only its recipients could read.

    Example:
        >>> pets = Architecture(model="compact", channels=1, height=8, width=8, classes=("a", "b"))
        >>> loaded = LoadedModel(model=pets.build(), architecture=pets, claims={"accuracy": 0.9})
        >>> loaded.model(torch.zeros(3, 1, 8, 8)).shape, loaded.claims["accuracy"]
        (torch.Size([3, 2]), 0.9)
    """

    model: nn.Module
    architecture: Architecture
    claims: Mapping[str, Any]
    private_claims: Mapping[str, Any] = field(default_factory=dict, repr=False)


def check_sealing(value: object) -> None:
    """Refuses what is no `Sealing`, such as a list of recipients; None is: it seals nothing."""
    if not isinstance(value, Sealing | None):
        raise RunError(
            f"sealing: expected a Sealing or None, got {type(value).__name__}; give "
            "Sealing(recipients=[...])"
        )


def check_unlocking(value: object) -> None:
    """Refuses what is no `Unlocking`, such as an identity; None is: it opens plain files only."""
    if not isinstance(value, Unlocking | None):
        raise RunError(
            f"unlocking: expected an Unlocking or None, got {type(value).__name__}; give "
            "Unlocking(identity=...)"
        )


def model_digest(model: nn.Module) -> str:
    """SHA-256 of what a model has learned, its names and values: the same when it is read back."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def write_model(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    *,
    claims: Mapping[str, archive.JSON],
    sealing: Sealing | None,
    private_claims: Mapping[str, archive.JSON] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model's state dict with its claims; sealed where `sealing` is given, else plain.

    Private claims are for the recipients of a sealed file; a plain one is written without them.

    Raises:
        ArchiveError: The file exists, or cannot be written.
        RunError: `sealing` is no `Sealing`.

    Example:
        >>> import tempfile
        >>> architecture = Architecture(
        ...     model="compact", channels=1, height=8, width=8, classes=("a", "b"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     write_model(path, architecture.build(), architecture, claims={"accuracy": 0.5},
        ...                 sealing=None)
        ...     read_model(path, unlocking=None).claims["accuracy"]
        0.5
    """
    check_sealing(sealing)
    bound = {**claims, "architecture": architecture.to_dict()}
    weights: dict[str, torch.Tensor] = dict(model.state_dict())
    if sealing is None:
        archive.save_plain(
            path, {**weights, _CLAIMS: cast(archive.State, bound)}, overwrite=overwrite
        )
    else:
        _seal(path, weights, sealing, bound, private_claims, overwrite=overwrite)


def read_model(
    path: Path, *, unlocking: Unlocking | None, network: OwnNetwork | None = None
) -> LoadedModel:
    """Reads what `write_model` wrote: a sealed file with `unlocking`, a plain one without.

    Guarantee: with `unlocking`, a file that is not sealed, was changed, or is not signed by whom it
    must be, is refused. No code is run because the file names it: a network of one's own is made by
    `network`, which must have the name and options that the file says.

    Raises:
        ArchiveError: The file cannot be read or is not what it must be.
        ModelError: It holds no model of ours, or weights that do not fit its architecture.
        RunError: `unlocking` is no `Unlocking`.

    Example:
        >>> read_model(Path("nowhere.safetensors"), unlocking=None)
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.StorageError: nowhere.safetensors: cannot read: ...
    """
    check_unlocking(unlocking)
    secret: Mapping[str, Any] = {}
    if unlocking is None:
        state = read_state(path, unlocking=None)
        claims = state.pop(_CLAIMS, None)
    else:
        # The claims are read first and then demanded: a file swapped in between is refused.
        claims = archive.inspect(path).claims
        state = read_state(path, unlocking=unlocking, expect=claims)
        if "privacy" in claims:  # only such a model has any, and a passphrase takes its time
            with archive.open_lazy(
                path, identity=unlocking.identity, trusted=unlocking.trusted, expect=claims
            ) as lazy:
                secret = lazy.private_claims
    if not isinstance(claims, dict) or not isinstance(claims.get("architecture"), dict):
        raise ModelError(
            f"{path}: expected a model of ours, got a file whose claims name no architecture (a "
            "training checkpoint, or another tool's file?); what you did not train with secure-cnn "
            "is evaluated in Python, by defenses.evaluate"
        )
    architecture = Architecture.from_dict(cast(dict[str, Any], claims["architecture"]))
    try:
        model = architecture.blank(network=network)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    load_weights(model, cast(dict[str, torch.Tensor], state))
    return LoadedModel(
        model=model.eval(), architecture=architecture, claims=claims, private_claims=secret
    )


def write_state(path: Path, state: Mapping[str, Any], *, sealing: Sealing | None) -> None:
    """Writes a training state over the one before, whole or not at all."""
    if sealing is None:
        archive.save_plain(path, cast(archive.State, dict(state)), overwrite=True)
    else:
        _seal(path, dict(state), sealing, overwrite=True)


def _seal(
    path: Path,
    tree: dict[str, Any],
    sealing: Sealing,
    claims: dict[str, Any] | None = None,
    private_claims: Mapping[str, archive.JSON] | None = None,
    *,
    overwrite: bool,
) -> None:
    archive.save(
        path,
        cast(archive.State, tree),
        recipients=sealing.recipients,
        signer=sealing.signer,
        claims=claims,
        private_claims=private_claims,
        name=path.name,
        overwrite=overwrite,
    )


def read_state(
    path: Path, *, unlocking: Unlocking | None, expect: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Reads what `write_state` wrote; a sealed file must carry the claims to `expect`."""
    if unlocking is None:
        state = archive.load_plain(path)
    else:
        state = archive.load(
            path, identity=unlocking.identity, trusted=unlocking.trusted, expect=expect
        )
    if not isinstance(state, dict):
        raise ModelError(f"{path}: expected named tensors, got {type(state).__name__}")
    return state


def check_model(
    model: nn.Module, architecture: Architecture, data: str, *, sealing: Sealing | None
) -> None:
    """Passes if `write_model` will take the trained model; to be asked before the training."""
    claims: dict[str, Any] = {
        "architecture": architecture.to_dict(),
        "data": {"name": data},
        "found": " " * _ROOM_FOR_FIGURES,
    }
    weights: dict[str, Any] = dict(model.state_dict())
    if sealing is None:
        archive.check({**weights, _CLAIMS: claims})
    else:
        archive.check(weights, claims=claims, recipients=sealing.recipients)
