"""
Token merging: match, merge, unmerge. Pure functions of tensors, after Bolya & Hoffman, *Token Merging for Fast Stable
Diffusion* (arXiv:2303.17604).

Shapes: `B` batch, `N = height * width` tokens, `C` channels, `D` destination tokens (one a cell), `S = N - D` source
tokens, `M` tokens after merging. Token indices are int64. `P` is `B`, or 1 where the whole batch shares one partition.

On an NVIDIA GPU, `plan_merging` and, in half precision and without derivatives, `match_tokens`, `merge_tokens` and
`unmerge_tokens` are kernels of `kernels.py`, if Triton works there.
"""

from typing import NamedTuple

import torch

from .dispatch import has_kernels
from .partitioning import Partition


# What the similarities held at a time may take: on a CPU little enough for its allocator to use the same memory again;
# elsewhere enough to keep many cores busy with few launches.
_CPU_SIMILARITY_BYTES = 16 * 2**20
_SIMILARITY_BYTES = 256 * 2**20

# Of a sample's tokens. The kernels that plan and merge compare each with many others: on an H100 they were no slower
# than torch's functions for up to 16384 tokens, and slower for 65536. (To plan where nothing is left to choose takes
# longer at any number, but one launch in place of twelve.)
_KERNEL_TOKENS = 16384


class Matches(NamedTuple):
    """
    The destination most similar to each source.

    Args:
        cell (`torch.Tensor` of shape `(B, S)`): The cell whose destination is nearest, int64.
        score (`torch.Tensor` of shape `(B, S)`): Their cosine similarity, at least float32.
    """

    cell: torch.Tensor
    score: torch.Tensor


class Merging(NamedTuple):
    """
    How `N` tokens become `M`: the first `M - D` merged tokens are the sources kept as they are, the last `D` the means
    of each cell's destination and the sources merged into it.

    Args:
        members (`torch.Tensor` of shape `(B, M)`): Token index of every kept source, then of every destination.
        merged (`torch.Tensor` of shape `(B, R)`): Token indices of the sources that are merged away.
        target (`torch.Tensor` of shape `(B, R)`): Position in the merged sequence that each of them goes to.
        size (`torch.Tensor` of shape `(B, D)`): Number of tokens averaged in each cell, float32.
        position (`torch.Tensor` of shape `(B, N)`): Position in the merged sequence that represents each token.
    """

    members: torch.Tensor
    merged: torch.Tensor
    target: torch.Tensor
    size: torch.Tensor
    position: torch.Tensor


