"""What is kept of compiled code from call to call: as CUDA graphs, each run of it writes where the last one did."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only


def copied(kept: Any) -> Any:
    """The same with copies of all tensors in lists, tuples and dictionaries."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), kept)
