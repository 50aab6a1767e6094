"""How many kernels a call launches on a GPU: small kernels cost more in launching than in running."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


# How CUDA's profiler calls a launch; a whole CUDA graph is one.
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")


def count_launches(call: Callable[[], object]) -> int:
    """
    Count the kernel launches of a call.

    Args:
        call (`Callable`): What to run, on a CUDA GPU.

    Returns:
        `int`: Number of launches; 0 where nothing runs on a GPU.

    Examples:

    ```python
    >>> from agentsd.bench.launches import count_launches
    >>> count_launches(lambda: None)
    0
    ```
    """
    # What runs on the CPU itself is far more, and takes minutes to go through.
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(_LAUNCHES))
