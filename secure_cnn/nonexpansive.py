"""How far the answers of the model `nonexpansive` provably hold: what is known of its features."""

from dataclasses import dataclass
from typing import final

from torch import nn

from secure_cnn.layers import Normalize
from secure_cnn.scattering import Scattering

__all__ = ["LipschitzBound", "lipschitz_bound"]

_LAYERS = (Normalize, Scattering, nn.Flatten, nn.Linear)
_OWN_WAYS = ("forward", "_forward_hooks", "_forward_pre_hooks")
"""Attributes by which a layer does something else than its kind."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LipschitzBound:
    """A linear layer, and how fast what it sees can move: for `defenses.certify_lipschitz`.

    Attributes:
        head: The model's last layer.
        constant: How much faster than the images its features move in l2, at most.
    """

    head: nn.Linear
    constant: float


def lipschitz_bound(model: nn.Module) -> LipschitzBound | None:
    """What certifies the answers of a model `nonexpansive` for nothing; None of any other model.

    Guarantee: the constant is computed anew from the filters that this very model has; a layer
    that was replaced, or has a hook, makes it another model.

    Example:
        >>> from secure_cnn import DataSpec, build_model
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
        >>> lipschitz_bound(build_model("nonexpansive", spec)).constant < 1
        True
        >>> lipschitz_bound(build_model("compact", spec)) is None
        True
    """
    if type(model) is not nn.Sequential or tuple(type(each) for each in model) != _LAYERS:
        return None
    for each in (model, *model):
        if any(each.__dict__.get(name) for name in _OWN_WAYS):
            return None
    normalize, scattering, _, head = model
    assert isinstance(normalize, Normalize), "by its type"
    assert isinstance(scattering, Scattering), "by its type"
    assert isinstance(head, nn.Linear), "by its type"
    return LipschitzBound(head=head, constant=scattering.lipschitz_constant() / abs(normalize.std))
