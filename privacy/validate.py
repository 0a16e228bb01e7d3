"""What may be trained privately: a module, its layers, an optimizer, a data set; numbers of a plan.

What cannot be trained privately, or only by accident, is refused here by its type, with its cure,
before anything is changed or spent. What types do not tell `privacy.probe` asks.
"""

import copy
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from privacy.errors import PlanError, StepError, UnsupportedLayer

__all__ = [
    "check_dataset",
    "check_layers",
    "check_module",
    "check_trainable",
    "mixing_layers",
    "positive",
    "probability",
    "real",
    "shown",
    "trainable_parameters",
    "whole",
]

_EXACT = 2**53
_LONGEST = 200
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# By name: this module works where Opacus is not imported.
_OPACUS = "opacus.grad_sample."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_dataset(dataset: object) -> int:
    """How many examples a data set has; refuses whatever is not a map-style data set."""
    if isinstance(dataset, DataLoader):
        raise PlanError(
            "dataset: expected a data set of examples, got a DataLoader; give its data set, "
            "loader.dataset: private.batches draws and cuts the samples"
        )
    arrays = isinstance(dataset, tuple) and [hasattr(each, "shape") for each in dataset]
    if isinstance(dataset, (str, bytes, dict)) or hasattr(dataset, "shape") or arrays == [True] * 2:
        raise PlanError(
            "dataset: expected a map-style data set of pairs (image, label), got "
            f"{type(dataset).__name__}; give torch.utils.data.TensorDataset(images, labels), of "
            "tensors, or a list of pairs"
        )
    if not hasattr(type(dataset), "__getitem__") or not hasattr(type(dataset), "__len__"):
        raise PlanError(
            f"dataset: expected one that has a length and is read by index, got "
            f"{type(dataset).__name__}: Poisson sampling draws examples by index; put its examples "
            "into a list first"
        )
    try:
        return len(dataset)  # type: ignore[arg-type]
    except Exception as error:
        raise PlanError(
            f"dataset: expected one that knows its length, got {type(dataset).__name__}: {error}; "
            "put its examples into a list first"
        ) from error


def check_module(model: object) -> nn.Module:
    """The model itself; refuses whatever is not a module."""
    if not isinstance(model, nn.Module):
        raise StepError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def mixing_layers(model: nn.Module) -> dict[str, str]:
    """Finds layers that, in their present mode, mix examples or keep statistics of them.

    Returns:
        What is wrong and the cure, by dotted name; empty if nothing is wrong.

    Raises:
        StepError: The model is not a module.

    Example:
        >>> sorted(mixing_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))))
        ['1']
        >>> mixing_layers(nn.BatchNorm2d(4).eval().requires_grad_(False))
        {}
    """
    found = {}
    for name, layer in check_module(model).named_modules():
        label = name or type(layer).__name__
        kind = type(layer).__name__
        if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
            found[label] = (
                f"{kind} mixes examples; put GroupNorm in its place with privacy.fix(model), "
                "or freeze it: layer.eval() before every step"
            )
        elif isinstance(layer, _InstanceNorm) and layer.track_running_stats and layer.training:
            found[label] = (
                f"{kind} keeps running statistics of the examples without noise; set "
                "track_running_stats=False"
            )
    return found


def check_layers(model: nn.Module) -> None:
    """Refuses a model with layers that mix examples.

    Raises:
        UnsupportedLayer: Names every such layer and its cure.
        StepError: The model is not a module.

    Example:
        >>> check_layers(nn.Linear(2, 2))
    """
    found = mixing_layers(model)
    if found:
        raise UnsupportedLayer("; ".join(f"{name}: {what}" for name, what in found.items()))


def trainable_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by dotted name, all of which the optimizer steps.

    Refused are a model that is not the module itself, and an optimizer that cannot step on
    gradients alone or holds other parameters.
    """
    _check_model(model)
    _check_optimizer(optimizer)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise StepError("the model has no trainable parameter: there is nothing to train")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named.items() if id(p) not in held]
    strangers = len(held - {id(p) for p in model.parameters()})
    if missing or strangers:
        raise StepError(
            "optimizer: expected exactly the model's trainable parameters; it lacks "
            f"{', '.join(missing) or 'none'} and holds {strangers} that are not the model's; build "
            "it from model.parameters()"
        )
    _check_hooks(named)
    return named


def check_trainable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses a model whose trainable parameters are no longer `parameters`.

    A parameter that became trainable later would be stepped by its raw gradient, without noise.
    """
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    changed = [n for n in {*now, *parameters} if now.get(n) is not parameters.get(n)]
    if changed:
        raise StepError(
            f"{', '.join(sorted(changed))}: trainable when the model was attached or now, but not "
            "both; freeze and unfreeze parameters before attach, or attach again"
        )
    _check_hooks(parameters)


