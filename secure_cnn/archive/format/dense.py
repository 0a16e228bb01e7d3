"""Which tensors a file can hold, and the bytes of one: dense, with data, of a type it has."""

import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.tensors import DTYPES

__all__ = ["bytes_of", "check_tensor"]


def check_tensor(tensor: torch.Tensor, path: str) -> None:
    """Refuses tensors whose bytes are not the whole story, without looking at them.

    Raises:
        StateError: It is of a class of its own, not dense, without data, or of a type that
            safetensors has not.
    """
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


def bytes_of(tensor: torch.Tensor, name: str) -> memoryview:
    r"""The bytes of a tensor in row-major order; its own memory where that is so already.

    Raises:
        StateError: It has none that can be read, or is a bool tensor with another than 0 and 1.
    """
    try:
        # As bytes: torch makes 1 of every other byte where it copies bools, as `contiguous` may.
        seen = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
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
