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
    """Whether peak memory can be measured: on CUDA, and on the CPU under Linux."""
    return device.type == "cuda" or (device.type == "cpu" and _CLEAR_REFS.exists())


def start_peak(device: torch.device) -> bool:
    """Forget the highest memory use so far, and tell whether that worked."""
    if not can_watch_peak(device):
        return False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    give_back_freed_memory()  # it would count as used
    try:
        _CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:  # a sandbox that forbids it
        return False
    return True


def read_peak(device: torch.device) -> int | None:
    """Bytes at most since `start_peak`: of torch on CUDA, resident ones of the whole process on the CPU."""
    if not can_watch_peak(device):
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


def keep_freed_memory() -> bool:
    """Have freed memory used again instead of given back to the system, from now on; tell whether that worked."""
    # By default glibc gives every large tensor back when it is freed, and the next one consists of new pages, each of
    # which the system clears on first touch. That happens about a million times in one call of a Stable Diffusion UNet
    # at 768 pixels, and takes longer or shorter as the rest of the machine pleases, most of all on a virtual one.
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, once."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one that knows these functions."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
