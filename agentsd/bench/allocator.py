"""Keeps freed memory in the process while times are taken, as the allocators for fast CPU inference do."""

import ctypes
import platform


# Parameters of `mallopt`, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """
    Tell the C library to use freed memory again instead of giving it back to the system.

    By default glibc gives every large tensor back when it is freed, and the next one consists of new pages, each of
    which the system clears on first touch. That happens about a million times in one call of a Stable Diffusion UNet
    at 768 pixels, and takes longer or shorter as the rest of the machine pleases, most of all on a virtual one. What
    is told holds for the rest of the process, and for main memory only.

    Returns:
        `bool`: Whether the C library is one that can be told.

    Examples:

    ```python
    >>> from agentsd.bench.allocator import keep_freed_memory
    >>> isinstance(keep_freed_memory(), bool)
    True
    ```
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
