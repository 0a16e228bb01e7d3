"""The tensors of a safetensors file: which kinds there are, where each lies, and their bytes.

The index is checked before a byte of the data is used. `state` makes a tree of the tensors.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np
import torch

from secure_cnn.archive.errors import StateError, Tampered
from secure_cnn.archive.format.claims import JSON, parse_json

__all__ = [
    "CLAIMS",
    "DTYPES",
    "DTYPE_OF",
    "MAX_HEADER",
    "METADATA",
    "STRUCTURE",
    "Index",
    "Pieces",
    "Span",
    "bytes_of",
    "check_tensor",
    "header_end",
    "parse_index",
    "parse_text",
    "stored_shape",
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
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}

DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
_PAIRED = torch.float4_e2m1fn_x2
"""Two numbers a byte: torch counts the bytes, safetensors the numbers, along the last dimension."""
_WITHOUT_TORCH = ("F6_E2M3", "F6_E3M2")
MAX_HEADER = 100_000_000  # as in safetensors
_MAX_SIZE = 1 << 48


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One tensor of a file: what it is, and where its bytes start and stop in the file's data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor over its bytes, uint8 [stop - start]; copied only if they are misaligned."""
        self.check(data)
        if self.start == self.stop:
            return torch.empty(0, dtype=self.dtype).reshape(self.shape)
        if data.data_ptr() % self.dtype.itemsize:
            data = data.clone()
        return torch.frombuffer(data.numpy(), dtype=self.dtype).reshape(self.shape)

    def check(self, data: torch.Tensor) -> None:
        """Refuses bytes that no bool has, which torch would compute with."""
        if self.dtype is torch.bool and len(data) and (most := int(data.max())) > 1:
            raise StateError(
                f"a bool tensor {self.shape}: expected bytes 0 and 1, got {most}; the file was "
                "made by something else than a tensor library, or damaged: get it again"
            )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What the header of a safetensors file says: its tensors, which tile the data, and texts."""

    spans: Mapping[str, Span]
    metadata: Mapping[str, JSON]
    data_start: int

    @property
    def claims(self) -> dict[str, JSON]:
        """The private claims, empty if there are none."""
        text = self.metadata.get(CLAIMS)
        claims = {} if text is None else parse_text(text)
        if not isinstance(claims, dict):
            raise StateError("the private claims are no JSON object; save the state again")
        return claims


def header_end(first: bytes, length: int) -> int:
    """Where the header of a safetensors file ends, by its first eight bytes."""
    if len(first) < 8 or (header := int.from_bytes(first[:8], "little")) < 2:
        raise StateError(
            "the plaintext is no safetensors file: its length is missing; save the state again"
        )
    if header > min(MAX_HEADER, length - 8):
        raise StateError(f"the plaintext is no safetensors file: its header claims {header} bytes")
    return 8 + header


def parse_index(header: bytes, length: int) -> Index:
    """The index in the JSON of a safetensors file, after checking that tensors tile the data."""
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
        spans=spans, metadata=metadata if isinstance(metadata, dict) else {}, data_start=data_start
    )


def parse_text(text: object) -> JSON:
    """JSON from inside the plaintext, as text or bytes."""
    if not isinstance(text, str | bytes):
        raise StateError("a text of the plaintext is none; save the state again")
    try:
        return parse_json(text.encode() if isinstance(text, str) else text, "the state")
    except (Tampered, UnicodeEncodeError) as error:
        raise StateError(f"{error}") from None


def _span(name: str, entry: Any) -> Span:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise StateError(f"tensor {name}: expected dtype, shape and data_offsets")
    dtype = DTYPE_OF.get(str(entry["dtype"]))
    if dtype is None:
        cure = "; torch has no such numbers, convert it" if entry["dtype"] in _WITHOUT_TORCH else ""
        raise StateError(f"tensor {name}: unknown dtype {entry['dtype']!r}{cure}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(map(_is_size, numbers)):
            raise StateError(f"tensor {name}: shape and offsets must be lists of sizes")
    if dtype is _PAIRED:
        if not shape or shape[-1] % 2:
            raise StateError(f"tensor {name}: expected pairs of F4, got shape {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise StateError(f"tensor {name}: shape {shape} does not fit its offsets {offsets}")
    return Span(dtype=dtype, shape=tuple(shape), start=offsets[0], stop=offsets[1])


def _is_size(value: object) -> bool:
    """Whether a value can be a length; larger ones would overflow in strides."""
    return type(value) is int and 0 <= value <= _MAX_SIZE


def check_tensor(tensor: torch.Tensor, path: str) -> None:
    """Refuses tensors whose bytes are not the whole story, without looking at them."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise StateError(
            f"{path}: expected a plain tensor, got {type(tensor).__name__}; convert it"
        )
    if not _is_dense(tensor):
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise StateError(
            f"{path}: expected a dense tensor with data, got {kind} on {tensor.device}; convert it"
        )
    if tensor.dtype not in DTYPES:
        raise StateError(f"{path}: safetensors has no {tensor.dtype}; convert it")
    if tensor.dtype is _PAIRED and not tensor.ndim:
        raise StateError(
            f"{path}: expected {_PAIRED} of one dimension or more, got none; reshape it"
        )


