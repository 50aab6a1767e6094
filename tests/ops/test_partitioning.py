"""Cells, destinations and sources: properties on arbitrary input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import CPU, layouts, make_partition
from torch._subclasses import FakeTensor, FakeTensorMode

from agentsd.ops.partitioning import cell_grid, mix_key, random_members


@given(layouts)
@settings(deadline=None)
def test_cells_and_leftover_hold_every_token_once(layout):
    height, width, sx, sy = layout
    cells, leftover = cell_grid(height, width, sx, sy, CPU)
    assert cells.shape == ((height // sy) * (width // sx), sx * sy)
    assert sorted(cells.flatten().tolist() + leftover.tolist()) == list(range(height * width))
    for cell in cells.tolist():
        rows, columns = {token // width for token in cell}, {token % width for token in cell}
        assert (max(rows) - min(rows) + 1, max(columns) - min(columns) + 1) == (sy, sx)


def test_cells_of_fake_tensors_and_real_ones_do_not_mix():
    """Tables are kept; one made while shapes are found out with fake tensors is of no use afterwards, nor before."""
    for _ in range(2):
        with FakeTensorMode():
            assert {type(table) for table in cell_grid(7, 11, 2, 3, CPU)} == {FakeTensor}
        assert {type(table) for table in cell_grid(7, 11, 2, 3, CPU)} == {torch.Tensor}


@given(layouts, st.booleans(), st.integers(-(2**70), 2**70))
@settings(deadline=None)
def test_a_partition_has_one_destination_a_cell(layout, use_rand, seed):
    height, width, sx, sy = layout
    partition = make_partition(height, width, sx, sy, keys=(1, 2**31), seed=seed & 0xFFFFFFFF, use_rand=use_rand)
    cells, _ = cell_grid(height, width, sx, sy, CPU)
    for dst, src in zip(partition.dst.tolist(), partition.src.tolist(), strict=True):
        assert sorted(dst + src) == list(range(height * width))
        assert all(token in cell for token, cell in zip(dst, cells.tolist(), strict=True))


def test_without_randomness_the_top_left_member_is_the_destination():
    assert make_partition(4, 6, 3, 2, use_rand=False).dst.tolist() == [[0, 3, 12, 15]]


def test_random_members_are_uniform_and_independent_between_keys_seeds_and_cells():
    """A biased choice would sample some image positions more often than others at every step."""
    member = random_members(4096, 16, mix_key(torch.arange(64), seed=3))
    shares = torch.bincount(member.flatten(), minlength=16) / member.numel()
    assert shares.sub(1 / 16).abs().max() < 0.002
    for other in (
        member.roll(1, 0),
        member.roll(1, 1),
        member.roll(4, 1),
        random_members(4096, 16, mix_key(torch.arange(64), 4)),
    ):
        assert abs((member == other).float().mean().item() - 1 / 16) < 0.002


def test_random_members_of_a_key_do_not_depend_on_the_other_keys():
    both = random_members(64, 4, mix_key(torch.tensor([7, 981]), seed=0))
    assert torch.equal(both[1:], random_members(64, 4, mix_key(torch.tensor([981]), seed=0)))
