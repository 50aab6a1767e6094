"""What is kept of compiled code from call to call: as CUDA graphs, each run of it writes where the last one did."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only


def copied(kept: Any) -> Any:
    """The same with copies of all tensors in lists, tuples and dictionaries."""
    return tree_map_only(torch.Tensor, _copied, kept)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    # Of the same strides, for others are one more graph to compile; what is repeated stays repeated.
    rows = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        rows = rows.narrow(dim, 0, 1) if stride == 0 and tensor.shape[dim] > 1 else rows
    copy = torch.empty_strided(rows.shape, rows.stride(), dtype=tensor.dtype, device=tensor.device).copy_(rows)
    return copy.expand(tensor.shape)
