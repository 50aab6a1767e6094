"""From how many tokens on merging pays, which the device decides."""

from typing import Literal

import torch


MinTokens = int | Literal["auto"]

# Measured in float32 on a CPU (`notebooks/results/small*`): between 1,024 and 2,304 tokens.
_ON_A_CPU = 2048
# In float16 on a CUDA GPU (`h100*`), merging loses at 9,216; at 16,384 it loses nothing in SD 1.5, and gains in SDXL.
# What is no CPU is taken for a GPU like that one.
_ON_A_GPU = 16384


def least_tokens(min_tokens: MinTokens, device: torch.device) -> int:
    """
    How many tokens a layer has to have for its tokens to be merged.

    Args:
        min_tokens (`int` or `"auto"`): What was asked for; `"auto"` is from where on merging pays on the device.
        device (`torch.device`): Where the layer runs.

    Returns:
        `int`: A number of tokens.

    Examples:

    ```python
    >>> cpu, gpu = torch.device("cpu"), torch.device("cuda")
    >>> least_tokens("auto", cpu), least_tokens("auto", gpu), least_tokens(9, gpu)
    (2048, 16384, 9)
    ```
    """
    if min_tokens != "auto":
        return min_tokens
    return _ON_A_CPU if device.type == "cpu" else _ON_A_GPU
