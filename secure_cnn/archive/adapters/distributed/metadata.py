"""The metadata of a distributed checkpoint <-> a tree of plain data. Pure; no file, no pickle."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import State
from secure_cnn.archive.format.tensors import DTYPES

__all__ = ["Contents", "Place", "contents_of", "tree_of"]

_FILE = re.compile(r"rank-(0|[1-9][0-9]{0,8})\.sealed")
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one tensor is stored, or one piece of it, or the bytes of plain data.

    Attributes:
        file: The name of a sealed file in the folder of the checkpoint.
        core_hash: The core hash of that file.
        tensor: The name of the tensor in it.
    """

    file: str
    core_hash: str
    tensor: str


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a checkpoint holds, and where.

    Attributes:
        metadata: As torch's planners take it.
        places: By the index that planners ask with.
    """

    metadata: Metadata
    places: dict[MetadataIndex, Place]


def tree_of(contents: Contents) -> State:
    """The contents as plain data, to be sealed.

    Raises:
        StateError: A tensor has a type that safetensors has not.
    """
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
    """The contents in plain data that was sealed; whoever may seal may have written it.

    Raises:
        StateError: The tree is none of `tree_of`.
    """
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
    """One name as plain data: None for what is no tensor."""
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
    """What `_entry` told."""
    if entry is None:
        return BytesStorageMetadata()
    return TensorStorageMetadata(
        properties=TensorProperties(
            dtype=_DTYPES[entry["dtype"]], requires_grad=bool(entry["requires_grad"])
        ),
        size=_size(entry["size"]),
        chunks=[
            ChunkStorageMetadata(offsets=_size(offsets), sizes=_size(sizes))
            for offsets, sizes in entry["chunks"]
        ],
    )


def _place(row: Sequence[Any]) -> tuple[MetadataIndex, Place]:
    """One row of the places."""
    name, offset, file, core_hash, tensor = row
    if not all(isinstance(text, str) for text in row[2:]) or not _FILE.fullmatch(file):
        raise ValueError(file)
    index = MetadataIndex(str(name), None if offset is None else _size(offset))
    return index, Place(file=file, core_hash=core_hash, tensor=tensor)


def _size(numbers: Sequence[Any]) -> torch.Size:
    """Lengths or offsets."""
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(numbers)
    return torch.Size(numbers)
