"""Does nothing leave the step but the released gradient?

What a model and its optimizer keep from step to step may change in the optimizer's step alone, and
there by nothing but the gradients that the audit read: the step is taken once more on copies.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from privacy.clipping.held import marks, plain_tensors, remade

__all__ = ["Release", "Settings", "changing"]

Settings = Mapping[str, Any]
"""What an optimizer's groups say beside their parameters, by name."""


@final
class Release:
    """Watches what one training's model and optimizer keep from step to step.

    A class because each step is compared with what the last one left. The model is called with
    `images`: tensors in plain attributes of its modules that every forward pass makes anew are not
    watched, given that no pass finds there what the one before it left. `unexplained` is the
    largest change so far that no released gradient explains, as a part of the tensor that changed;
    `replayed` whether the optimizer's step could be taken once more on copies; `settings` those of
    the optimizer's groups before each step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        self.unexplained = 0.0
        self.replayed = not _hooked(optimizer)
        self.settings: list[Settings] = []
        self._model, self._optimizer = model, optimizer
        self._remade = self._proved(images)
        self._expected: dict[str, Tensor] = {}
        self._expected_settings: Settings = {}
        self._gradients: list[tuple[Tensor, list[Tensor]]] = []
        self._left = self._copies()
        self._handle = optimizer.register_step_post_hook(self._after)

    def close(self) -> None:
        """Takes the hook off again."""
        self._handle.remove()

    def before(self) -> None:
        """Called when the optimizer takes the gradients: nothing may have changed until now."""
        self._compare(self._left, self._kept() | _moving(self._optimizer))
        self.settings.append(_settings(self._optimizer))
        self._gradients = [
            (parameter, [parameter.grad.detach().clone()])
            for parameter in {
                id(p): p for p in (*self._model.parameters(), *_parameters(self._optimizer))
            }.values()
            if parameter.grad is not None
        ]
        self._expected = {name: self._left[name] for name in self._kept() if name in self._left}
        if self.replayed:
            replay = self._replay()
            if len(self.settings) == 1 and not _alike(replay, self._replay()):
                # One that draws random numbers of its own does not step twice alike.
                self.replayed = False
            if self.replayed:
                self._expected |= replay

    def stepped(self) -> None:
        """Called when the training's own step is over: nothing may have changed since.

        In each `.grad` lies nothing but what was released.
        """
        self._compare(self._left, self._kept() | _moving(self._optimizer))
        released = {id(parameter): gradients for parameter, gradients in self._gradients}
        for parameter in (*self._model.parameters(), *_parameters(self._optimizer)):
            gradient = parameter.grad
            if gradient is not None and bool(gradient.any()):
                moved = [_moved(one, gradient) for one in released.get(id(parameter), ())]
                self.unexplained = max(self.unexplained, min(moved, default=math.inf))

    def _after(self, *_: Any) -> None:
        """The optimizer has stepped: by the gradients that were read, and by nothing else."""
        self._left = self._copies()
        if self.replayed:
            self._compare(self._expected, self._left)
            if _settings(self._optimizer) != self._expected_settings:
                self.unexplained = math.inf
        else:
            self._compare(self._expected, {name: self._left[name] for name in self._kept()})
            for parameter, gradients in self._gradients:
                # An optimizer may change its gradients in place. Where its step cannot be replayed,
                # such a change cannot be checked, and is accepted.
                if parameter.grad is not None:
                    gradients.append(parameter.grad.detach().clone())

    def _proved(self, images: Tensor) -> set[str]:
        """The plain tensors that a forward pass makes anew, from nothing that the last one left."""
        before, seen = marks(self._model), []
        devices = [images.device] if images.is_cuda else []
        for _ in range(2):
            with torch.no_grad(), torch.random.fork_rng(devices):
                self._model(images)
            seen.append(_copied(plain_tensors(self._model)))
        names = remade(self._model, before)
        one, other = ({n: v for n, v in each.items() if n in names} for each in seen)
        self._compare(one, other)
        return names

    def _copies(self) -> dict[str, Tensor]:
        """Copies of everything that is kept from step to step, by name."""
        return _copied(self._kept() | _moving(self._optimizer))

    def _kept(self) -> dict[str, Tensor]:
        """What the model keeps and no step may change."""
        known = {id(parameter) for parameter in _parameters(self._optimizer)}
        memory = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        found: dict[str, Tensor] = {
            name: p for name, p in self._model.named_parameters() if id(p) not in known
        }
        found |= {f"buffer {name}": buffer for name, buffer in self._model.named_buffers()}
        return found | {
            f"attribute {name}": tensor
            for name, tensor in plain_tensors(self._model).items()
            # A view of a parameter moves with it.
            if name not in self._remade and tensor.untyped_storage().data_ptr() not in memory
        }

    def _replay(self) -> dict[str, Tensor]:
        """What the optimizer's own becomes by the gradients that its parameters have now."""
        copies: dict[int, Any] = {}
        for parameter in _parameters(self._optimizer):
            twin: Tensor = parameter.detach().clone().requires_grad_(parameter.requires_grad)
            twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
            copies[id(parameter)] = twin
        try:
            twins = copy.deepcopy(self._optimizer, dict(copies))
            twins.step()
        except Exception:  # A foreign optimizer may need anything that its copy lacks.
            self.replayed = False
            return {}
        for parameter, gradients in self._gradients:
            # Some work in place: SGD with Nesterov's momentum, for one.
            if id(parameter) in copies:
                gradients.append(copies[id(parameter)].grad)
        self._expected_settings = _settings(twins)
        return _moving(twins)

    def _compare(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """Notes the largest difference between two states; a name of one alone is infinitely so."""
        if expected.keys() != found.keys():
            self.unexplained = math.inf
            return
        for name, one in expected.items():
            exact = name.startswith(("buffer ", "attribute "))
            moved = _differs(one, found[name]) if exact else _moved(one, found[name])
            self.unexplained = max(self.unexplained, moved)


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook of the user's own belongs to a step: it would not act on a copy."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    hooks = (*before.values(), *after.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("privacy.") for hook in hooks)


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and not any(_moved(v, other[k]) for k, v in one.items())


def changing(one: Sequence[Settings], other: Sequence[Settings]) -> tuple[set[str], set[str]]:
    """Settings that changed between steps, and those that changed differently in two trainings."""
    changed = {name for steps in (one, other) for each in steps for name in _unlike(steps[0], each)}
    return changed, {
        name for pair in zip(one, other, strict=False) for name in _unlike(*pair)
    } & changed


def _unlike(one: Settings, other: Settings) -> set[str]:
    """Names of settings that differ, in any group."""
    return {
        name.split(" ")[0] for name in one.keys() | other.keys() if one.get(name) != other.get(name)
    }


def _settings(optimizer: torch.optim.Optimizer) -> Settings:
    found = {
        f"{name} {number}": value.tolist() if isinstance(value, Tensor) else value
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params"
    }
    plain = (int, float, str, tuple, list, type(None))
    return {name: value for name, value in found.items() if isinstance(value, plain)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _moving(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer's step may change: its parameters, tensors and numbers of its state."""
    parameters = _parameters(optimizer)
    names = {id(parameter): f"optimizer {number}" for number, parameter in enumerate(parameters)}
    found = dict(zip(names.values(), parameters, strict=False))
    for key, state in optimizer.state.items():
        own = type(key).__name__ if isinstance(key, Tensor) else str(key)
        prefix = names.get(id(key), f"optimizer {own}")
        for name, value in (state if isinstance(state, Mapping) else {"": state}).items():
            if isinstance(value, (int, float)):
                found[f"{prefix} {name}"] = torch.tensor(value, dtype=torch.float64)
            elif isinstance(value, Tensor):
                found[f"{prefix} {name}"] = value
    return found


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _moved(one: Tensor, other: Tensor) -> float:
    """By how much another tensor differs, as a part of it; infinitely where no number says so."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return math.inf
    if not one.numel():
        return 0.0
    if not (one.is_floating_point() or one.is_complex()):
        return _differs(one, other)
    size = float(one.detach().abs().max().clamp(min=1e-12))
    moved = float((other - one).detach().abs().max()) / size
    # Not a number is no explanation either.
    return math.inf if math.isnan(moved) else moved


def _differs(one: Tensor, other: Tensor) -> float:
    """Nothing where two tensors are the same to the last bit, infinite elsewhere."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return 0.0 if alike and torch.equal(_bytes(one), _bytes(other)) else math.inf


def _bytes(tensor: Tensor) -> Tensor:
    dense = tensor.dequantize() if tensor.is_quantized else tensor.detach().to_dense()
    return dense.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