def _check_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses hooks on the gradients of trainable parameters: those are never formed."""
    hooked = [
        name
        for name, parameter in parameters.items()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]
    if hooked:
        raise StepError(
            f"{', '.join(hooked)}: a hook on its gradient would have no effect: gradients are "
            "clipped example by example and never accumulated. Remove it (handle.remove()); what "
            "it did to the gradient belongs before optimizer.step, which sees the noised one: "
            "optimizer.register_step_pre_hook"
        )


def _check_model(model: object) -> None:
    """Refuses what is no module, wraps one to train it otherwise, or has no plain values."""
    model = check_module(model)
    for name, module in model.named_modules():
        label = name or type(module).__name__
        own = vars(module).get("forward")
        if (
            type(module).__module__.startswith("torch._dynamo")
            or isinstance(module, torch.jit.ScriptModule)
            or vars(module).get("_compiled_call_impl") is not None
            or hasattr(own, "_torchdynamo_orig_callable")
            or hasattr(type(module).forward, "_torchdynamo_orig_callable")
        ):
            raise StepError(
                f"{label}: the model is compiled: attach and train the module itself (of what "
                "torch.compile returned, model._orig_mod), and compile or script a copy of it "
                "afterwards"
            )
        _check_not_opacus(label, module)
        _check_own(label, module)
    devices = sorted({str(p.device) for p in model.parameters() if p.requires_grad})
    if len(devices) > 1:
        raise StepError(
            f"parameters: expected one device, got {', '.join(devices)}; move the model to one"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_tensor(name, tensor)


def _check_own(label: str, module: nn.Module) -> None:
    """Refuses what trains a module in its own way: several devices, or numbers of few bits."""
    if isinstance(module, _WRAPPERS):
        raise StepError(
            f"{label}: {type(module).__name__} splits the batch or averages gradients by "
            "itself; attach and train the module inside, model.module, on one device"
        )
    where = [kind.__module__ for kind in type(module).__mro__]
    if any(name.startswith("torch.distributed.") for name in where):
        raise StepError(
            f"{label}: {type(module).__name__} holds parts of its parameters on several devices, "
            "and gathers gradients by itself; attach the module before it is wrapped or sharded, "
            "on one device"
        )
    if any(name.startswith("torch.ao.") for name in where):
        raise UnsupportedLayer(
            f"{label}: {type(module).__name__} is quantised, or being so: it has no real weights "
            "to train, or gathers ranges of the examples without noise; attach and train the float "
            "model, and quantise a copy of it afterwards"
        )


def _check_not_opacus(label: str, module: nn.Module) -> None:
    """Refuses a wrapper or hooks of Opacus: they would run in our passes, and fail or add up."""
    hooks = [hook for name in _HOOKS for hook in vars(module)[name].values()]
    # Opacus registers methods, some of them with arguments filled in.
    bound = [getattr(hook, "func", hook) for hook in hooks]
    for each in (module, *(getattr(hook, "__self__", None) for hook in bound)):
        if any(kind.__module__.startswith(_OPACUS) for kind in type(each).__mro__):
            raise StepError(
                f"{label}: expected a plain module, got one that {type(each).__name__} of Opacus "
                "wraps or has hooks on; call remove_hooks() on what Opacus' make_private returned, "
                "and give the module that it was made from"
            )


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuses a parameter or buffer without values, or with other ones than plain numbers."""
    if is_lazy(tensor):
        raise UnsupportedLayer(
            f"{name}: the layer does not know its shape yet; run the model once on an example, "
            "and make the optimizer after that"
        )
    if tensor.is_meta:
        raise UnsupportedLayer(
            f"{name}: it is on the meta device, which holds no values; load the weights, or "
            "call model.to_empty(device=...) and initialise them"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise UnsupportedLayer(
            f"{name}: expected a dense tensor, got {tensor.layout}, {tensor.dtype}; convert it, "
            "or replace the layer"
        )
    if tensor.requires_grad and not tensor.is_floating_point():
        raise UnsupportedLayer(
            f"{name}: expected real numbers, got {tensor.dtype}: clipping and noise are for real "
            "gradients; hold real and imaginary part as two parameters, or freeze it"
        )


def _check_optimizer(optimizer: object) -> None:
    """Refuses an optimizer that cannot step on gradients alone, by letting a copy of it do so."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise StepError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    kind = type(optimizer).__name__
    cure = "choose one that takes one gradient a step, torch.optim.SGD or Adam"
    # Its default means a closure that is called several times; it would otherwise be the trial's.
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StepError(
            f"optimizer: {kind} cannot step on a noised gradient alone: it calls a closure for "
            f"several raw gradients a step; {cure}"
        )
    trial = _copy_of(optimizer)
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks")
    if not isinstance(hooks, dict) or (trial is not None and not _calls_hooks(trial, kind, cure)):
        raise StepError(
            f"optimizer: {kind} steps past the hooks of torch.optim.Optimizer, so that steps "
            "beside the private one would not be seen; call super().__init__(params, defaults) in "
            "it, or attach the optimizer that it wraps"
        )


def _calls_hooks(trial: torch.optim.Optimizer, kind: str, cure: str) -> bool:
    """Lets a copy step: whether torch's step hooks were called, or only copying was at fault."""
    called: list[object] = []
    trial.register_step_pre_hook(lambda *_: called.append(None))
    devices = {p.device for group in trial.param_groups for p in group["params"] if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=devices):
            # Not trial.step(): a schedule of the learning rate puts a bound method of the original
            # in its place.
            type(trial).step(trial)
    except AttributeError:
        # Perhaps of the copy alone.
        return True
    except Exception as error:
        raise StepError(
            f"optimizer: {kind} cannot step on a noised gradient alone: {type(error).__name__}: "
            f"{error}; {cure}"
        ) from error
    return bool(called)


def _copy_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """A copy with parameters of its own, their gradients zero; None where it cannot be copied.

    Attribute by attribute: torch's own copy leaves out what a subclass has besides. No hooks: this
    is a trial, to which nobody should react.
    """
    trial: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): trial}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = nn.Parameter(torch.zeros_like(parameter, requires_grad=False))
            own.grad = torch.zeros_like(own)
            memo[id(parameter)] = own
    try:
        for name, value in vars(optimizer).items():
            if name != "step":
                hooks = name.endswith("_hooks")
                vars(trial)[name] = type(value)() if hooks else copy.deepcopy(value, memo)
    except Exception:
        # It holds something that cannot be copied: the first step will tell.
        return None
    return trial


