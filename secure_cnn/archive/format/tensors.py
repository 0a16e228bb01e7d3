"""The index of a safetensors file: which tensor lies where, checked before a byte of it is used.

No tree and no file here: `state` makes a tree of the tensors, `lazy` reads single ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from secure_cnn.archive.errors import StateError, Tampered
from secure_cnn.archive.format.claims import JSON, parse_json

__all__ = [
    "CLAIMS",
    "DTYPES",
    "METADATA",
    "STRUCTURE",
    "Index",
    "Span",
    "header_end",
    "parse_index",
    "parse_text",
]

METADATA = "__metadata__"
STRUCTURE = "secure_cnn.state"
CLAIMS = "secure_cnn.claims"
DTYPES = {
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
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_SIZE = 1 << 48


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One tensor of a file: what it is, and where its bytes lie.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        start: Offset of its first byte in the data of the file.
        stop: Offset behind its last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor with its own storage over its bytes; copied only if they are misaligned.

        Args:
            data: uint8 [stop - start].

        Raises:
            StateError: It is a bool tensor with a byte other than 0 and 1.
        """
        self.check(data)
        if self.start == self.stop:
            return torch.empty(0, dtype=self.dtype).reshape(self.shape)
        if data.data_ptr() % self.dtype.itemsize:
            data = data.clone()
        return torch.frombuffer(data.numpy(), dtype=self.dtype).reshape(self.shape)

    def check(self, data: torch.Tensor) -> None:
        """Passes if the bytes are ones that a tensor of this type can have.

        Torch takes any byte for a bool and computes with it what no bool gives.

        Args:
            data: uint8 [stop - start].

        Raises:
            StateError: It is a bool tensor with a byte other than 0 and 1.
        """
        if self.dtype is torch.bool and len(data) and (most := int(data.max())) > 1:
            raise StateError(
                f"a bool tensor {self.shape}: expected bytes 0 and 1, got {most}; the file was "
                "made by something else than a tensor library, or damaged: get it again"
            )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What the header of a safetensors file says.

    Attributes:
        spans: Its tensors by name, in file order; they tile the data.
        metadata: Its texts.
        data_start: Where the data starts in the file.
    """

    spans: Mapping[str, Span]
    metadata: Mapping[str, JSON]
    data_start: int

    @property
    def claims(self) -> dict[str, JSON]:
        """The private claims, empty if there are none.

        Raises:
            StateError: They are no JSON object.
        """
        text = self.metadata.get(CLAIMS)
        claims = {} if text is None else parse_text(text)
        if not isinstance(claims, dict):
            raise StateError("the private claims are no JSON object; save the state again")
        return claims


def header_end(first: bytes, length: int) -> int:
    """Where the header of a safetensors file ends.

    Args:
        first: Its first eight bytes.

    Raises:
        StateError: No safetensors file starts so.
    """
    if len(first) < 8 or (header := int.from_bytes(first[:8], "little")) < 2:
        raise StateError(
            "the plaintext is no safetensors file: its length is missing; save the state again"
        )
    if header > min(_MAX_HEADER, length - 8):
        raise StateError(f"the plaintext is no safetensors file: its header claims {header} bytes")
    return 8 + header


def parse_index(header: bytes, length: int) -> Index:
    """The index in the header of a safetensors file, after checking that tensors tile the data.

    Args:
        header: The JSON, without the eight bytes before it.

    Raises:
        StateError: It is no such header, or does not fit the file.
    """
    entries = parse_text(header)
    if not isinstance(entries, dict):
        raise StateError("the plaintext is no safetensors file: its header is no object")
    metadata = entries.pop(METADATA, {})
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start != end:
            raise StateError(f"tensor {name}: expected it to start at {end}, got {span.start}")
        end = span.stop
    data_start = 8 + len(header)
    if end != length - data_start:
        raise StateError(f"expected {end} bytes of tensors, got {length - data_start}")
    return Index(
        spans=spans,
        metadata=metadata if isinstance(metadata, dict) else {},
        data_start=data_start,
    )


def parse_text(text: object) -> JSON:
    """JSON from inside the plaintext, as text or bytes.

    Raises:
        StateError: It is none.
    """
    if not isinstance(text, str | bytes):
        raise StateError("a text of the plaintext is none; save the state again")
    try:
        return parse_json(text.encode() if isinstance(text, str) else text, "the state")
    except (Tampered, UnicodeEncodeError) as error:
        raise StateError(f"{error}") from None


def _span(name: str, entry: Any) -> Span:
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
    return Span(dtype=dtype, shape=tuple(shape), start=offsets[0], stop=offsets[1])


def _is_size(value: object) -> bool:
    """Whether a value can be a length; larger ones would overflow in strides."""
    return type(value) is int and 0 <= value <= _MAX_SIZE
