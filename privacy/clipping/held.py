"""What a model holds besides its trainable parameters: no forward pass may write there.

Watched are buffers, parameters that are not trained, and tensors in plain attributes of a module
(`self.running = ...`). Of the last, those with a graph are left out, and those that every forward
pass makes anew, which the probe proves: they carry nothing from one step to the next. Not watched
are values in lists, dictionaries, numbers and arrays of others: the probe finds what a pass writes
there where the next pass reads it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privacy.errors import UnsupportedLayer

__all__ = ["Held", "cure", "kept", "marks", "plain_tensors", "remade"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_OF_TORCH = (Tensor, nn.Parameter)
_LARGE = 2**16
_FROZEN = "a parameter that is not trained"
_TOGETHER = 1024
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors without a graph that are plain attributes of a model's modules, by dotted name."""
    return {
        f"{name or type(module).__name__}.{key}": value
        for name, module in model.named_modules()
        for key, value in _plain(vars(module))
    }


def kept(model: nn.Module) -> Callable[[Collection[str]], None]:
    """Remembers a model's plain tensors; gives a function that puts back those of given names."""
    values = {name: tensor.clone() for name, tensor in plain_tensors(model).items()}
    modules = [(name or type(m).__name__, m, dict(vars(m))) for name, m in model.named_modules()]

    def put_back(names: Collection[str]) -> None:
        for name, module, before in modules:
            for key in [key for key in vars(module) if f"{name}.{key}" in names]:
                # One that was not there becomes None: the next pass may look for the name.
                vars(module)[key] = before.get(key)
                if f"{name}.{key}" in values:
                    before[key].copy_(values[f"{name}.{key}"])

    return put_back


