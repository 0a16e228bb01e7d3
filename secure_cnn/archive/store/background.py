"""Saving beside the training loop: a copy that later steps do not reach, and one thread.

The training loop stands still while the copy is made, so it is one copy of each tensor and nothing
else: no allocation where shapes repeat, no change of layout.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, final

import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import State, with_tensors
from secure_cnn.archive.format.tensors import bytes_of

__all__ = ["Background", "HostBuffer"]

_ALIGNMENT = 64

_Form: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...]]


@final
class HostBuffer:
    """One buffer in main memory that holds one copy of a state at a time."""

    __slots__ = ("_forms", "_memory", "_views")

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._forms: list[_Form] = []
        self._views: list[torch.Tensor] = []

    def copy(self, state: State) -> State:
        """The same tree, its tensors copied over those of the last copy; tied ones stay tied."""
        return with_tensors(state, self._copies)

    def _copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        views = dict(zip(tensors, self._views_for([*tensors.values()]), strict=True))
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.dtype is torch.bool:
                    # As bytes: a copy of bools makes 1 of a byte that `save` refuses.
                    views[name].view(torch.uint8).copy_(tensor.view(torch.uint8))
                    bytes_of(views[name], name)
                else:
                    views[name].copy_(tensor)
        return views

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


@final
class Background:
    """Runs work in a thread, never two at once."""

    __slots__ = ("_error", "_thread")

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts work, after the work before is done."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
                if not threading.main_thread().is_alive():
                    # The program is ending and makes no next call: say it on stderr.
                    raise

        self._thread = threading.Thread(target=run, name="checkpoint store")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no work is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
