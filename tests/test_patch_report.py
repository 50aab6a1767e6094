"""The report of a patch: sizes, and operations before and after."""

import pytest
import torch
from models import tiny_controlnet, tiny_sd

import agentsd
from agentsd.models.unet import find_layers


def test_without_a_patch_it_says_what_to_do(unet):
    with pytest.raises(ValueError, match="apply_patch"):
        agentsd.report(unet)


def test_sizes_are_known_once_given_or_seen(unet):
    agentsd.apply_patch(unet, max_downsample=8)
    assert all(row.tokens is None for row in agentsd.report(unet).rows)
    text = torch.zeros(2, 77, unet.config.cross_attention_dim)
    unet(torch.zeros(2, unet.config.in_channels, 17, 21), 900, text)
    seen = agentsd.report(unet).rows
    given = agentsd.report(unet, height=17 * 8, width=21 * 8).rows
    assert seen == given
    assert seen[0].tokens == 17 * 21
    assert {row.level for row in seen} == set(range(max(layer.level for layer in find_layers(unet)) + 1))


def test_operations_of_attention_and_matching_are_counted(unet):
    """512² in SD 1.5: agents need 7.5 % of the operations and 2.9 % for matching, ToMe 36 % and 9.4 %."""
    row = agentsd.report(agentsd.apply_patch(unet, ratio=0.4), 512, 512).rows[0]
    before = 4 * 4096**2 * row.channels
    assert row.attention_flops == before
    assert row.phases["agent"].attention_flops / before == pytest.approx(0.075 + 0.0293, rel=2e-3)
    assert row.phases["tome"].attention_flops / before == pytest.approx(0.36 + 0.09375, rel=2e-3)


def test_it_prints_as_a_table(unet):
    """A header, and a line for each phase of each layer, of which the first names the layer."""
    report = agentsd.report(agentsd.apply_patch(unet, ratio=0.4, max_downsample=1), 512, 512)
    header, agent, tome, *_ = lines = str(report).splitlines()
    assert header.split() == "layer level channels heads tokens phase merged keys agents attention GFLOPs".split()
    assert len(lines) == 2 + 2 * len(report.rows)
    first = report.rows[0]
    cells = [f"unet.{first.name}", "0", str(first.channels), str(first.heads), "4096", "agent", "2458", "2458", "256"]
    before = f"{first.attention_flops / 1e9:.3g}"
    after = [f"{first.phases[name].attention_flops / 1e9:.3g}" for name in ("agent", "tome")]
    assert agent.split() == [*cells, before, "->", after[0]]
    assert tome.split() == ["tome", "2458", "2458", "-", before, "->", after[1]]


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, None),
        ({"match_interval": 1}, "matching: in every step"),
        ({"match_interval": 3}, "matching: in 1 step of 3; the others merge as it did"),
        ({"match_interval": 1, "reuse": 2}, "matching: in every step that runs the whole UNet; the others"),
        ({"match_interval": 2, "reuse": 3}, "matching: in 1 step of 2 that run the whole UNet; the others"),
        ({"share_matches": "block"}, "matching: in every step, once for the layers of a block"),
        ({"share_matches": "level", "reuse": 2}, "matching: in every step, once for the layers of a level\n"),
        (
            {"share_matches": "block", "match_interval": 1, "reuse": 2},
            "matching: in every step that runs the whole UNet, once for the layers of a block; the others",
        ),
    ],
)
def test_it_says_which_steps_match_tokens(unet, options, said):
    text = str(agentsd.report(agentsd.apply_patch(unet, **options)))
    assert said in text if said else "matching" not in text


def test_layers_that_are_left_alone_stand_in_their_columns(unet):
    """Also where there are no others."""
    header, *lines, _ = str(agentsd.report(agentsd.apply_patch(unet, min_tokens=10_000), 512, 512)).splitlines()
    assert {line.index("4096") for line in lines} == {header.index("tokens")}
    assert {line.index("skipped: it has 4096 tokens") for line in lines} == {header.index("phase")}