def marks(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The plain tensors, and how often torch saw each one written; for `remade`."""
    return {name: (tensor, _version(tensor)) for name, tensor in plain_tensors(model).items()}


def remade(model: nn.Module, before: Mapping[str, tuple[Tensor, int]]) -> set[str]:
    """The plain tensors that were made anew or written since `before`."""
    found = set()
    for name, (tensor, version) in marks(model).items():
        was = before.get(name)
        if was is None or was[0] is not tensor or was[1] != version:
            found.add(name)
    return found


def cure(names: Collection[str]) -> str:
    """What to do where a forward pass writes to these."""
    if all(name.endswith(("_u", "_v", ".weight")) for name in names):
        return (
            "spectral_norm iterates at each pass in train mode: take it off before attach "
            "(torch.nn.utils.remove_spectral_norm, or parametrize.remove_parametrizations), or "
            "freeze that layer and put it in eval mode"
        )
    return (
        "use layers that keep none, put these layers in eval mode, or keep what is no statistic, a "
        "count of passes, in a Python int"
    )


class Held:
    """The bytes of what a model holds; a class because it remembers them.

    Torch's version counter is not enough: writes through `.data` or numpy leave it as it was. Of
    large tensors sums of their bits are remembered, a thousand numbers at a time.

    Tensors in `remade`, which every forward pass makes anew, are not watched. `prove` is called
    where a plain tensor appears that was not there before; it raises where a forward pass carries
    something to the next one.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        *,
        remade: Collection[str] = (),
        prove: Callable[[], None] = lambda: None,
    ) -> None:
        self._modules = [(name, vars(module)) for name, module in modules]
        self._prove = prove
        self._left_out = set(remade) | self._of_trained()
        self._names: set[str] = set()
        self._names = self._appeared()
        self._described, self._bytes = self._now()

    def check(self) -> None:
        """Refuses other bytes than before, and new plain tensors that carry over to a next pass."""
        if appeared := self._appeared():
            self._prove()
            self._left_out |= appeared
        described, now = self._now()
        same = described == self._described
        if same and all(torch.equal(now[d], was) for d, was in self._bytes.items()):
            return
        names = self._changed(described, now)
        what = self._what(names)
        moved = ""
        if any(name.endswith(_STATISTICS) for name in names):
            moved = (
                "If it saw private rows, in train mode say, its statistics have moved by them, "
                "which no epsilon covers: build the model anew, or from weights of before. "
            )
        follows = "; keep a network that follows this one, an average, say, outside of the model"
        raise UnsupportedLayer(
            f"{', '.join(names)}: {what} was written since the model was attached. A "
            "forward pass that writes statistics of the examples releases them without noise: "
            f"{cure(names)}{follows if what == _FROZEN else ''}. {moved}To change or load it "
            "yourself, call private.detach(), then attach the model again"
        )

    def _of_trained(self) -> set[str]:
        """Plain tensors in the memory of a trainable parameter: they move with each step."""
        trained = {
            _memory(p)
            for _, values in self._modules
            for p in values["_parameters"].values()
            if p is not None and p.requires_grad
        }
        return {
            f"{name}.{key}"
            for name, values in self._modules
            for key, tensor in _plain(values)
            if _memory(tensor) in trained
        }

    def _appeared(self) -> set[str]:
        """Plain tensors that are neither watched nor left out."""
        now = {f"{name}.{key}" for name, values in self._modules for key, _ in _plain(values)}
        return now - self._names - self._left_out

    def _watched(self) -> Iterator[tuple[str, Tensor]]:
        for name, values in self._modules:
            for key, buffer in values["_buffers"].items():
                if buffer is not None:
                    yield f"{name}.{key}", buffer
            for key, parameter in values["_parameters"].items():
                if parameter is not None and not parameter.requires_grad:
                    yield f"{name}.{key}", parameter
            for key, tensor in _plain(values):
                if f"{name}.{key}" in self._names:
                    yield f"{name}.{key}", tensor

    def _now(self) -> tuple[list[tuple[Any, ...]], dict[torch.device, Tensor]]:
        """Name, dtype and shape of each tensor, and the bytes of all of them on each device."""
        described: list[tuple[Any, ...]] = []
        raw: dict[torch.device, list[Tensor]] = {}
        for name, tensor in self._watched():
            flat = _bytes(tensor.detach())
            raw.setdefault(tensor.device, []).append(flat)
            described.append((name, tensor.device, tensor.dtype, tensor.shape, len(flat)))
        return described, {device: torch.cat(each) for device, each in raw.items()}

    def _changed(
        self, described: list[tuple[Any, ...]], now: Mapping[torch.device, Tensor]
    ) -> list[str]:
        if described != self._described:
            return sorted({row[0] for row in {*described} ^ {*self._described}})
        found, starts = [], dict.fromkeys(now, 0)
        for name, device, _, _, size in described:
            where = slice(starts[device], starts[device] + size)
            starts[device] += size
            if not torch.equal(now[device][where], self._bytes[device][where]):
                found.append(name)
        return found

    def _what(self, names: Collection[str]) -> str:
        of = {f"{name}.{key}" for name, values in self._modules for key in values["_parameters"]}
        if any(name in of for name in names):
            return _FROZEN
        return "a tensor" if any(name in self._names for name in names) else "a buffer"


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A module's plain attributes that are dense tensors with values and without a graph."""
    for key, value in values.items():
        if type(value) in _OF_TORCH and not (
            value.requires_grad
            or value.is_meta
            or value.is_nested
            or value.is_quantized
            or value.layout != torch.strided
            or torch._C._functorch.is_functorch_wrapped_tensor(value)
        ):
            yield key, value


def _version(tensor: Tensor) -> int:
    """How often torch saw it written; what was made in inference mode has no count."""
    return -1 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8 [n]; of a large one sums of its bits, and the bytes of the rest."""
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    if len(flat) < _LARGE:
        return flat.view(torch.uint8)
    bits = flat.view(_BITS[flat.element_size()])
    whole = len(bits) - len(bits) % _TOGETHER
    sums = bits[:whole].view(-1, _TOGETHER).sum(1)
    return torch.cat([sums.view(torch.uint8), bits[whole:].view(torch.uint8)])
