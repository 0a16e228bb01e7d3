"""A tree of tensors and plain data <-> the bytes of one valid safetensors file.

Tensors become safetensors entries named by their dotted path; the rest of the tree is JSON in
`__metadata__`, so that any safetensors reader opens the tensors and this one gives back the tree
exactly. Two places that hold the same tensor are stored once and come back as one tensor; other
overlaps come back as separate copies.
"""

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, final

import numpy as np
import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.claims import JSON, MAX_INTEGER_BITS, canonical_json
from secure_cnn.archive.format.tensors import (
    CLAIMS,
    DTYPES,
    MAX_HEADER,
    METADATA,
    STRUCTURE,
    Index,
    bytes_of,
    check_tensor,
    header_end,
    parse_index,
    parse_text,
    stored_shape,
)

__all__ = [
    "State",
    "build_state",
    "decode_state",
    "encode_state",
    "index_of",
    "named_tensors",
    "tensor_names",
    "with_tensors",
]

State: TypeAlias = (
    "dict[Any, State] | list[State] | tuple[State, ...] | torch.Tensor | str | float | None"
)

_KEYED: Mapping[str, Callable[[dict[Any, Any]], dict[Any, Any]]] = {
    "dict": lambda items: items,
    # The milestones of torch's MultiStepLR, which asks them what only a Counter answers.
    "counter": Counter,
}
_MAX_DEPTH = 32
_ALIGNMENT = 64


def encode_state(state: State, claims: Mapping[str, JSON] | None = None) -> list[memoryview]:
    """The safetensors file of a state, as buffers to be read one behind the other.

    A state is a tree, up to 32 deep, of dict (keys str or int; an `OrderedDict` becomes a dict, a
    `Counter` comes back as one), list, tuple, str, int (up to 1024 bits), float, bool, None and
    dense tensors; parameters come back as tensors, numpy's scalars as the numbers of Python that
    equal them. Tensors that are contiguous in main memory are not copied: change them only
    after the buffers were used.
    """
    encoder = _Encoder()
    structure = json.dumps(encoder.node(state, ()), separators=(",", ":"), allow_nan=False)
    # The widest items first: then every tensor is aligned without padding between them.
    tensors = sorted(encoder.tensors.items(), key=lambda item: -item[1].itemsize)
    metadata = {STRUCTURE: structure}
    if claims:
        metadata[CLAIMS] = canonical_json(dict(claims), "private_claims").decode()
    entries: dict[str, Any] = {METADATA: metadata}
    buffers = []
    end = 0
    for name, tensor in tensors:
        buffers.append(bytes_of(tensor, name))
        start, end = end, end + len(buffers[-1])
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": stored_shape(tensor.dtype, tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise StateError(
            f"the names of the tensors take {len(header)} bytes; expected at most {MAX_HEADER}"
        )
    return [memoryview(len(header).to_bytes(8, "little") + header), *buffers]


def decode_state(data: torch.Tensor) -> State:
    """The state in the bytes of a safetensors file, uint8 [n], whose memory its tensors use."""
    index = index_of(data)
    return build_state(index, lambda name: _cut(index, data, name))


def index_of(data: torch.Tensor) -> Index:
    """The index of the safetensors file in these bytes, uint8 [n]."""
    end = header_end(data[:8].numpy().tobytes(), len(data))
    return parse_index(data[8:end].numpy().tobytes(), len(data))


def build_state(index: Index, tensor: Callable[[str], torch.Tensor]) -> State:
    """The tree that an index describes; a dict of its tensors if another tool made it."""
    tensors = {name: tensor(name) for name in index.spans}
    if STRUCTURE not in index.metadata:
        return {name: tensors[kept] for name, kept in tensor_names(index).items()}
    return _build(parse_text(index.metadata[STRUCTURE]), tensors)


def tensor_names(index: Index) -> dict[str, str]:
    """The stored name of each tensor, by that name and by each dotted path where it stands."""
    names = {name: name for name in index.spans}
    metadata = index.metadata
    # Of tied names safetensors' save_model keeps one, and notes which for each of the others.
    found: Iterable[tuple[str, object]] = metadata.items()
    if STRUCTURE in metadata:
        found = _places(parse_text(metadata[STRUCTURE]), ())
    for path, name in found:
        if isinstance(name, str) and name in index.spans:
            names.setdefault(path, name)
    return names


def named_tensors(state: State) -> dict[str, torch.Tensor]:
    """The tensors of a state, by the names they are stored under; the same memory."""
    encoder = _Encoder()
    encoder.node(state, ())
    return encoder.tensors