@pytest.mark.parametrize(
    "options, tokens, said",
    [({}, 2016, True), ({}, 2048, False), ({"ratio": 0}, 2016, False), ({"min_tokens": "auto"}, 2016, False)],
)
def test_it_says_where_merging_does_not_pay(unet, options, tokens, said):
    """Next to the speed-up by operations, which does not know that; on a CPU, below 2,048 tokens."""
    report = agentsd.report(agentsd.apply_patch(unet, **options), 32 * 8, tokens // 32 * 8)
    assert report.rows[0].tokens == tokens
    assert report.break_even == report.to_dict()["break_even"] == 2048
    last = str(report).splitlines()[-1]
    assert "x at most" in last
    assert ("fewer than 2048 tokens gain little" in last) is said


def test_merging_elsewhere_leaves_attention_as_it_is(unet):
    row = agentsd.report(agentsd.apply_patch(unet, merge_attn=False, merge_mlp=True), 512, 512).rows[0]
    assert {phase.attention_flops for phase in row.phases.values()} == {row.attention_flops}


def test_a_phase_whose_cells_find_no_room_leaves_attention_as_it_is(unet):
    row = agentsd.report(agentsd.apply_patch(unet), height=3 * 8, width=512).rows[0]
    assert row.phases["agent"].attention_flops == row.attention_flops
    assert row.phases["tome"].attention_flops < row.attention_flops


def test_a_controlnet_is_reported_by_its_own_patch(unet):
    pipe = tiny_sd()
    pipe.controlnet = tiny_controlnet(pipe.unet)
    agentsd.apply_patch(pipe, ratio=0.2)
    agentsd.apply_patch(pipe.controlnet, ratio=0.5, sx=2, sy=2)
    rows = {row.model: row for row in agentsd.report(pipe, 512, 512).rows}
    assert rows["unet"].phases["tome"].merged_tokens == 4096 - int(4096 * 0.2)
    assert rows["controlnet"].phases["all steps"].merged_tokens == 4096 // 2
    assert "all steps" in str(agentsd.report(pipe, 512, 512))


@pytest.mark.parametrize("size", [{"height": 512}, {"width": 512}, {"height": 7, "width": 512}])
def test_its_size_is_checked(unet, size):
    with pytest.raises(ValueError, match="height"):
        agentsd.report(agentsd.apply_patch(unet), **size)


def test_the_smallest_image_has_one_token(unet):
    assert agentsd.report(agentsd.apply_patch(unet), height=8, width=8).rows[0].tokens == 1


@pytest.mark.parametrize(
    "branch, running",
    [
        (0, ["up_blocks.2.resnets.1", "up_blocks.2.attentions.1"]),
        (1, ["down_blocks.0.resnets", "down_blocks.0.attentions", "up_blocks.2"]),
    ],
)
def test_it_says_which_steps_are_full_and_what_the_others_run(unet, branch, running):
    agentsd.apply_patch(unet, reuse=agentsd.FeatureReuseConfig(3, branch=branch))
    report = agentsd.report(unet)
    assert str(report).splitlines()[-1] == report.reuse == report.to_dict()["reuse"]
    assert "1 step of 3 runs the whole UNet" in report.reuse
    assert report.reuse.endswith("is forecast")
    names = report.reuse.split("the others run ")[1].split(", and what")[0].split(", ")
    assert set(names) == {"conv_in", "time_embedding", *running, "conv_norm_out", "conv_out"}
    assert agentsd.report(agentsd.apply_patch(unet)).reuse is None


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["agent", "tome"]),
        ({"agent_until": 1}, ["agent"]),
        ({"agent_until": 0}, ["tome"]),
        ({"preset": "balanced", "min_tokens": 0}, ["kv-merged"]),
        ({"preset": "fast", "min_tokens": 0}, ["kv-merged"]),
        ({"preset": "agent"}, ["all steps"]),
    ],
    ids=str,
)
def test_it_has_the_phases_that_some_step_is_in(unet, options, names):
    """Whether the size is known or not."""
    agentsd.apply_patch(unet, **options)
    for report in (agentsd.report(unet), agentsd.report(unet, 128, 128)):
        assert all(list(row.phases) == (names if row.tokens else []) for row in report.rows)
        printed = {name for line in str(report).splitlines() for name in line.split() if name in ("agent", "tome")}
        assert printed == {"agent", "tome"}.intersection(names)
