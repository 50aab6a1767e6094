"""
The Triton kernels in Triton's interpreter, on the CPU, against float64 and the functions of torch.

Run by `ops/test_kernels.py` in a process of its own: whether kernels are interpreted is settled as they are defined.
"""

import pytest
import torch
from torch import library

import agentsd.ops.operators  # noqa: F401  (registers the operators)
from agentsd.ops.merging import Matches, Merging, match_tokens, merge_tokens, plan_merging, unmerge_tokens
from agentsd.ops.partitioning import Partition, cell_grid, mix_key, partition_tokens, random_members, random_partition


OPERATORS = torch.ops.agentsd


def make_partition(height, width, samples, sx=2, sy=2):
    """With a random choice for each sample, or without one if there are no samples."""
    cells, leftover = cell_grid(height, width, sx, sy, torch.device("cpu"))
    key = mix_key(torch.arange(samples), seed=0)
    return partition_tokens(cells, leftover, random_members(len(cells), sx * sy, key) if samples else None)


def tokens_of(batch, count, channels, dtype=torch.float16):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def take(x, index):
    return x.gather(1, index.expand(len(x), -1).unsqueeze(2).expand(-1, -1, x.shape[2]))


def match(metric, partition):
    return Matches(*OPERATORS.match_tokens(metric, partition.dst, partition.src))


def merge(x, merging):
    return OPERATORS.merge_tokens(x, merging.members, merging.merged, merging.target, merging.size)