def with_tensors(
    state: State, exchange: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> State:
    """The same tree with the tensors that `exchange` gives, by the names of `named_tensors`."""
    encoder = _Encoder()
    structure = encoder.node(state, ())
    return _build(structure, exchange(encoder.tensors))


def _places(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Dotted path and stored name of every tensor below a node."""
    if not isinstance(node, dict) or len(node) != 1:
        return
    ((kind, content),) = node.items()
    if kind == "tensor" and isinstance(content, str):
        yield ".".join(path) or "tensor", content
    elif kind in ("list", "tuple") and isinstance(content, list):
        for number, item in enumerate(content):
            yield from _places(item, (*path, str(number)))
    elif kind in _KEYED and isinstance(content, list):
        for pair in content:
            if isinstance(pair, list) and len(pair) == 2:
                yield from _places(pair[1], (*path, str(pair[0])))


def _cut(index: Index, data: torch.Tensor, name: str) -> torch.Tensor:
    span = index.spans[name]
    return span.view(data[index.data_start + span.start : index.data_start + span.stop])


@final
class _Encoder:
    """Walks a state; collects its tensors under unique names."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._known: dict[tuple[object, ...], str] = {}

    def node(self, value: Any, path: tuple[str, ...]) -> object:
        """The JSON of a value: scalars as themselves, the rest as an object with one key."""
        if len(path) > _MAX_DEPTH:
            raise StateError(
                f"{_dotted(path)}: nests deeper than {_MAX_DEPTH} levels, or contains itself"
            )
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, path)}
        if type(value) in (dict, OrderedDict, Counter):
            kind = "counter" if type(value) is Counter else "dict"
            return {kind: [self._item(key, item, path) for key, item in value.items()]}
        if type(value) in (list, tuple):
            nodes = [self.node(item, (*path, str(index))) for index, item in enumerate(value)]
            return {"list" if type(value) is list else "tuple": nodes}
        return _scalar(_plain(value), path)

    def _item(self, key: object, value: object, path: tuple[str, ...]) -> list[object]:
        key = _plain(key)
        if type(key) is not str and type(key) is not int:
            raise StateError(
                f"{_dotted(path)}: expected keys that are str or int, "
                f"got {type(key).__name__} {key!r}"
            )
        _scalar(key, path)
        return [key, self.node(value, (*path, str(key)))]

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        """The name a tensor is stored under; the same one for the same memory seen the same way."""
        check_tensor(tensor, _dotted(path))
        place = (
            tensor.data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if tensor.numel() and place in self._known:
            return self._known[place]
        base = name = ".".join(path) or "tensor"
        number = 1
        while name in self.tensors or name == METADATA:
            number += 1
            name = f"{base}#{number}"
        self.tensors[name] = tensor.detach()
        self._known[place] = name
        return name


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(("state", *path))


def _plain(value: object) -> object:
    """A scalar of numpy as Python's of the same value, where there is one."""
    return value.item() if isinstance(value, np.generic) else value


def _scalar(value: object, path: tuple[str, ...]) -> object:
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
        raise StateError(
            f"{_dotted(path)}: expected an int of up to {MAX_INTEGER_BITS} bits, got a larger one"
        )
    if type(value) is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise StateError(f"{_dotted(path)}: expected text that UTF-8 can hold") from None
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise StateError(
        f"{_dotted(path)}: expected tensors and plain data, got {type(value).__name__}; "
        "convert it to a tensor, number, text, list or dict"
    )


def _build(node: Any, tensors: Mapping[str, torch.Tensor]) -> State:
    """The value of a node that `_Encoder.node` made."""
    if node is None or isinstance(node, (str, int, float)):
        return node
    if isinstance(node, dict) and len(node) == 1:
        ((kind, content),) = node.items()
        if kind == "tensor" and isinstance(content, str) and content in tensors:
            return tensors[content]
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if isinstance(content, list):
            return _container(kind, content, tensors)
    raise StateError("the structure of the state does not fit its tensors; save the state again")


def _container(kind: str, content: list[Any], tensors: Mapping[str, torch.Tensor]) -> State:
    if kind in ("list", "tuple"):
        items = [_build(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind in _KEYED and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
        for pair in content
    ):
        return _KEYED[kind]({key: _build(value, tensors) for key, value in content})
    raise StateError(
        f"the structure of the state has an unknown part {kind!r}; use a newer secure-cnn"
    )
