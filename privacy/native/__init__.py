"""What is written in C: the few inner loops that no sequence of torch's operations does as fast.

Installing compiles them where there is a C compiler (`hatch_build.py`); without it every guarantee
is the same and the private step slower. A function takes a structure that its caller declares and
fills: the caller answers for every address and size in it, nothing is checked on the other side.
"""

import ctypes
import hashlib
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["call", "compiled", "floats"]

_FOLDER = Path(__file__).parent
_VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}
"""What torch calls the processor's abilities, and the library compiled for them."""
_FUNCTIONS = ("convolution_gradients", "affine_gradients", "normal_numbers")


def compiled() -> str | None:
    """The variant that this processor runs, or None where the installation compiled none."""
    return _variant() if _library() is not None else None


def call(function: str, work: ctypes.Structure, *, threads: int) -> None:
    """Runs a compiled function on at most so many of torch's threads, without Python's lock.

    `compiled()` is not None. Each thread takes its place in what `work` has for every thread.
    """
    assert function in _FUNCTIONS, f"no function {function!r}"
    library = _library()
    assert library is not None, "the caller has asked `compiled`"
    getattr(library, function)(ctypes.byref(work), _team(), threads)


def floats(values: Tensor) -> Tensor:
    """The values as compiled code reads them: float32, dense, at an address that C allows for them.

    A tensor may lie at any address: `torch.frombuffer` takes any offset.
    """
    dense = values.detach().to(torch.float32).contiguous()
    return dense if dense.data_ptr() % dense.element_size() == 0 else dense.clone()


def _variant() -> str:
    return _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "plain")


def _path() -> Path:
    """Where `hatch_build.py` puts it, under a name with a hash of the sources."""
    # A library of older sources declares other structures: it would take a size for an address.
    sources = b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]")))
    return _FOLDER / f"privacy-{_variant()}-{hashlib.sha256(sources).hexdigest()[:16]}.so.1"


@cache
def _library() -> ctypes.CDLL | None:
    if not any(_FOLDER.glob("privacy-*.so.1")):
        return None
    try:
        library = ctypes.CDLL(str(_path()))
    except OSError as error:
        warnings.warn(
            f"expected kernels compiled of this version's sources for this machine, got {error}; "
            "private steps are slower without; install the project again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name in _FUNCTIONS:
        function = getattr(library, name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
        function.restype = None
    return library


@cache
def _team() -> ctypes.c_void_p | None:
    """OpenMP's entry in the process, whose threads torch computes with; None where it has none."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if entry is None else ctypes.cast(entry, ctypes.c_void_p)
