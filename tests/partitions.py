"""Partitions of tokens, for the tests of what is made with them."""

import torch
from hypothesis import strategies as st

from agentsd.ops.partitioning import Partition, cell_grid, mix_key, partition_tokens, random_members


CPU = torch.device("cpu")

layouts = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)).filter(
    lambda layout: layout[0] >= layout[3] and layout[1] >= layout[2]
)


def make_partition(height, width, sx, sy, keys=(981,), seed=0, use_rand=True) -> Partition:
    cells, leftover = cell_grid(height, width, sx, sy, CPU)
    member = random_members(len(cells), sx * sy, mix_key(torch.tensor(keys), seed)) if use_rand else None
    return partition_tokens(cells, leftover, member)