@pytest.mark.parametrize("sx, sy", [(2, 2), (4, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("height, width", [(17, 23), (8, 8), (9, 8), (8, 9), (4, 3)])
def test_partitions(height, width, sx, sy):
    """Just as torch makes them, with keys beyond 32 bits, too."""
    key = mix_key(torch.tensor([981, -5, 2**40 + 7]), seed=12345)
    expected = random_partition(height, width, sx, sy, key)
    got = OPERATORS.random_partition(key, height, width, sx, sy)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("scores", ["all different", "many equal", "all equal", "below zero"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("share", [0.01, 0.4, 1])
def test_plans(share, samples, scores):
    """The highest scores are merged away, the first of equals. More sources than are read at a time."""
    partition = make_partition(80, 80, samples)
    sources, cells = partition.src.shape[1], partition.dst.shape[1]
    numbers = torch.Generator().manual_seed(0)
    score = torch.rand(2, sources, generator=numbers) * 2 - 1
    score = {
        "many equal": (score * 4).round() / 4,
        "all equal": torch.zeros_like(score),
        "below zero": -score.abs(),
    }.get(scores, score)
    cell, count = torch.randint(cells, (2, sources), generator=numbers), int(share * sources)
    plan = Merging(*OPERATORS.plan_merging(partition.src, partition.dst, cell, score, count))
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    kept = torch.ones_like(cell).scatter(1, chosen, 0).nonzero()[:, 1].view(2, -1)
    src, dst = partition.src.expand(2, -1), partition.dst.expand(2, -1)
    target = cell.gather(1, chosen) + sources - count
    assert torch.equal(plan.members, torch.cat([src.gather(1, kept), dst], dim=1))
    assert torch.equal(plan.merged, src.gather(1, chosen))
    assert torch.equal(plan.target, target)
    assert torch.equal(
        plan.size, torch.stack([1 + row.bincount(minlength=cells) for row in target - sources + count]).float()
    )
    places = torch.cat([torch.arange(plan.members.shape[1]).expand(2, -1), target], dim=1)
    assert torch.equal(plan.position.gather(1, torch.cat([plan.members, plan.merged], dim=1)), places)


@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("size, channels", [((17, 23), 48), ((17, 23), 320), ((5, 7), 72), ((2, 2), 16)])
def test_matches(size, channels, samples):
    """Sources come in several tiles and so do channels; destinations do in the next test."""
    metric, partition = tokens_of(3, size[0] * size[1], channels), make_partition(*size, samples)
    unit = torch.nn.functional.normalize(metric.double(), dim=2)
    similarity = take(unit, partition.src) @ take(unit, partition.dst).transpose(1, 2)
    matches = match(metric, partition)
    best = similarity.max(dim=2)
    assert (matches.cell.dtype, matches.score.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(matches.score.double(), best.values, atol=1e-3, rtol=0)
    chosen = similarity.gather(2, matches.cell.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, best.values, atol=1e-5, rtol=0)


def test_matches_among_many_destinations():
    metric, partition = tokens_of(1, 1200, 16), make_partition(30, 40, 1)
    expected = match_tokens(metric.float(), partition)
    matches = match(metric, partition)
    assert torch.equal(matches.cell, expected.cell)
    torch.testing.assert_close(matches.score, expected.score, atol=1e-3, rtol=0)


def test_the_first_of_equal_destinations_is_the_nearest():
    """Also where the equals are in two tiles."""
    metric = torch.ones(1, 400, 16, dtype=torch.float16)
    metric[:, :7] = torch.eye(16)[:7].half()
    partition = Partition(dst=torch.arange(300).unsqueeze(0), src=torch.arange(300, 400).unsqueeze(0))
    matches = match(metric, partition)
    assert (matches.cell == 7).all()
    torch.testing.assert_close(matches.score, torch.ones(1, 100), atol=1e-3, rtol=0)


def test_a_token_of_zeros_is_like_no_other():
    metric = torch.zeros(1, 4, 16, dtype=torch.float16)
    metric[0, 1:3, 0] = torch.tensor([1.0, 2.0])
    matches = match(metric, Partition(dst=torch.tensor([[0, 1]]), src=torch.tensor([[2, 3]])))
    assert matches.cell[0, 0] == 1
    assert matches.score.tolist() == [[1.0, 0.0]]


def test_what_is_not_a_number_still_has_a_cell():
    """An image that overflowed is lost, but nothing may be read from outside of it."""
    metric = torch.full((1, 200, 16), float("nan"), dtype=torch.float16)
    metric[:, 100:] = float("inf")
    partition = Partition(dst=torch.arange(150).unsqueeze(0), src=torch.arange(150, 200).unsqueeze(0))
    cell = match(metric, partition).cell
    assert ((cell >= 0) & (cell < 150)).all()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("channels", [48, 520])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_merging_and_unmerging(samples, channels, share):
    x, partition = tokens_of(2, 7 * 9, channels), make_partition(7, 9, samples)
    merging = plan_merging(partition, match_tokens(x.float(), partition), int(share * partition.src.shape[1]))
    merged = merge(x, merging)
    torch.testing.assert_close(merged.double(), merge_tokens(x.double(), merging), atol=1e-6, rtol=1e-3)
    restored = OPERATORS.unmerge_tokens(merged, merging.position)
    assert torch.equal(restored, unmerge_tokens(merged, merging))


def test_many_tokens_become_one():
    """As in an image of one colour. More than are ordered at a time, and of each target in order."""
    x, partition = tokens_of(2, 18 * 18, 16), make_partition(18, 18, 2, sx=9, sy=9)
    cell = torch.randint(0, 2, partition.src.shape, generator=torch.Generator().manual_seed(0)) * 3
    merging = plan_merging(partition, Matches(cell, torch.ones(cell.shape)), cell.shape[1])
    expected = merge_tokens(x.double(), merging)
    torch.testing.assert_close(merge(x, merging).double(), expected, atol=1e-4, rtol=1e-3)


def test_bfloat16_is_merged_too():
    """Its products are beyond the interpreter; the interpreter also cuts off what it should round."""
    x, partition = tokens_of(2, 24, 16, torch.bfloat16), make_partition(4, 6, 1)
    merging = plan_merging(partition, match_tokens(x, partition), 10)
    merged = merge(x, merging)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), merge_tokens(x.double(), merging), atol=1e-3, rtol=2**-7)


def test_tensors_that_are_not_contiguous():
    metric = tokens_of(16, 63, 2).transpose(0, 2)
    partition = make_partition(7, 9, 0)
    assert not metric.is_contiguous() and not partition.dst.is_contiguous()
    matches = match(metric, partition)
    assert torch.equal(matches.cell, match(metric.contiguous(), partition).cell)
    merging = plan_merging(partition, matches, partition.src.shape[1])
    assert merging.merged.stride(0) == 0
    assert torch.equal(merge(metric, merging), merge_tokens(metric, merging))


def test_every_token_a_destination():
    x, partition = tokens_of(1, 6, 16), make_partition(2, 3, 1, sx=1, sy=1)
    merging = plan_merging(partition, match(x, partition), 0)
    assert torch.equal(merge(x, merging), x)


def test_operators_say_what_they_return():
    """To whatever works with tensors without values, as compilers do."""
    x, partition = tokens_of(2, 24, 16), make_partition(4, 6, 1)
    merging = plan_merging(partition, match_tokens(x, partition), 10)
    library.opcheck(OPERATORS.random_partition.default, (mix_key(torch.tensor([1]), 0), 4, 6, 2, 2))
    matches = match(x, partition)
    library.opcheck(OPERATORS.plan_merging.default, (partition.src, partition.dst, *matches, 10))
    library.opcheck(OPERATORS.match_tokens.default, (x, partition.dst, partition.src))
    library.opcheck(OPERATORS.merge_tokens.default, (x, *merging[:4]))
    library.opcheck(OPERATORS.unmerge_tokens.default, (merge_tokens(x, merging), merging.position))
