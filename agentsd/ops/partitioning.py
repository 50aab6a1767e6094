"""
Which tokens others are merged into: one of each cell, its destination. Pure functions of tensors.

Shapes: `N = height * width` tokens, `D` cells, `S = N - D` source tokens. Token indices are int64. `P` is the batch,
or 1 where all of it shares one partition.

On an NVIDIA GPU, `random_partition` is a kernel of `kernels.py`, if Triton works there.
"""

from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .dispatch import has_kernels


_Integers = TypeVar("_Integers", int, torch.Tensor)


class Partition(NamedTuple):
    """
    Which tokens are destinations and which are sources.

    Args:
        dst (`torch.Tensor` of shape `(P, D)`): Token index of each cell's destination.
        src (`torch.Tensor` of shape `(P, S)`): Token indices of all other tokens, in no particular order.
    """

    dst: torch.Tensor
    src: torch.Tensor


def cell_grid(height: int, width: int, sx: int, sy: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of every cell, and those that no cell covers.

    Cells of `sy` by `sx` tokens cover the top-left `(height // sy) * sy` by `(width // sx) * sx` corner.

    Args:
        height (`int`): Rows of tokens.
        width (`int`): Columns of tokens.
        sx (`int`): Cell width.
        sy (`int`): Cell height.
        device (`torch.device`): Where to put the indices.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Token indices of shape `(D, sy * sx)`, each cell row by row, and `(L,)`.

    Examples:

    ```python
    >>> import torch
    >>> cells, leftover = cell_grid(2, 5, sx=2, sy=2, device=torch.device("cpu"))
    >>> cells.tolist(), leftover.tolist()
    ([[0, 1, 5, 6], [2, 3, 7, 8]], [4, 9])
    ```
    """
    # A compiled graph folds the table into its constants; a table from outside would be one more graph input. Under
    # a mode such as FakeTensorMode tensors are of its own kind, which must not meet those from outside.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _build_cell_grid(height, width, sx, sy, device)
    return _cached_cell_grid(height, width, sx, sy, device)


def _build_cell_grid(
    height: int, width: int, sx: int, sy: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = height // sy, width // sx
    tokens = torch.arange(height * width, device=device).view(height, width)
    covered = tokens[: rows * sy, : columns * sx]
    cells = covered.reshape(rows, sy, columns, sx).transpose(1, 2).reshape(rows * columns, sy * sx)
    leftover = torch.cat([tokens[: rows * sy, columns * sx :].flatten(), tokens[rows * sy :].flatten()])
    return cells, leftover


_cached_cell_grid = lru_cache(maxsize=64)(_build_cell_grid)


def mix_key(key: torch.Tensor, seed: int) -> torch.Tensor:
    """
    Make keys that differ from those of other seeds.

    Args:
        key (`torch.Tensor` of shape `(P,)`): What choices vary with, int64 (the timestep).
        seed (`int`): What they vary with besides, the same for all keys (the user's seed and the layer).

    Returns:
        `torch.Tensor` of shape `(P,)`: The mixed keys, int64.

    Examples:

    ```python
    >>> import torch
    >>> mix_key(torch.tensor([981]), seed=0).shape
    torch.Size([1])
    ```
    """
    return key + _hash(seed)


def random_members(cells: int, cell_size: int, key: torch.Tensor) -> torch.Tensor:
    """
    A pseudo-random member of every cell, by an integer hash: without state, the same on every device, and the same
    for a sample whatever else is in its batch.

    Args:
        cells (`int`): Number of cells, `D`.
        cell_size (`int`): Members of a cell.
        key (`torch.Tensor` of shape `(P,)`): What the choice varies with besides the cell, int64, from `mix_key`.

    Returns:
        `torch.Tensor` of shape `(P, D)`: Members in `[0, cell_size)`, int64.

    Examples:

    ```python
    >>> import torch
    >>> random_members(4, 4, mix_key(torch.tensor([981]), seed=0)).shape
    torch.Size([1, 4])
    ```
    """
    cell = torch.arange(cells, device=key.device)
    mixed = _hash(_hash(key).unsqueeze(1) + cell)
    # The high bits are the better mixed ones, and a multiplication has less bias than a remainder.
    return ((mixed >> 8) * cell_size) >> 24


def _hash(x: _Integers) -> _Integers:
    """A 32-bit integer mixer (xor-shift and multiply, after C. Wellons, `lowbias32`), held in int64."""
    x = x & 0xFFFFFFFF
    x = x ^ (x >> 16)
    # Both multipliers are below 2**31, so that the product of 32-bit values stays inside int64.
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def partition_tokens(cells: torch.Tensor, leftover: torch.Tensor, member: torch.Tensor | None = None) -> Partition:
    """
    Make one member of each cell its destination and every other token a source.

    Args:
        cells (`torch.Tensor` of shape `(D, K)`): Token indices of every cell's members, from `cell_grid`.
        leftover (`torch.Tensor` of shape `(L,)`): Token indices outside all cells, from `cell_grid`.
        member (`torch.Tensor` of shape `(P, D)`, *optional*): The chosen member of each cell; its top-left one if
            not given.

    Returns:
        `Partition`: With `P = 1` if no member was given.

    Examples:

    ```python
    >>> import torch
    >>> cells, leftover = cell_grid(2, 3, sx=2, sy=2, device=torch.device("cpu"))
    >>> partition_tokens(cells, leftover)
    Partition(dst=tensor([[0]]), src=tensor([[1, 3, 4, 2, 5]]))
    ```
    """
    if member is None:
        dst, others = cells[:, 0].unsqueeze(0), cells[:, 1:].reshape(1, -1)
    else:
        size = cells.shape[1]
        turn = torch.arange(size, device=cells.device)
        turned = cells.expand(member.shape[0], -1, -1).gather(2, (member.unsqueeze(2) + turn) % size)
        dst, others = turned[:, :, 0], turned[:, :, 1:].flatten(1)
    return Partition(dst, torch.cat([others, leftover.expand(dst.shape[0], -1)], dim=1))


def random_partition(height: int, width: int, sx: int, sy: int, key: torch.Tensor) -> Partition:
    """
    Make a pseudo-random member of each cell its destination, see `random_members`, and every other token a source.

    Args:
        height (`int`): Rows of tokens.
        width (`int`): Columns of tokens.
        sx (`int`): Cell width.
        sy (`int`): Cell height.
        key (`torch.Tensor` of shape `(P,)`): What the choice varies with besides the cell, int64, from `mix_key`.

    Returns:
        `Partition`: On the device of `key`.

    Examples:

    ```python
    >>> import torch
    >>> partition = random_partition(4, 5, sx=2, sy=2, key=mix_key(torch.tensor([981]), seed=0))
    >>> partition.dst.shape, partition.src.shape
    (torch.Size([1, 4]), torch.Size([1, 16]))
    ```
    """
    if has_kernels(key, (torch.int64,)):
        return Partition(*torch.ops.agentsd.random_partition(key, height, width, sx, sy))
    cells, leftover = cell_grid(height, width, sx, sy, key.device)
    return partition_tokens(cells, leftover, random_members(cells.shape[0], cells.shape[1], key))
