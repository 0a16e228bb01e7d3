"""Memory that one training step frees, kept for the next one."""

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX, as <malloc.h> of the GNU C library numbers them."""


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, instead of giving it back to the system.

    Large tensors are otherwise new memory at every step, which the system clears page by page: a
    tenth of a private step of ResNet-20. The peak stays what it is; after it the process holds on
    to what it had. For the whole process, so a program decides it, once, and no library: the
    commands that train, attack or measure training do.

    Returns:
        Whether the C library can: that of GNU.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is None:
        return False
    return bool(options(_MMAP_MAX, 0)) and bool(options(_TRIM_THRESHOLD, 2**31 - 1))
