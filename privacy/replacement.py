"""Layers that mix examples or keep statistics of them, and what stands in for each.

By exact type only: a subclass can hold more than its base (an activation, a dropout), and what it
does besides normalising would be lost in silence.
"""

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from privacy.errors import UnsupportedLayer
from privacy.validate import check_module

__all__ = ["fix"]

_GROUPS = 32
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
    "_load_state_dict_post_hooks",
)


def fix(model: nn.Module) -> nn.Module:
    """Puts a GroupNorm of the same channels in the place of every BatchNorm; all else is kept.

    Guarantee: every other module stays the object that it was, and a new layer holds the very
    parameters of the old one, so that an optimizer may be built before or after. Replaced are
    BatchNorm1d, 2d, 3d and SyncBatchNorm by GroupNorm, and InstanceNorm that keeps running
    statistics by one that keeps none; what is of another class, though it inherits from these, is
    refused before anything is replaced.

    The number of groups is the largest divisor of the channels up to 32, and one where a
    BatchNorm1d stood, whose rows may have no positions to average over. Statistics that the
    layer had gathered are dropped. A layer that stood in two places stands in both again.

    Returns:
        The model itself, or a new layer if the model is a layer that is replaced.

    Raises:
        UnsupportedLayer: Names every layer that would lose more than its statistics, and its cure.
        StepError: The model is not a module.

    Example:
        >>> model = fix(nn.Sequential(nn.BatchNorm2d(6)))
        >>> type(model[0]).__name__, model[0].num_groups
        ('GroupNorm', 6)
    """
    layers = dict(check_module(model).named_modules(remove_duplicate=False))
    found = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, _BatchNorm)
        or (isinstance(layer, _InstanceNorm) and layer.track_running_stats)
    }
    lost = {name or type(layer).__name__: _lost(layer) for name, layer in found.items()}
    refused = [f"{name}: {what}" for name, what in lost.items() if what]
    if refused:
        raise UnsupportedLayer("; ".join(refused))
    new = {id(layer): _replacement(layer) for layer in found.values()}
    if id(model) in new:
        return new[id(model)]
    for name, layer in found.items():
        model.set_submodule(name, new[id(layer)])
    return model


def _lost(layer: nn.Module) -> str:
    """What of a layer its replacement could not keep, and the cure; empty if nothing is lost."""
    kind = type(layer).__name__
    if type(layer) not in (*_BATCH_NORMS, *_INSTANCE_NORMS):
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            return f"{kind} has no channels yet; run one forward pass before privacy.fix"
        return (
            f"{kind} is more than the class that it inherits from, and what it does besides "
            "normalising (an activation, perhaps) would be lost; put a GroupNorm and the rest in "
            "its place yourself: model.set_submodule(name, nn.Sequential(nn.GroupNorm(...), ...))"
        )
    more = [name for name in (*layer._parameters, *layer._buffers) if name not in _STATE]
    more += [name for name, _ in layer.named_children()]
    more += [name for name in _HOOKS if getattr(layer, name, None)]
    more += ["forward"] if "forward" in vars(layer) else []
    if more:
        return (
            f"{kind} holds {', '.join(dict.fromkeys(more))}, which a new layer would not have; "
            "take it off before privacy.fix, and put it on the new layer afterwards"
        )
    return ""


def _replacement(layer: nn.Module) -> nn.Module:
    """The layer that stands in, with the very parameters of the old one."""
    old: Any = layer
    new: Any
    if isinstance(layer, _BatchNorm):
        most = 1 if isinstance(layer, nn.BatchNorm1d) else _GROUPS
        groups = max(g for g in range(1, most + 1) if layer.num_features % g == 0)
        new = nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=layer.affine)
    else:
        new = type(old)(old.num_features, eps=old.eps, momentum=old.momentum, affine=old.affine)
    new.weight, new.bias = old.weight, old.bias
    # What a user noted on the layer; settings of its class are not the new one's.
    for name in vars(old).keys() - vars(type(old)(1)).keys():
        setattr(new, name, vars(old)[name])
    return cast(nn.Module, new.train(layer.training))