@torch.no_grad()
def match_tokens(metric: torch.Tensor, partition: Partition) -> Matches:
    """
    Find the most similar destination of every source, by cosine similarity. No gradient flows through the choice.

    Args:
        metric (`torch.Tensor` of shape `(B, N, C)`): What similarity is measured on.
        partition (`Partition`): The sources and destinations.

    Returns:
        `Matches`: A token of zero norm has similarity 0 to all others.

    Examples:

    ```python
    >>> import torch
    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> match_tokens(metric, Partition(dst=torch.tensor([[0, 1]]), src=torch.tensor([[2]])))
    Matches(cell=tensor([[1]]), score=tensor([[1.]]))
    ```
    """
    if has_kernels(metric):
        return Matches(*torch.ops.agentsd.match_tokens(metric, partition.dst, partition.src))
    # The nearest destination does not depend on the length of the source, so that only the destinations are
    # normalised, and of the sources only the scores.
    dst = take_tokens(metric, partition.dst)
    # In float32, since the inverse norm of an all but empty token exceeds the range of float16.
    dst = (dst * _inverse_norm(dst).unsqueeze(2)).to(metric.dtype)
    # A few sources at a time: all similarities at once would be the largest tensor of the model.
    room = _CPU_SIMILARITY_BYTES if dst.device.type == "cpu" else _SIMILARITY_BYTES
    rows = max(1, room // (dst.shape[0] * dst.shape[1] * dst.element_size()))
    cells, scores = [], []
    for index in partition.src.split(rows, dim=1):
        src = take_tokens(metric, index)
        score, cell = (src @ dst.transpose(1, 2)).max(dim=2)
        cells.append(cell)
        scores.append(score * _inverse_norm(src))
    return Matches(torch.cat(cells, dim=1), torch.cat(scores, dim=1))


def _inverse_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x.dtype)).clamp_min(1e-6).reciprocal()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to sum in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def plan_merging(partition: Partition, matches: Matches, count: int) -> Merging:
    """
    Choose the sources to merge away: those with the highest scores.

    Args:
        partition (`Partition`): The sources and destinations.
        matches (`Matches`): The nearest destination of every source.
        count (`int`): How many sources to merge away, `R`; all of them at most.

    Returns:
        `Merging`: With `M = N - R`.

    Examples:

    ```python
    >>> import torch
    >>> partition = Partition(dst=torch.tensor([[0]]), src=torch.tensor([[1, 2]]))
    >>> matches = Matches(cell=torch.tensor([[0, 0]]), score=torch.tensor([[0.2, 0.9]]))
    >>> merging = plan_merging(partition, matches, count=1)
    >>> merging.members.tolist(), merging.merged.tolist(), merging.position.tolist()
    ([[1, 0]], [[2]], [[1, 0, 1]])
    ```
    """
    batch, sources = matches.cell.shape
    if count > 0 and sources <= _KERNEL_TOKENS and has_kernels(matches.score, (torch.float32,)):
        return Merging(*torch.ops.agentsd.plan_merging(partition.src, partition.dst, *matches, count))
    src, dst = partition.src.expand(batch, -1), partition.dst.expand(batch, -1)
    kept_count = sources - count
    if kept_count == 0:
        kept, merged, cell = src[:, :0], src, matches.cell
    else:
        chosen = matches.score.topk(count, dim=1, sorted=False).indices
        merged, cell = src.gather(1, chosen), matches.cell.gather(1, chosen)
        is_kept = torch.ones_like(src).scatter(1, chosen, 0)
        # The running count numbers the kept sources; the others are all written to one place past the end.
        slot = torch.where(is_kept.bool(), is_kept.cumsum(1) - 1, kept_count)
        kept = src.new_zeros(batch, kept_count + 1).scatter(1, slot, src)[:, :kept_count]
    members = torch.cat([kept, dst], dim=1)
    target = cell + kept_count
    # Whatever the default dtype is: bfloat16 cannot count beyond 256.
    size = torch.ones(dst.shape, dtype=torch.float32, device=dst.device)
    size = size.scatter_add(1, cell, torch.ones(cell.shape, dtype=torch.float32, device=dst.device))
    slots = torch.arange(members.shape[1], device=dst.device).expand(batch, -1)
    position = torch.empty(batch, sources + dst.shape[1], dtype=torch.int64, device=dst.device)
    position = position.scatter(1, torch.cat([members, merged], dim=1), torch.cat([slots, target], dim=1))
    return Merging(members, merged, target, size, position)


