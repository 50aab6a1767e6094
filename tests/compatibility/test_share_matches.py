"""One match for several layers: which of them share it, and where each matches its own tokens all the same."""

import copy
import pickle

import pytest
import torch
from compat_models import image, with_unet
from diffusers import StableDiffusionControlNetPipeline
from graphs import Graphs
from models import tiny_controlnet, tiny_sd, tiny_sdxl, tiny_unet
from torch._dynamo.utils import counters

import agentsd
from agentsd.models.unet import find_layers
from agentsd.token_maps import recorded_maps

from .support import assert_differs, assert_no_trace, generate
from .test_compile import needs_graphs_of_several_blocks, small_unet, walk
from .test_match_interval import AGENTS, EVERYTHING, STEPS, TIMESTEPS, in_each_step, predictions
from .test_threads import assert_as_alone
from .test_training import assert_same_gradients, gradients


KEYS = {"late_phase": "kv-merged", "agent_until": 0}


# Three layers are patched: one in a down block, two in an up block, of which a step that skips runs the last one.
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [3] * 10),
        ({"share_matches": "block"}, [2] * 10),
        ({"share_matches": "level"}, [1] * 10),
        ({"share_matches": "block", "match_interval": 2}, [2, 0] * 5),
        ({"share_matches": "block", "reuse": 2}, [2, 1] * 5),
        ({"share_matches": "block", "reuse": 2, "match_interval": 1}, [2, 0] * 5),
        ({"share_matches": "level", "reuse": 3, "match_interval": 1}, [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
        ({"share_matches": "level", "max_downsample": 2}, [2] * 10),
        ({"share_matches": "level", "ratio": 0}, [0] * 10),
    ],
    ids=str,
)
def test_how_many_layers_match_in_each_step(matched, options, expected):
    pipe = agentsd.apply_patch(tiny_sd(), **AGENTS, **options)
    assert in_each_step(pipe, matched) == expected
    assert in_each_step(pipe, matched) == expected, "another image begins anew"


def test_all_blocks_of_a_transformer_share_one(matched):
    """Of SDXL, which has several in each: on the second level eight layers in a down, the middle and an up block."""
    for group, expected in ((None, 3 + 8), ("block", 2 + 3), ("level", 2)):
        pipe = agentsd.apply_patch(tiny_sdxl(), **AGENTS, max_downsample=2, share_matches=group)
        assert in_each_step(pipe, matched) == [expected] * STEPS


@pytest.mark.parametrize("group", ["block", "level"])
@pytest.mark.parametrize("options", [AGENTS, EVERYTHING, KEYS], ids=str)
def test_those_that_share_merge_alike(options, group):
    """Which are together is seen on maps, one a layer; layers that share nothing merge each in their own way."""
    unet = agentsd.apply_patch(tiny_unet(), **options, share_matches=group)
    with recorded_maps(unet) as maps:
        predictions(unet, TIMESTEPS[:1])
    down, first, second = (maps[layer.name, 0].groups for layer in find_layers(unet) if layer.level == 0)
    assert (first == second).all()
    assert (down == first).all() == (group == "level")


@pytest.mark.parametrize("options", [AGENTS, KEYS], ids=str)
def test_blocks_of_one_layer_have_nothing_to_share(options):
    """There it changes nothing, bit for bit; with more layers it does."""
    names = [layer.name for layer in find_layers(tiny_unet()) if layer.level == 0]
    one_each = {"filter_fn": lambda name, _: name in (names[0], names[1])}
    expected = generate(agentsd.apply_patch(tiny_sd(), **options, **one_each), num_inference_steps=STEPS)
    shared = agentsd.apply_patch(tiny_sd(), **options, share_matches="block", **one_each)
    assert torch.equal(generate(shared, num_inference_steps=STEPS), expected)
    plain, block = (
        generate(agentsd.apply_patch(tiny_sd(), **options, share_matches=group), num_inference_steps=STEPS)
        for group in (None, "block")
    )
    assert_differs(block, plain)


