"""A tree of tensors and plain data <-> the bytes of one valid safetensors file.

No pickle, no classes by name. Tensors become safetensors entries named by their dotted path; the
rest of the tree is JSON in `__metadata__`, so that any safetensors reader opens the tensors and
this one gives back the tree exactly. Two places that hold the same tensor are stored once and come
back as one tensor; other overlaps come back as separate copies.
"""

import json
import math
from collections import OrderedDict
from typing import Any, TypeAlias, final

import torch

from secure_cnn.archive.claims import parse_json
from secure_cnn.archive.errors import StateError, Tampered

__all__ = ["State", "decode_state", "encode_state"]

State: TypeAlias = (
    "dict[Any, State] | list[State] | tuple[State, ...] | torch.Tensor | str | float | None"
)

_METADATA = "__metadata__"
_STRUCTURE = "secure_cnn.state"
_MAX_HEADER = 100_000_000
_MAX_DEPTH = 32
_MAX_INTEGER_BITS = 1024
_ALIGNMENT = 64
_MAX_SIZE = 1 << 48
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


def encode_state(state: State) -> list[memoryview]:
    """The safetensors file of a state, as buffers to be read one behind the other.

    Tensors that are contiguous in main memory are not copied: change them after the buffers were
    used only.

    Args:
        state: A tree, up to 32 deep, of dict (keys str or int; an `OrderedDict` becomes a dict),
            list, tuple, str, int (up to 1024 bits), float, bool, None and tensors (dense, any
            device, any dtype that safetensors has; parameters come back as tensors).

    Raises:
        StateError: Something else is in the tree; the message has its dotted path.

    Example:
        >>> buffers = encode_state({"weight": torch.zeros(2)})
        >>> import safetensors.torch
        >>> safetensors.torch.load(b"".join(buffers))
        {'weight': tensor([0., 0.])}
    """
    encoder = _Encoder()
    structure = json.dumps(encoder.node(state, ()), separators=(",", ":"), allow_nan=False)
    tensors = sorted(encoder.tensors.items(), key=lambda item: -item[1].itemsize)
    entries: dict[str, Any] = {_METADATA: {_STRUCTURE: structure}}
    buffers = []
    end = 0
    for name, tensor in tensors:
        buffers.append(_bytes_of(tensor))
        start, end = end, end + len(buffers[-1])
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    if len(header) > _MAX_HEADER:
        raise StateError(
            f"the names of the tensors take {len(header)} bytes; expected at most {_MAX_HEADER}"
        )
    return [memoryview(len(header).to_bytes(8, "little") + header), *buffers]


def decode_state(data: torch.Tensor) -> State:
    """The state in the bytes of a safetensors file; a dict of its tensors if another tool made it.

    Args:
        data: uint8 tensor [n]. The tensors of the state use its memory.

    Raises:
        StateError: The bytes are no valid safetensors file, or its structure does not fit its
            tensors.

    Example:
        >>> buffers = encode_state({"step": 3, 0: (torch.ones(2), None)})
        >>> decode_state(torch.tensor(list(b"".join(buffers)), dtype=torch.uint8))
        {'step': 3, 0: (tensor([1., 1.]), None)}
    """
    if len(data) < 8 or not (length := int.from_bytes(data[:8].numpy().tobytes(), "little")) >= 2:
        raise StateError(
            "the plaintext is no safetensors file: its length is missing; save the state again"
        )
    if length > min(_MAX_HEADER, len(data) - 8):
        raise StateError(f"the plaintext is no safetensors file: its header claims {length} bytes")
    entries = _parse(data[8 : 8 + length].numpy().tobytes())
    metadata = entries.pop(_METADATA, {})
    tensors = _tensors(entries, data[8 + length :])
    if not isinstance(metadata, dict) or _STRUCTURE not in metadata:
        return dict(tensors)
    structure = metadata[_STRUCTURE]
    if not isinstance(structure, str):
        raise StateError("the structure of the state is not text; save the state again")
    return _build(_parse_any(structure.encode()), tensors)


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
        if type(value) in (dict, OrderedDict):
            return {"dict": [self._item(key, item, path) for key, item in value.items()]}
        if type(value) in (list, tuple):
            nodes = [self.node(item, (*path, str(index))) for index, item in enumerate(value)]
            return {"list" if type(value) is list else "tuple": nodes}
        return _scalar(value, path)

    def _item(self, key: object, value: object, path: tuple[str, ...]) -> list[object]:
        """The JSON of an entry of a dict."""
        if type(key) is not str and type(key) is not int:
            raise StateError(
                f"{_dotted(path)}: expected keys that are str or int, "
                f"got {type(key).__name__} {key!r}"
            )
        _scalar(key, path)
        return [key, self.node(value, (*path, str(key)))]

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        """The name a tensor is stored under; the same one for the same memory seen the same way."""
        _check_tensor(tensor, _dotted(path))
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
        while name in self.tensors or name == _METADATA:
            number += 1
            name = f"{base}#{number}"
        self.tensors[name] = tensor.detach()
        self._known[place] = name
        return name