def merge_tokens(x: torch.Tensor, merging: Merging) -> torch.Tensor:
    """
    Average every merged token into its representative.

    Args:
        x (`torch.Tensor` of shape `(B, N, C)`): The tokens.
        merging (`Merging`): What to merge.

    Returns:
        `torch.Tensor` of shape `(B, M, C)`: The merged tokens, in the dtype of `x`; summed at least in float32.

    Examples:

    ```python
    >>> import torch
    >>> partition = Partition(dst=torch.tensor([[0]]), src=torch.tensor([[1, 2]]))
    >>> matches = Matches(cell=torch.tensor([[0, 0]]), score=torch.tensor([[0.2, 0.9]]))
    >>> merging = plan_merging(partition, matches, count=1)
    >>> merge_tokens(torch.tensor([[[1.0], [5.0], [3.0]]]), merging)
    tensor([[[5.],
             [2.]]])
    ```
    """
    if merging.merged.shape[1] <= _KERNEL_TOKENS and has_kernels(x):
        return torch.ops.agentsd.merge_tokens(x, merging.members, merging.merged, merging.target, merging.size)
    channels, cells = x.shape[2], merging.size.shape[1]
    kept = merging.members.shape[1] - cells
    wide = _wide(x.dtype)
    sums = take_tokens(x, merging.members[:, kept:]).to(wide)
    rows = sums.view(-1, channels)
    addends = take_tokens(x, merging.merged).to(wide).view(-1, channels)
    index = _in_flat_view(merging.target - kept, cells)
    # Of the two that do the same, the one that always adds in the same order, so that a seed has one image: the other
    # adds from several threads at once, `index_put_` on a CPU (much slower, too), `scatter_add_` on a GPU.
    if x.device.type == "cpu":
        rows.scatter_add_(0, index.unsqueeze(1).expand(-1, channels), addends)
    else:
        rows.index_put_((index,), addends, accumulate=True)
    means = (sums / merging.size.unsqueeze(2)).to(x.dtype)
    return torch.cat([take_tokens(x, merging.members[:, :kept]), means], dim=1)


def merged_sizes(merging: Merging) -> torch.Tensor:
    """
    How many tokens each merged token stands for.

    Args:
        merging (`Merging`): What was merged.

    Returns:
        `torch.Tensor` of shape `(B, M)`: At least 1, float32.

    Examples:

    ```python
    >>> import torch
    >>> partition = Partition(dst=torch.tensor([[0]]), src=torch.tensor([[1, 2]]))
    >>> matches = Matches(cell=torch.tensor([[0, 0]]), score=torch.tensor([[0.2, 0.9]]))
    >>> merged_sizes(plan_merging(partition, matches, count=1))
    tensor([[1., 2.]])
    ```
    """
    kept = merging.members.shape[1] - merging.size.shape[1]
    return torch.cat([merging.size.new_ones(merging.size.shape[0], kept), merging.size], dim=1)


def unmerge_tokens(y: torch.Tensor, merging: Merging) -> torch.Tensor:
    """
    Give every token the value of its representative.

    Args:
        y (`torch.Tensor` of shape `(B, M, C)`): Merged tokens.
        merging (`Merging`): What was merged.

    Returns:
        `torch.Tensor` of shape `(B, N, C)`: One row a token, in the original order.

    Examples:

    ```python
    >>> import torch
    >>> partition = Partition(dst=torch.tensor([[0]]), src=torch.tensor([[1, 2]]))
    >>> matches = Matches(cell=torch.tensor([[0, 0]]), score=torch.tensor([[0.2, 0.9]]))
    >>> merging = plan_merging(partition, matches, count=1)
    >>> unmerge_tokens(torch.tensor([[[5.0], [2.0]]]), merging).flatten()
    tensor([2., 5., 2.])
    ```
    """
    if has_kernels(y):
        return torch.ops.agentsd.unmerge_tokens(y, merging.position)
    return take_tokens(y, merging.position)


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    Select tokens by index.

    Args:
        x (`torch.Tensor` of shape `(B, N, C)`): The tokens.
        index (`torch.Tensor` of shape `(P, K)`): Token indices of each sample, or of all samples alike.

    Returns:
        `torch.Tensor` of shape `(B, K, C)`: The selected tokens.

    Examples:

    ```python
    >>> import torch
    >>> take_tokens(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, 0]])).flatten()
    tensor([3., 1.])
    ```
    """
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    # Whole rows of a flat view: on the CPU several times faster than `gather` with an expanded index.
    batch, tokens, channels = x.shape
    return x.reshape(-1, channels).index_select(0, _in_flat_view(index, tokens)).view(batch, -1, channels)


def _in_flat_view(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Token indices `(B, K)` as places in a view of all samples' tokens, one sample after the other."""
    offsets = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + offsets).flatten()
