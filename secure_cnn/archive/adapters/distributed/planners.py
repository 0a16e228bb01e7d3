"""Torch's planners without their pickles: what is no tensor is plain data, or is refused."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import decode_state, encode_state

__all__ = ["SealedLoadPlanner", "SealedSavePlanner", "hand_over", "resolve"]


class SealedSavePlanner(DefaultSavePlanner):
    """Torch's planner, but what is no tensor is written as plain data instead of as a pickle.

    Example:
        See `SealedReader`.

        >>> SealedSavePlanner().flatten_state_dict
        True
    """

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """A tensor as it is, and plain data as its bytes.

        Raises:
            StateError: It is neither.
        """
        if write_item.type is not WriteItemType.BYTE_IO:
            return object
        try:
            return io.BytesIO(b"".join(encode_state(object)))
        except StateError as error:
            raise StateError(f"{write_item.index.fqn}: {error}") from None


class SealedLoadPlanner(DefaultLoadPlanner):
    """Torch's planner, but what is no tensor is read as plain data instead of as a pickle.

    Example:
        See `SealedReader`.

        >>> SealedLoadPlanner().allow_partial_load
        False
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts plain data where it belongs in the state that is being loaded.

        Raises:
            StateError: The bytes are none.
        """
        name = read_item.dest_index.fqn
        plain = decode_state(torch.frombuffer(bytearray(value.getvalue()), dtype=torch.uint8))
        if not self.flatten_state_dict:
            self.state_dict[name] = plain
            return
        *path, last = self.mappings[name]
        place: Any = self.original_state_dict
        for part in path:
            place = place[_key(place, part)]
        place[_key(place, last)] = plain


def resolve(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    """What a planner wants to be written, as a tensor; of plain data its bytes.

    Raises:
        StateError: It is no tensor, and the planner would pickle it.
    """
    if item.type is WriteItemType.BYTE_IO and not isinstance(planner, SealedSavePlanner):
        raise StateError(
            f"{item.index.fqn}: expected a tensor, as {type(planner).__name__} pickles all else; "
            "save with planner=SealedSavePlanner()"
        )
    data = planner.resolve_data(item)
    return data.detach() if isinstance(data, torch.Tensor) else _bytes(data)


def hand_over(item: ReadItem, tensor: torch.Tensor, planner: LoadPlanner) -> None:
    """Gives a planner what it asked for, out of the stored tensor that holds it.

    Raises:
        StateError: It is no tensor and the planner would unpickle it, or it does not fit.
    """
    name = item.storage_index.fqn
    if item.type is LoadItemType.BYTE_IO:
        if not isinstance(planner, SealedLoadPlanner):
            raise StateError(
                f"{name}: expected a tensor, as {type(planner).__name__} unpickles all else; "
                "load with planner=SealedLoadPlanner()"
            )
        if tensor.dtype is not torch.uint8:
            raise StateError(f"{name}: expected the bytes of plain data, got {tensor.dtype}")
        planner.load_bytes(item, io.BytesIO(tensor.numpy().tobytes()))
        return
    part = _box(tensor, item)
    target = planner.resolve_tensor(item).detach()
    if part is None or target.shape != part.shape:
        raise StateError(
            f"{name}: expected {tuple(item.lengths)} at {tuple(item.storage_offsets)} of a stored "
            f"{tuple(tensor.shape)}, for a target {tuple(target.shape)}; save it again"
        )
    target.copy_(part)
    planner.commit_tensor(item, target)


def _key(place: Any, part: str | int) -> Any:
    """The key in a container that torch's path names; of a dict it keeps the text of the key."""
    if isinstance(place, Mapping) and part not in place:
        return next((key for key in place if str(key) == part), part)
    return part


def _bytes(data: io.BytesIO) -> torch.Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)


def _box(tensor: torch.Tensor, item: ReadItem) -> torch.Tensor | None:
    """The part of a stored tensor that an item asks for; None if it reaches out of it."""
    if not len(tensor.shape) == len(item.storage_offsets) == len(item.lengths):
        return None
    for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        if not 0 <= start <= start + length <= tensor.shape[axis]:
            return None
        tensor = tensor.narrow(axis, start, length)
    return tensor