def test_the_same_seed_gives_the_same_image():
    """The second time, and after the patch was taken out and put back; nothing of it is left in the end."""
    pipe = tiny_sd()
    run = lambda: generate(pipe, num_inference_steps=STEPS)  # noqa: E731
    plain = run()
    agentsd.apply_patch(pipe, share_matches="block", match_interval=1, reuse=2)
    first = run()
    assert torch.equal(run(), first)
    with agentsd.patched(pipe, ratio=0.2):
        assert_differs(run(), first)
    assert torch.equal(run(), first)
    assert_no_trace(agentsd.remove_patch(pipe).unet)
    assert torch.equal(run(), plain)


def test_a_layer_at_another_size_matches_its_own_tokens(matched):
    """Where one layer of a block has fewer tokens than those before it."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, share_matches="block")
    last = [layer for layer in find_layers(unet) if layer.level == 0][-1].transformer
    half = lambda module, args: (torch.nn.functional.avg_pool2d(args[0], 2), *args[1:])  # noqa: E731
    twice = lambda module, args, output: (torch.nn.functional.interpolate(output[0], scale_factor=2),)  # noqa: E731
    last.register_forward_pre_hook(half, prepend=True)
    last.register_forward_hook(twice)
    predictions(unet, TIMESTEPS[:2])
    assert matched() == 2 * 3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_with_gradients_every_layer_matches(matched, checkpointing):
    timesteps = (900, 880, 100)
    expected = gradients(agentsd.apply_patch(tiny_unet(), **EVERYTHING).train(), timesteps)
    unet = agentsd.apply_patch(tiny_unet(), **EVERYTHING, share_matches="level").train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    matched()
    assert_same_gradients(gradients(unet, timesteps), expected)
    assert matched() >= 9
    predictions(unet, TIMESTEPS[:2])
    assert matched() == 2


def test_samples_in_different_steps_match_in_every_layer(matched):
    unet = agentsd.apply_patch(tiny_unet(), share_matches="level")
    predictions(unet, [torch.tensor([900, 880]), torch.tensor([100, 900])])
    assert matched() == 3 + 6  # two phases in the last


def test_a_controlnet_shares_nothing_with_the_unet(matched):
    base = tiny_sd()
    pipe = with_unet(StableDiffusionControlNetPipeline, base, controlnet=tiny_controlnet(base.unet))
    agentsd.apply_patch(pipe, **AGENTS, share_matches="level")
    more = {"image": image(), "height": None, "width": None}
    assert in_each_step(pipe, matched, **more) == [2] * STEPS


def test_copies_go_on_by_themselves(matched):
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, share_matches="block", match_interval=4)
    expected = predictions(unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        matched()
        assert torch.equal(predictions(twin), expected)
        assert matched() == 2 * 2


def test_pipelines_that_share_a_unet_in_threads():
    pipe = agentsd.apply_patch(tiny_sd(), share_matches="level")
    assert_as_alone(pipe, pipe.unet)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "way, options, expected_graphs",
    [
        ("whole", KEYS, 1),
        ("regional", EVERYTHING, 4),
        ("regional", KEYS, 2),
        # What is kept is a copy, laid out as what it is a copy of: the block that matched needs no graph of its own.
        pytest.param("regional", {**KEYS, "match_interval": 2}, 2, marks=needs_graphs_of_several_blocks),
    ],
)
def test_compiled(way, options, expected_graphs):
    """The whole model is one graph a phase; of single blocks, one graph matches and one merges by what is shared."""
    timesteps = torch.tensor([950, 930, 140, 120])
    options = {**options, "share_matches": "block"}
    expected = walk(agentsd.apply_patch(small_unet(layers_per_block=2), **options), timesteps)
    unet, graphs = agentsd.apply_patch(small_unet(layers_per_block=2), **options), Graphs()
    if way == "whole":
        unet.compile(backend=graphs, fullgraph=True)
    else:
        unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(walk(unet, timesteps), expected, rtol=1e-4, atol=1e-4)
        assert graphs.count == expected_graphs
    assert not counters["graph_break"]
    assert_no_trace(agentsd.remove_patch(unet))
