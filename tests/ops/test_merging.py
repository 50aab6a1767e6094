"""Match, merge and unmerge against plain float64 loops, and their properties on arbitrary input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import layouts, make_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from agentsd.ops.merging import (
    Merging,
    match_tokens,
    merge_tokens,
    merged_sizes,
    plan_merging,
    take_tokens,
    unmerge_tokens,
)
from agentsd.ops.partitioning import Partition


def make_merging(x, partition, count) -> Merging:
    return plan_merging(partition, match_tokens(x, partition), count)


def reference_merge(x, partition, count):
    """Merging written as loops over tokens, in float64: the mean of each group, and the group of each token."""
    x = x.double()
    merged, owner = [], []
    for b in range(len(x)):
        dst = partition.dst.expand(len(x), -1)[b].tolist()
        src = partition.src.expand(len(x), -1)[b].tolist()
        unit = x[b] / x[b].norm(dim=1, keepdim=True).clamp_min(1e-6)
        best = {s: max((float(unit[s] @ unit[d]), -i) for i, d in enumerate(dst)) for s in src}
        chosen = sorted(src, key=lambda s: best[s][0], reverse=True)[:count]
        groups = {d: [d] for d in dst}
        for s in chosen:
            groups[dst[-best[s][1]]].append(s)
        groups.update({s: [s] for s in src if s not in chosen})
        merged.append({head: x[b, members].mean(0) for head, members in groups.items()})
        owner.append({token: head for head, members in groups.items() for token in members})
    return merged, owner


@pytest.mark.parametrize("shape", [(1, 8, 8, 2, 2), (3, 9, 7, 4, 2), (2, 12, 5, 3, 4)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("use_rand", [True, False])
def test_merge_and_unmerge_agree_with_loops_in_float64(shape, share, use_rand):
    batch, height, width, sx, sy = shape
    x = torch.randn(batch, height * width, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    partition = make_partition(height, width, sx, sy, keys=range(batch), use_rand=use_rand)
    count = max(1, int(partition.src.shape[1] * share))
    expected, owner = reference_merge(x, partition, count)

    merging = make_merging(x, partition, count)
    restored = unmerge_tokens(merge_tokens(x, merging), merging)
    assert merge_tokens(x, merging).shape == (batch, height * width - count, 6)
    for b in range(batch):
        for token in range(height * width):
            wanted = expected[b][owner[b][token]]
            torch.testing.assert_close(restored[b, token], wanted)


@given(layouts, st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None)
def test_merging_keeps_the_sum_and_unmerging_restores_what_was_not_merged(layout, share, seed):
    """The mean of each group times its size is the group's sum, so nothing is lost or counted twice."""
    height, width, sx, sy = layout
    x = torch.randn(2, height * width, 3, generator=torch.Generator().manual_seed(seed))
    partition = make_partition(height, width, sx, sy)
    count = int(partition.src.shape[1] * share)
    merging = make_merging(x, partition, count)
    merged = merge_tokens(x, merging)
    sizes = torch.ones(merged.shape[:2])
    sizes[:, merged.shape[1] - merging.size.shape[1] :] = merging.size
    torch.testing.assert_close((merged * sizes.unsqueeze(2)).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)

    restored = unmerge_tokens(merged, merging)
    alone = merging.members[:, : merged.shape[1] - merging.size.shape[1]]
    assert torch.equal(take_tokens(restored, alone), take_tokens(x, alone))
    assert torch.equal(
        merging.position.sort(1).values.diff(dim=1).clamp(max=1).sum(1), torch.tensor([merged.shape[1] - 1] * 2)
    )


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16_by_default")
def test_many_tokens_of_a_cell_are_counted_exactly():
    partition = Partition(dst=torch.tensor([[0]]), src=torch.arange(1, 1000).unsqueeze(0))
    merging = make_merging(torch.ones(1, 1000, 4), partition, 999)
    assert merging.size.item() == 1000
    assert merging.size.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten(output)[0] if isinstance(x, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(x.nbytes for x in tensors)])
        return output


