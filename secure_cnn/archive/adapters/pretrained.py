"""A model with its configuration in one sealed file, in the manner of Hugging Face's libraries.

Their `save_pretrained` writes a folder with the configuration in clear; this pair writes one file
that hides both. No class is looked up by a name from the file: who loads says what to build.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.slots import AnyIdentity, AnyRecipient
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.loading import load
from secure_cnn.archive.sealing import save
from secure_cnn.archive.storage import Path

__all__ = ["from_pretrained", "save_pretrained"]

_Model = TypeVar("_Model", bound=nn.Module)


def save_pretrained(
    path: Path,
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    recipients: Sequence[AnyRecipient],
    signer: Signer | None = None,
    claims: Mapping[str, JSON] | None = None,
    name: str = "",
    overwrite: bool = False,
) -> None:
    """Seals a model's weights and configuration, both hidden, in one file, not a folder.

    Args:
        model: Any module; its `state_dict` is saved, tied weights once.
        config: What it takes to build such a model again, as plain data: of a model of transformers
            ``model.config.to_dict()``, of one with `PyTorchModelHubMixin` the arguments it was
            built with.
        recipients: Who can open it; this and the rest as for `save`.

    Example:
        >>> save_pretrained("m", nn.Linear(1, 1), config={"activation": nn.ReLU}, recipients=[])
        Traceback (most recent call last):
        secure_cnn.archive.errors.StateError: state.config.activation: expected tensors and ...
    """
    state = {"config": dict(config), "weights": dict(model.state_dict())}
    save(
        path,
        cast(dict[str, Any], state),
        recipients=recipients,
        signer=signer,
        claims=claims,
        name=name,
        overwrite=overwrite,
    )


def from_pretrained(
    path: Path,
    build: Callable[[dict[str, Any]], _Model],
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
) -> _Model:
    """The model in a file of `save_pretrained`, in evaluation mode.

    Args:
        build: Makes a model of the configuration, such as
            ``lambda config: BertModel(BertConfig.from_dict(config))``.
        identity: What opens it; this and the rest as for `load`.

    Raises:
        StateError: The file holds something else, or its weights do not fit what `build` made.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, config = archive.generate_identity(), {"in_features": 3, "out_features": 2}
        >>> save_pretrained("m", nn.Linear(3, 2), config=config, recipients=[me.recipient])
        >>> from_pretrained("m", lambda config: nn.Linear(**config), identity=me)
        Linear(in_features=3, out_features=2, bias=True)
    """
    state = load(path, identity=identity, trusted=trusted, expect=expect, core_hash=core_hash)
    if not isinstance(state, dict) or state.keys() != {"config", "weights"}:
        raise StateError(f"{path}: expected a file of save_pretrained; open it with load()")
    config, weights = state["config"], state["weights"]
    if (
        not isinstance(config, dict)
        or not isinstance(weights, dict)
        or not all(isinstance(key, str) for key in weights)
        or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    ):
        raise StateError(f"{path}: expected a configuration and weights by name; save it again")
    model = build(config)
    try:
        model.load_state_dict(cast(dict[str, torch.Tensor], weights))
    except RuntimeError as error:
        raise StateError(
            f"{path}: the weights do not fit {type(model).__name__}: "
            f"{' '.join(str(error).split())}; build what was saved"
        ) from None
    return model.eval()