def _dotted(path: tuple[str, ...]) -> str:
    """A path for messages."""
    return ".".join(("state", *path))


def _scalar(value: object, path: tuple[str, ...]) -> object:
    """The JSON of a value that is not a container."""
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if type(value) is int and value.bit_length() > _MAX_INTEGER_BITS:
        raise StateError(
            f"{_dotted(path)}: expected an int of up to {_MAX_INTEGER_BITS} bits, got a larger one"
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


def _check_tensor(tensor: torch.Tensor, path: str) -> None:
    """Refuses tensors whose bytes are not the whole story."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise StateError(
            f"{path}: expected a plain tensor, got {type(tensor).__name__}; convert it"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise StateError(
            f"{path}: expected a dense tensor with data, "
            f"got {tensor.layout} on {tensor.device}; convert it"
        )
    if tensor.dtype not in _DTYPES:
        raise StateError(f"{path}: safetensors has no {tensor.dtype}; convert it")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where that is so already."""
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _parse_any(raw: bytes) -> Any:
    """JSON from inside the plaintext."""
    try:
        return parse_json(raw, "the state")
    except Tampered as error:
        raise StateError(f"{error}") from None


def _parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a safetensors header."""
    entries = _parse_any(raw)
    if not isinstance(entries, dict):
        raise StateError("the plaintext is no safetensors file: its header is no object")
    return entries


def _tensors(entries: dict[str, Any], data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, after checking that they tile the data."""
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise StateError(f"tensor {name}: expected it to start at {end}, got {start}")
        end = stop
    if end != len(data):
        raise StateError(f"expected {end} bytes of tensors, got {len(data)}")
    return {name: _view(data, *span) for name, span in spans.items()}


def _span(name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape, start and end of a safetensors entry."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise StateError(f"tensor {name}: expected dtype, shape and data_offsets")
    dtype = _BY_NAME.get(str(entry["dtype"]))
    if dtype is None:
        raise StateError(f"tensor {name}: unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(map(_is_size, numbers)):
            raise StateError(f"tensor {name}: shape and offsets must be lists of sizes")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise StateError(f"tensor {name}: shape {shape} does not fit its offsets {offsets}")
    return dtype, shape, offsets[0], offsets[1]


def _is_size(value: object) -> bool:
    """Whether a value can be a length; larger ones would overflow in strides."""
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _view(
    data: torch.Tensor, dtype: torch.dtype, shape: list[int], start: int, stop: int
) -> torch.Tensor:
    """A tensor with its own storage over a part of the data; copied only if misaligned."""
    if start == stop:
        return torch.empty(0, dtype=dtype).reshape(shape)
    part = data[start:stop]
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return torch.frombuffer(part.numpy(), dtype=dtype).reshape(shape)


def _build(node: Any, tensors: dict[str, torch.Tensor]) -> State:
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


def _container(kind: str, content: list[Any], tensors: dict[str, torch.Tensor]) -> State:
    """The dict, list or tuple of a node."""
    if kind in ("list", "tuple"):
        items = [_build(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict" and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
        for pair in content
    ):
        return {key: _build(value, tensors) for key, value in content}
    raise StateError(
        f"the structure of the state has an unknown part {kind!r}; use a newer secure-cnn"
    )