def test_many_tokens_are_matched_a_few_at_a_time():
    """All similarities of a 2048 pixel image, held at once, would take gigabytes."""
    x = torch.randn(2, 64 * 64, 8, generator=torch.Generator().manual_seed(0))
    partition = make_partition(64, 64, 2, 2, keys=(981, 41))
    with LargestTensor() as largest:
        matches = match_tokens(x, partition)
    all_at_once = 2 * 3072 * 1024 * 4
    assert largest.nbytes < 0.7 * all_at_once

    unit = torch.nn.functional.normalize(x.double(), dim=2)
    for b in range(2):
        expected = (unit[b, partition.src[b]] @ unit[b, partition.dst[b]].T).max(dim=1)
        assert torch.equal(matches.cell[b], expected.indices)
        torch.testing.assert_close(matches.score[b].double(), expected.values, rtol=1e-5, atol=1e-5)


def test_equal_tokens_merge_without_change():
    """Merging what is redundant must cost nothing: this is the promise of the method."""
    patches = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    x = patches.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, 16, 5)
    merging = make_merging(x, make_partition(4, 4, 2, 2), 12)
    torch.testing.assert_close(unmerge_tokens(merge_tokens(x, merging), merging), x)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), kinds=st.integers(1, 9), share=st.floats(0, 1))
def test_attention_to_equal_tokens_merged_and_weighed_is_attention_to_all(seed, kinds, share):
    """Whichever of them are merged."""
    numbers = torch.Generator().manual_seed(seed)
    # Of each kind, one is a destination.
    kind = torch.cat([torch.arange(kinds), torch.randint(kinds, (40,), generator=numbers)])
    x = torch.randn(kinds, 8, generator=numbers, dtype=torch.float64)[kind].unsqueeze(0)
    q, to_k, to_v = (
        torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in ((1, 5, 8), (8, 8), (8, 8))
    )
    tokens = torch.arange(len(kind)).unsqueeze(0)
    merging = make_merging(x, Partition(tokens[:, :kinds], tokens[:, kinds:]), round(40 * share))
    merged, sizes = merge_tokens(x, merging), merged_sizes(merging)
    assert sizes.sum() == len(kind)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, x @ to_k, x @ to_v)
    got = attend(q, merged @ to_k, merged @ to_v, sizes.log().double().unsqueeze(1))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_and_tiny_tokens_give_no_nan(dtype):
    x = torch.zeros(1, 16, 4, dtype=dtype)
    x[:, 3] = 1e-7
    merging = make_merging(x, make_partition(4, 4, 2, 2), 6)
    assert merge_tokens(x, merging).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_of_zeros_is_like_no_other(dtype):
    """Neither as a destination, which would draw all sources, nor as a source."""
    metric = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]]], dtype=dtype)
    matches = match_tokens(metric, Partition(dst=torch.tensor([[0, 1]]), src=torch.tensor([[2, 3]])))
    assert matches.cell[0, 0] == 1
    assert matches.score.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_half_precision_tokens_are_exact_to_rounding(dtype):
    """Adding hundreds of bfloat16 values one by one in bfloat16 stops growing at 256."""
    x = torch.full((1, 1024, 2), 1.0, dtype=dtype)
    merging = make_merging(x, make_partition(32, 32, 32, 32), 1023)
    assert torch.equal(merge_tokens(x, merging), torch.ones(1, 1, 2, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 3])
def test_as_many_threads_as_there_are_add_in_one_order(batch):
    """Another order rounds otherwise, and the same seed would give another image now and then."""
    x = torch.randn(batch, 64 * 64, 64, generator=torch.Generator().manual_seed(0))
    merging = make_merging(x, make_partition(64, 64, 4, 4), 3000)
    expected = merge_tokens(x, merging)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        merged = [merge_tokens(x, merging) for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, expected) for one in merged)


def test_gradients_pass_through_merge_and_unmerge():
    x = torch.randn(2, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    merging = make_merging(x, make_partition(4, 4, 2, 2), 5)
    weights = torch.randn(2, 16, 3, dtype=torch.float64)
    (unmerge_tokens(merge_tokens(x, merging), merging) * weights).sum().backward()
    gradient = x.grad.clone()

    matrix = torch.zeros(2, 16, 16, dtype=torch.float64)
    for b in range(2):
        for n in range(16):
            matrix[b, n] = (merging.position[b] == merging.position[b, n]).double()
    matrix /= matrix.sum(2, keepdim=True)
    torch.testing.assert_close(gradient, matrix.transpose(1, 2) @ weights)