def stored_shape(dtype: torch.dtype, shape: Sequence[int]) -> list[int]:
    """The shape of a tensor as safetensors has it."""
    return [*shape[:-1], 2 * shape[-1]] if dtype is _PAIRED else [*shape]


def bytes_of(tensor: torch.Tensor, name: str) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where that is so already."""
    try:
        # As bytes: torch makes 1 of every other byte where it copies bools, as `contiguous` may.
        seen = tensor.view(torch.uint8) if tensor.dtype in (torch.bool, _PAIRED) else tensor
        plain = seen.resolve_conj().resolve_neg().cpu().contiguous()
        raw = plain.reshape(-1).view(torch.uint8)
        memory: memoryview = raw.numpy().data
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise StateError(
            f"{name}: expected a tensor whose bytes can be read, got one of which torch says: "
            f"{reason}; save a plain tensor in main memory"
        ) from None
    if tensor.dtype is torch.bool and len(memory) and int(raw.max()) > 1:
        raise StateError(f"{name}: expected a bool tensor of bytes 0 and 1, got another byte")
    return memory


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether all elements of a tensor are in its memory, one behind the other or strided."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return False
    # Memory that was given back, as sharding libraries do, cannot be read.
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0
    except (NotImplementedError, RuntimeError):  # within a transform there is none
        return False


@final
class Pieces:
    """Buffers used as if they stood one behind the other; empty ones are left out."""

    __slots__ = ("_starts", "buffers")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self.buffers = [buffer for buffer in buffers if len(buffer)]
        self._starts = [0, *accumulate(len(buffer) for buffer in self.buffers)]

    def __len__(self) -> int:
        return self._starts[-1]

    def parts(self, start: int, length: int) -> list[memoryview]:
        """Views of the `length` bytes from `start`, one of each buffer that has some of them."""
        parts: list[memoryview] = []
        index = bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            within = start - self._starts[index]
            parts.append(self.buffers[index][within : within + length])
            taken = len(parts[-1])
            start, length, index = start + taken, length - taken, index + 1
        return parts

    def read(self, start: int, length: int, scratch: memoryview) -> memoryview:
        """A view of `length` bytes from `start`; copied to `scratch` if they span buffers."""
        parts = self.parts(start, length)
        if len(parts) == 1:
            return parts[0]
        done = 0
        for part in parts:
            # An assignment would hold the interpreter lock while it copies.
            np.copyto(
                np.frombuffer(scratch[done : done + len(part)], "B"), np.frombuffer(part, "B")
            )
            done += len(part)
        return scratch[:length]