def shown(value: object) -> str:
    """A value for a message: shortened, and safe even if its own `repr` fails."""
    try:
        text = repr(value)
    except Exception:
        # Of a whole number of more than 4300 digits Python makes no text.
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def whole(name: str, value: Any, *, least: int = 1, most: int = _EXACT) -> int:
    """A whole number in a range; True and 3.0 are refused."""
    try:
        number = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        limit = f"at least {least}" if most == _EXACT else f"{least} to {most}"
        raise PlanError(f"{name}: expected a whole number, {limit}, got {shown(value)}")
    return number


def real(name: str, value: Any) -> float:
    """A finite number; True, "1" and a complex number are refused."""
    number = _finite(value)
    if math.isnan(number):
        raise PlanError(f"{name}: expected a finite number, got {shown(value)}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = _finite(value)
    if not number > 0:
        raise PlanError(f"{name}: expected a finite number > 0, got {shown(value)}")
    return number


def probability(name: str, value: Any) -> float:
    """A number between 0 and 1, neither of them included."""
    number = _finite(value)
    if not 0 < number < 1:
        raise PlanError(f"{name}: expected a probability in (0, 1), got {shown(value)}")
    return number


def _finite(value: Any) -> float:
    """The value as a finite number, or else NaN, which fails every comparison."""
    wrong = type(value).__name__ in ("bool", "bool_") or isinstance(value, (str, bytes, complex))
    refusals: tuple[type[Exception], ...] = (TypeError, ValueError, OverflowError)
    if not isinstance(value, (int, float)):
        # A tensor's refusal; of a plain number it would be a signal's, which is none.
        refusals = (*refusals, RuntimeError)
    try:
        number = math.nan if wrong else float(value)
    except refusals:
        return math.nan
    return number if math.isfinite(number) else math.nan
