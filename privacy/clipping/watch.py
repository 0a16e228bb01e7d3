"""The watch: a model must be at each step what it was when its rows were proved to be examples.

Modules, hooks and modes as `attach` found them are compared where layers are recorded and again at
each step; a forward pass in modes that were not seen yet is proved once more, in them. What code
outside of a module holds is not watched: a function that was replaced in torch, say.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.nn.modules.dropout import _DropoutNd

from privacy.clipping.held import Held
from privacy.clipping.layers import recorded_name
from privacy.errors import UnsupportedLayer

__all__ = ["Modes", "Watch", "admitted"]

Modes = tuple[bool, ...]
"""Every module's training flag, in the model's order."""

_Observer = TypeVar("_Observer", bound=type)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_CODE = ("forward", "__call__", "_call_impl")
_OF_TORCH = (bool, int, float, str, tuple, type(None))
_OF_OTHERS = (bool, str, type(len), type(lambda: None))
_OBSERVERS: set[type] = set()


def admitted(observer: _Observer) -> _Observer:
    """Lets hooks that are methods of this very class come and go: they leave rows as they are."""
    _OBSERVERS.add(observer)
    return observer


class Watch:
    """What a model was made of; a class because it remembers, and learns modes.

    Guarantee: between `attach` and a step no module, hook, `forward` or setting that is watched has
    changed, neither now nor when the layers of a recorded forward pass were called, and no buffer,
    frozen parameter or plain tensor has other bytes (`held.Held`). Of torch's own modules all plain
    settings are watched (a dropout's probability apart), of others flags, names and functions.

    `refuse` raises where a layer is known to mix examples in the present modes, and `prove` where
    they mix, or where one pass moves the next. `remade` are plain tensors that every forward pass
    makes anew: see `held.Held`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        refuse: Callable[[], None] = lambda: None,
        prove: Callable[[], None] = lambda: None,
        remade: Collection[str] = (),
    ) -> None:
        self._refuse, self._prove = refuse, prove
        named = list(model.named_modules())
        self._parts = [_Part(name or type(module).__name__, module) for name, module in named]
        self._passed = _shared_out(self._parts)
        self._global_hooks = _global_hooks()
        self._held = Held(
            [(part.name, part.module) for part in self._parts], remade=remade, prove=prove
        )
        self._modes = self.modes()
        self._proved = {self._modes}

    def modes(self) -> Modes:
        """The present modes."""
        return tuple([part.values["training"] for part in self._parts])

    def enter(self, layer: str) -> Modes:
        """The modes in which a recorded layer is called; refuses layers that mix examples in them.

        The modules between it and the recorded layer before it are compared: a whole forward pass
        compares every one.
        """
        self._compare(self._passed.get(layer, ()))
        modes = self.modes()
        if modes != self._modes:
            self._refuse()
            self._modes = modes
        return self._modes

    def check(self) -> None:
        """Compares everything, and refuses a change."""
        self._compare(self._parts)
        self._held.check()

    def prove(self, seen: Iterable[Modes]) -> None:
        """Proves that examples do not mix in modes that were not seen before."""
        for modes in set(seen) - self._proved:
            before = self.modes()
            try:
                self._set(modes)
                self._prove()
            finally:
                self._set(before)
            self._proved.add(modes)

    def _set(self, modes: Modes) -> None:
        """By the flag: `eval()` may be overridden to do more than that."""
        for part, training in zip(self._parts, modes, strict=True):
            part.values["training"] = training

    def _compare(self, parts: Sequence["_Part"]) -> None:
        """Refuses what changed among some modules, or for all of them."""
        for part in parts:
            if what := part.changed():
                raise UnsupportedLayer(
                    f"{part.name}: its {what} changed since the model was attached, when its rows "
                    "were proved to be examples; undo the change, or call private.detach(), then "
                    "attach the model again"
                )
        if _global_hooks() != self._global_hooks:
            raise UnsupportedLayer(
                "hooks on all modules were registered or removed since the model was attached; "
                "register them before attach, or remove them before private.step"
            )


class _Part:
    """One module as it was; a class for speed: it is compared at every step."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.values = name, module, vars(module)
        self._kind = type(module)
        self._code = _code(self._kind)
        self._own = tuple(map(self.values.get, (*_CODE, "_compiled_call_impl")))
        self._modules = tuple(self.values["_modules"].items())
        self._hooks = _hooks(self.values)
        of_torch = self._kind.__module__.startswith("torch.nn.")
        plain: tuple[type, ...] = _OF_TORCH if of_torch else _OF_OTHERS
        if isinstance(module, _DropoutNd):
            plain = ()
        self._keys = [
            key
            for key, value in self.values.items()
            if isinstance(value, plain) and key != "training" and not key.startswith("_")
        ]
        self._settings = tuple(map(self.values.get, self._keys))

    def changed(self) -> str:
        """What changed, or nothing."""
        values = self.values
        if type(self.module) is not self._kind:
            return "class"
        if _code(self._kind) != self._code:
            return f"class {self._kind.__name__}"
        if not _same(map(values.get, (*_CODE, "_compiled_call_impl")), self._own):
            return "forward"
        if tuple(values["_modules"].items()) != self._modules:
            return "submodules"
        if _hooks(values) != self._hooks:
            return "hooks"
        if not _same(map(values.get, self._keys), self._settings):
            now = dict(zip(self._keys, self._settings, strict=True))
            changed = (key for key, was in now.items() if not _same([values.get(key)], [was]))
            return f"setting {', '.join(changed)}"
        return ""


def _shared_out(parts: Sequence[_Part]) -> dict[str, list[_Part]]:
    """For each recorded layer the modules from the last one before it up to itself."""
    passed: dict[str, list[_Part]] = {}
    since: list[_Part] = []
    for part in parts:
        since.append(part)
        name = recorded_name(part.module)
        if name is not None:
            passed[name], since = since, []
    if passed:
        passed[next(reversed(passed))].extend(since)
    return passed


def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    return (kind.forward, kind.__call__, kind._call_impl)


def _hooks(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """A module's hooks, those of observers apart."""
    if not (values[_HOOKS[0]] or values[_HOOKS[1]] or values[_HOOKS[2]] or values[_HOOKS[3]]):
        return ()
    hooks = [hook for name in _HOOKS for hook in values[name].values()]
    return tuple(hook for hook in hooks if type(getattr(hook, "__self__", None)) not in _OBSERVERS)


def _global_hooks() -> tuple[Any, ...]:
    return tuple(hook for name in _GLOBAL_HOOKS for hook in getattr(of_all_modules, name).values())


def _same(now: Iterable[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects, or plain values that are equal."""
    pairs = list(zip(now, before, strict=True))
    return all(a is b for a, b in pairs) or all(
        a is b or (type(a) is type(b) and isinstance(a, _OF_TORCH) and operator.eq(a, b))
        for a, b in pairs
    )
