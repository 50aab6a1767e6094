"""Memory: how much something takes at its highest, and how freed memory is kept while times are taken."""

import ctypes
import platform
from pathlib import Path

import torch


# Linux keeps the peak of a process' resident memory (VmHWM), and writing 5 to clear_refs sets it back.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Parameters of `mallopt`, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def can_watch_peak(device: torch.device) -> bool:
    """
    Whether peak memory can be measured: on CUDA, and on the CPU under Linux.

    Args:
        device (`torch.device`): Where the work runs.

    Returns:
        `bool`: Whether [`start_peak`] can be asked for.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.memory import can_watch_peak
    >>> can_watch_peak(torch.device("meta"))
    False
    ```
    """
    return device.type == "cuda" or (device.type == "cpu" and _CLEAR_REFS.exists())


def start_peak(device: torch.device) -> bool:
    """
    Forget the highest memory use so far.

    Args:
        device (`torch.device`): Where the work runs.

    Returns:
        `bool`: Whether it could be forgotten, so that [`read_peak`] will tell something.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.memory import start_peak
    >>> start_peak(torch.device("meta"))
    False
    ```
    """
    if not can_watch_peak(device):
        return False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # a sandbox that forbids it
        return False
    return True


def read_peak(device: torch.device) -> int | None:
    """
    The highest memory use since [`start_peak`].

    Args:
        device (`torch.device`): Where the work ran.

    Returns:
        `int`, *optional*: Bytes: on CUDA what torch had allocated there, on the CPU the resident memory of the whole
        process. `None` if it is not known.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.memory import read_peak
    >>> read_peak(torch.device("meta")) is None
    True
    ```
    """
    if not can_watch_peak(device):
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peaks = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


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
    >>> from agentsd.utils.memory import keep_freed_memory
    >>> isinstance(keep_freed_memory(), bool)
    True
    ```
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
