"""What a distributed checkpoint holds, as plain data; torch's planners without their pickles."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import State, decode_state, encode_state
from secure_cnn.archive.format.tensors import DTYPE_OF, DTYPES

__all__ = [
    "Contents",
    "Place",
    "SealedLoadPlanner",
    "SealedSavePlanner",
    "contents_of",
    "hand_over",
    "resolve",
    "tree_of",
]

_FILE = re.compile(r"rank-(0|[1-9][0-9]{0,8})\.sealed")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor, a piece of one, or the bytes of plain data are: a tensor of a sealed file."""

    file: str
    core_hash: str
    tensor: str


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a checkpoint holds, as planners take it, and where, by the index they ask with."""

    metadata: Metadata
    places: dict[MetadataIndex, Place]


def tree_of(contents: Contents) -> State:
    """The contents as plain data, to be sealed."""
    return {
        "entries": {
            name: _entry(name, stored)
            for name, stored in contents.metadata.state_dict_metadata.items()
        },
        "planner_data": contents.metadata.planner_data,
        "places": [
            [
                index.fqn,
                None if index.offset is None else list(index.offset),
                place.file,
                place.core_hash,
                place.tensor,
            ]
            for index, place in contents.places.items()
        ],
    }


def contents_of(tree: State) -> Contents:
    """The contents in plain data that was sealed; whoever may seal may have written it."""
    fields: Any = tree
    try:
        return Contents(
            metadata=Metadata(
                state_dict_metadata={
                    str(name): _stored(entry) for name, entry in fields["entries"].items()
                },
                planner_data=fields["planner_data"],
            ),
            places=dict(_place(row) for row in fields["places"]),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise StateError(
            "expected the metadata of a distributed checkpoint, got another state; save it again"
        ) from None


def _entry(name: str, stored: TensorStorageMetadata | BytesStorageMetadata) -> State:
    if isinstance(stored, BytesStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if dtype not in DTYPES:
        raise StateError(f"{name}: safetensors has no {dtype}; convert it")
    return {
        "dtype": DTYPES[dtype],
        "size": list(stored.size),
        "requires_grad": stored.properties.requires_grad,
        "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in stored.chunks],
    }


def _stored(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if entry is None:
        return BytesStorageMetadata()
    return TensorStorageMetadata(
        properties=TensorProperties(
            dtype=DTYPE_OF[entry["dtype"]], requires_grad=bool(entry["requires_grad"])
        ),
        size=_size(entry["size"]),
        chunks=[
            ChunkStorageMetadata(offsets=_size(offsets), sizes=_size(sizes))
            for offsets, sizes in entry["chunks"]
        ],
    )


def _place(row: Sequence[Any]) -> tuple[MetadataIndex, Place]:
    name, offset, file, core_hash, tensor = row
    if not all(isinstance(text, str) for text in row[2:]) or not _FILE.fullmatch(file):
        raise ValueError(file)
    index = MetadataIndex(str(name), None if offset is None else _size(offset))
    return index, Place(file=file, core_hash=core_hash, tensor=tensor)


def _size(numbers: Sequence[Any]) -> torch.Size:
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(numbers)
    return torch.Size(numbers)


class SealedSavePlanner(DefaultSavePlanner):
    """Torch's planner, but what is no tensor is written as plain data, not as a pickle."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """A tensor as it is, and plain data as its bytes."""
        if write_item.type is not WriteItemType.BYTE_IO:
            return object
        try:
            return io.BytesIO(b"".join(encode_state(object)))
        except StateError as error:
            raise StateError(f"{write_item.index.fqn}: {error}") from None


class SealedLoadPlanner(DefaultLoadPlanner):
    """Torch's planner, but what is no tensor is read as plain data, not as a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts plain data where it belongs in the state that is being loaded."""
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
    """What a planner wants to be written, as a tensor; of plain data its bytes."""
    if item.type is WriteItemType.BYTE_IO and not isinstance(planner, SealedSavePlanner):
        raise StateError(
            f"{item.index.fqn}: expected a tensor, as {type(planner).__name__} pickles all else; "
            "save with planner=SealedSavePlanner()"
        )
    data = planner.resolve_data(item)
    if isinstance(data, torch.Tensor):
        return data.detach()
    return torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)


def hand_over(item: ReadItem, tensor: torch.Tensor, planner: LoadPlanner) -> None:
    """Gives a planner what it asked for, out of the stored tensor that holds it."""
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


def _box(tensor: torch.Tensor, item: ReadItem) -> torch.Tensor | None:
    """The part of a stored tensor that an item asks for; None if it reaches out of it."""
    if not len(tensor.shape) == len(item.storage_offsets) == len(item.lengths):
        return None
    for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        if not 0 <= start <= start + length <= tensor.shape[axis]:
            return None
        tensor = tensor.narrow(axis, start, length)
    return tensor
