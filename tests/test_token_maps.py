"""Drawings of what was merged: what has a colour, where dots are, and that recording changes nothing."""

import numpy as np
import PIL.Image
import pytest
import torch
from models import tiny_sd
from runs import EARLY, LATE, run

import agentsd
from agentsd.token_maps import TokenMap, draw_map, recorded_maps


def test_only_merged_tokens_are_tinted():
    groups = np.array([[0, 0, 1], [2, 3, 0]])
    drawing = np.asarray(draw_map(TokenMap(groups), PIL.Image.new("RGB", (24, 16), "white"), side=30))
    assert drawing.shape == (20, 30, 3)
    cells = drawing.reshape(2, 10, 3, 10, 3)
    assert all(len(np.unique(cells[row, :, column].reshape(-1, 3), axis=0)) == 1 for row, column in np.ndindex(2, 3))
    is_white = (cells[:, 0, :, 0] == 255).all(axis=-1)
    np.testing.assert_array_equal(is_white, groups != 0)
    assert len(np.unique(cells[[0, 0, 1], 0, [0, 1, 2], 0], axis=0)) == 1


def test_groups_differ_in_colour():
    drawing = np.asarray(draw_map(TokenMap(np.repeat(np.arange(8), 2)[None]), PIL.Image.new("RGB", (16, 1)), side=16))
    assert len(np.unique(drawing.reshape(-1, 3), axis=0)) == 8


def test_agents_are_dots_at_their_tokens():
    empty = np.arange(16).reshape(4, 4)
    image = PIL.Image.new("RGB", (32, 32), "red")
    drawing = np.asarray(draw_map(TokenMap(empty, np.array([[1, 2]])), image, side=64))
    rows, columns = np.nonzero((drawing == 255).all(axis=-1))
    assert rows.min() >= 16 and rows.max() < 32
    assert columns.min() >= 32 and columns.max() < 48
    assert abs(rows.mean() - 23.5) < 1 and abs(columns.mean() - 39.5) < 1


def test_recording_changes_nothing_and_leaves_no_hook():
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0.5)

    def draw():
        return np.asarray(pipe("red", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])

    before = draw()
    with recorded_maps(pipe) as maps:
        np.testing.assert_array_equal(draw(), before)
    count = len(maps)
    assert count == 2 * len(agentsd.report(pipe).rows)
    draw()
    assert len(maps) == count


def test_what_is_merged_beside_attention_is_recorded_too():
    """Without merged self-attention there are no agents."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0.5, merge_attn=False, merge_mlp=True)
    with recorded_maps(pipe) as maps:
        pipe("red", num_inference_steps=1)
    assert len(maps) == len(agentsd.report(pipe).rows)
    assert all(len(np.unique(token_map.groups)) < token_map.groups.size for token_map in maps.values())
    assert all(token_map.agents is None for token_map in maps.values())


@pytest.mark.parametrize(("timesteps", "has_agents"), [((EARLY, LATE), False), ((LATE, EARLY), True)])
def test_the_last_sample_is_drawn_where_samples_are_at_different_steps(unet, timesteps, has_agents):
    unet = agentsd.apply_patch(unet, ratio=0.5)
    with recorded_maps(unet) as maps:
        run(unet, torch.tensor(timesteps))
    assert maps
    assert {token_map.agents is not None for token_map in maps.values()} == {has_agents}


def test_merged_keys_are_recorded_where_nothing_else_is_merged():
    """Those of the last sample, as many as the report says."""
    pipe = agentsd.apply_patch(tiny_sd(), agent_until=0, late_phase="kv-merged", kv_ratio=0.5)
    with recorded_maps(pipe) as maps:
        pipe("red", num_inference_steps=1)
    rows = {row.name: row for row in agentsd.report(pipe).rows}
    assert len(maps) == len(rows)
    for (layer, _), token_map in maps.items():
        keys = rows[layer.removeprefix("unet.")].phases["kv-merged"].keys
        assert len(np.unique(token_map.groups)) == keys < token_map.groups.size
        assert token_map.caption == f"{token_map.groups.size:,} tokens, their keys and values merged to {keys:,}"


def test_an_unpatched_model_has_no_maps():
    pipe = tiny_sd()
    with recorded_maps(pipe) as maps:
        pipe("red", num_inference_steps=1)
    assert maps == {}
