"""A copy of a state that later training steps do not reach, in memory that is used again.

The training loop stands still while this copy is made, so it is one copy of each tensor and nothing
else: no allocation where shapes repeat, no change of layout.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast, final

import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import State, check_tensor

__all__ = ["HostBuffer"]

_ALIGNMENT = 64
_MAX_DEPTH = 32

_Form: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...]]


@final
class HostBuffer:
    """One buffer in main memory that holds one copy of a state at a time.

    Example:
        >>> buffer, weight = HostBuffer(), torch.ones(2)
        >>> copy = buffer.copy({"weight": weight, "step": 3})
        >>> weight.zero_()
        tensor([0., 0.])
        >>> copy
        {'weight': tensor([1., 1.]), 'step': 3}
    """

    __slots__ = ("_forms", "_memory", "_views")

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._forms: list[_Form] = []
        self._views: list[torch.Tensor] = []

    def copy(self, state: State) -> State:
        """The same tree, its tensors copied; overwrites the copy made before.

        Places that hold the same tensor hold the same copy.

        Args:
            state: A tree as for `save`; its tensors may be on any device.

        Raises:
            StateError: Something in the tree could be changed behind our back and cannot be copied,
                or there is no memory for the copy.

        Example:
            See `HostBuffer`.
        """
        leaves: list[torch.Tensor] = []
        _collect(state, leaves, 0)
        distinct, which = _distinct(leaves)
        views = self._views_for(distinct)
        with torch.no_grad():
            for view, tensor in zip(views, distinct, strict=True):
                view.copy_(tensor)
        return _rebuild(state, (views[index] for index in which))

    def _views_for(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Room for a copy of each tensor; what was there before if the forms are the same."""
        forms = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        if forms == self._forms:
            return self._views
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        # What does not fit is let go first, so that both are never there together.
        self._forms, self._views = [], []
        if len(self._memory) < end:
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = _allocate(end)
        self._views = [
            _view(self._memory, start, tensor)
            for start, tensor in zip(starts, tensors, strict=True)
        ]
        self._forms = forms
        return self._views


def _allocate(length: int) -> torch.Tensor:
    """Fresh memory."""
    try:
        return torch.empty(length, dtype=torch.uint8)
    except RuntimeError as error:
        raise StateError(
            f"no memory for a copy of {length} bytes of tensors; save fewer, or without a store"
        ) from error


def _view(memory: torch.Tensor, start: int, tensor: torch.Tensor) -> torch.Tensor:
    """A place for a tensor; with the tensor's own strides if those have no gaps."""
    length = tensor.numel() * tensor.element_size()
    flat = memory[start : start + length].view(tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return flat.as_strided(tensor.shape, strides)


def _distinct(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Each tensor once, and for each of those given which one it is."""
    distinct: list[torch.Tensor] = []
    which: list[int] = []
    at: dict[int, list[int]] = {}
    for tensor in tensors:
        same = at.setdefault(tensor.data_ptr(), [])
        found = next((index for index in same if _are_one(distinct[index], tensor)), None)
        if found is None:
            found = len(distinct)
            distinct.append(tensor)
            same.append(found)
        which.append(found)
    return distinct, which


def _are_one(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors that start at the same address are the same memory seen the same way."""
    return one is other or (
        one.numel() > 0
        and (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
        and (one.stride(), one.is_conj(), one.is_neg())
        == (other.stride(), other.is_conj(), other.is_neg())
    )


def _collect(value: Any, leaves: list[torch.Tensor], depth: int) -> None:
    """Finds the tensors of a tree, in its order."""
    if isinstance(value, torch.Tensor):
        check_tensor(value, "the state")
        leaves.append(value)
    elif isinstance(value, dict | list | tuple):
        if depth > _MAX_DEPTH:
            raise StateError(f"the state nests deeper than {_MAX_DEPTH} levels, or contains itself")
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, leaves, depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise StateError(
            f"the state holds a {type(value).__name__}; "
            "convert it to a tensor, number, text, list or dict"
        )


def _rebuild(value: Any, copies: Iterator[torch.Tensor]) -> State:
    """The tree with its tensors replaced in order; containers of a strange type stay such."""
    if isinstance(value, torch.Tensor):
        return next(copies)
    if isinstance(value, dict):
        pairs = [(key, _rebuild(item, copies)) for key, item in value.items()]
        return cast(State, type(value)(pairs))
    if isinstance(value, list | tuple):
        return cast(State, type(value)([_rebuild(item, copies) for item in value]))
    return cast(State, value)
