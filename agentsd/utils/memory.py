"""How much memory something takes at its highest: the device's own count, or this process' resident memory."""

from pathlib import Path

import torch


# Linux keeps the peak of a process' resident memory (VmHWM), and writing 5 to clear_refs sets it back.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


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
