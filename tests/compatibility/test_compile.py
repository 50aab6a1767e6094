"""`torch.compile`, whole and regional, before and after patching, patching anew and removing."""

import shutil

import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from graphs import Graphs
from models import ONE_LEVEL, tiny_sd, tiny_sdxl, tiny_unet
from torch._dynamo.utils import counters

import agentsd
from agentsd import AgentSDConfig
from agentsd.models.unet import find_layers

from .support import assert_differs, assert_no_trace, fingerprint, generate


pytestmark = pytest.mark.usefixtures("fresh_compiler")

TIMESTEPS = torch.tensor([900, 880, 120, 100])
ONE_A_PHASE = [0, 2]
EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)
IS_TORCH_2_6 = torch.__version__.startswith("2.6.")
needs_graphs_of_several_blocks = pytest.mark.skipif(
    IS_TORCH_2_6, reason="torch 2.6 shares no graph between blocks, patched or not"
)


def small_unet(**overrides):
    return tiny_unet(**{**ONE_LEVEL, **overrides})


@torch.no_grad()
def walk(model, timesteps=TIMESTEPS, size=16):
    """Predictions at timesteps that are elements of one tensor, as pipelines pass them."""
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, size, size, generator=noise), torch.randn(2, 7, 32, generator=noise)
    return torch.stack([model(sample, timestep, encoder_hidden_states=text).sample.clone() for timestep in timesteps])


def compile_whole(unet, backend):
    return torch.compile(unet, backend=backend, fullgraph=True)


def compile_in_place(unet, backend):
    unet.compile(backend=backend, fullgraph=True)
    return unet


def compile_blocks(unet, backend):
    unet.compile_repeated_blocks(backend=backend, fullgraph=True)
    return unet


WAYS = {"whole": compile_whole, "in_place": compile_in_place, "regional": compile_blocks}
# A whole graph takes seconds to capture: each way once, the costly ones with one of the configurations.
all_ways = pytest.mark.parametrize(
    ("way", "config"),
    [("whole", EVERYTHING), ("in_place", AgentSDConfig()), ("regional", AgentSDConfig()), ("regional", EVERYTHING)],
    ids=["whole-everything", "in_place-attention", "regional-attention", "regional-everything"],
)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def eager():
    """What uncompiled models predict: plain, patched, and patched with everything merged."""
    unet = small_unet()
    results = {"plain": walk(unet)}
    for name, config in (("attention", AgentSDConfig()), ("everything", EVERYTHING)):
        agentsd.apply_patch(unet, config=config)
        results[name] = walk(unet)
    return results


@all_ways
def test_patched_then_compiled(way, config, eager):
    """Compiled after patching: one graph a phase, of the model or of all its blocks; none at later steps; no break."""
    unet = agentsd.apply_patch(small_unet(), config=config)
    graphs = Graphs()
    model = WAYS[way](unet, graphs)
    expected = eager["everything" if config is EVERYTHING else "attention"]
    assert_close(walk(model), expected)
    captured = graphs.count
    assert captured == 2
    assert_close(walk(model), expected)
    assert graphs.count == captured, "recompiled at a later step"
    assert not counters["graph_break"]

    agentsd.remove_patch(model)
    assert_close(walk(model), eager["plain"])
    assert_no_trace(unet)


@all_ways
def test_compiled_then_patched(way, config, eager):
    """Patched after compiling, and after compiled runs: active in both phases, removed, and active again."""
    unet = small_unet()
    found = fingerprint(unet)
    graphs = Graphs()
    model = WAYS[way](unet, graphs)
    assert_close(walk(model), eager["plain"])
    plain_graphs = graphs.count
    expected = eager["everything" if config is EVERYTHING else "attention"]
    agentsd.apply_patch(model, config=config)
    assert_close(walk(model), expected)
    captured = graphs.count
    assert captured - plain_graphs == 2
    assert_close(walk(model), expected)
    assert graphs.count == captured

    agentsd.remove_patch(model)
    assert_close(walk(model), eager["plain"])
    assert fingerprint(unet) == found
    agentsd.apply_patch(model, config=config)
    assert_close(walk(model), expected)


MORE = {"merge_mlp": True, "merge_crossattn": True}


@pytest.mark.parametrize(
    ("way", "options"),
    [("whole", MORE), ("regional", MORE), ("regional", {"ratio": 0.7}), ("regional", {"seed": 3})],
    ids=["whole-more", "regional-more", "regional-ratio", "regional-seed"],
)
def test_patched_anew_with_other_options(way, options, eager):
    """Patching a compiled and patched model anew: what is merged, where, and how much follows the new options."""
    few = TIMESTEPS[ONE_A_PHASE]
    expected = walk(agentsd.apply_patch(small_unet(), **options), few)
    unet = agentsd.apply_patch(small_unet())
    model = WAYS[way](unet, Graphs())
    assert_close(walk(model, few), eager["attention"][ONE_A_PHASE])
    agentsd.apply_patch(model, **options)
    assert_close(walk(model, few), expected)
    agentsd.apply_patch(model)
    assert_close(walk(model, few), eager["attention"][ONE_A_PHASE])


def test_a_layer_wrapped_after_patching():
    """A module that is compiled by itself gets another name: its layer stays in the report, and keeps its patch."""
    unet = small_unet(up_block_types=("CrossAttnUpBlock2D",))
    kept = find_layers(unet)[1].attn
    kept.set_processor(CustomDiffusionAttnProcessor2_0(hidden_size=32, train_q_out=False))
    agentsd.apply_patch(unet)
    before = [(layer.attn, layer.attn.processor) for layer in find_layers(unet)]
    skipped = [row.skipped for row in agentsd.report(unet).rows]
    for block in (unet.down_blocks[0], unet.up_blocks[0]):
        block.attentions[0] = torch.compile(block.attentions[0], backend="eager")
    assert [row.skipped for row in agentsd.report(unet).rows] == skipped
    with agentsd.patched(unet, ratio=0.2):
        assert [row.skipped for row in agentsd.report(unet).rows] == skipped
    assert [(layer.attn, layer.attn.processor) for layer in find_layers(unet)] == before
    assert_no_trace(agentsd.remove_patch(unet))


def test_other_sizes():
    """A compiled and patched model runs at other sizes too, divisible by the cells or not."""
    unet = agentsd.apply_patch(small_unet())
    unet.compile_repeated_blocks(backend=Graphs(), fullgraph=True)
    few = TIMESTEPS[ONE_A_PHASE]
    for size in (16, 18):
        assert_close(walk(unet, few, size=size), walk(agentsd.apply_patch(small_unet()), few, size=size))


@needs_graphs_of_several_blocks
def test_many_blocks_share_their_graphs():
    """Regional compilation: however many the blocks, they need as many graphs a phase as without the patch."""
    up = {"up_block_types": ("CrossAttnUpBlock2D",)}
    unet = small_unet(layers_per_block=2, transformer_layers_per_block=2, **up)
    few, graphs = TIMESTEPS[ONE_A_PHASE], Graphs()
    expected = walk(agentsd.apply_patch(unet), few)
    assert len(agentsd.report(unet).rows) > torch._dynamo.config.recompile_limit
    agentsd.remove_patch(unet)
    unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    walk(unet, few)
    plain_graphs = graphs.count
    agentsd.apply_patch(unet)
    assert_close(walk(unet, few), expected)
    assert graphs.count - plain_graphs == 2 * plain_graphs


@pytest.mark.parametrize("order", ["compile_first", "patch_first"])
def test_pipeline_with_compiled_unet(order):
    """A pipeline whose UNet is `torch.compile`d: the patch goes to the module inside, either way round."""
    pipe, graphs = tiny_sd(), Graphs()
    pipe.unet = small_unet()
    plain = generate(pipe)
    expected = generate(agentsd.apply_patch(pipe))
    agentsd.remove_patch(pipe)
    if order == "patch_first":
        agentsd.apply_patch(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    agentsd.apply_patch(pipe)
    assert agentsd.is_patched(pipe)
    assert_close(generate(pipe), expected)
    assert graphs.count == 2
    agentsd.remove_patch(pipe)
    assert_close(generate(pipe), plain)


@torch._dynamo.config.patch(cache_size_limit=64 if IS_TORCH_2_6 else 8)  # torch 2.6 compiles every block by itself
def test_pipeline_with_compiled_blocks_sdxl():
    """SDXL with `compile_repeated_blocks`, patched afterwards."""
    pipe, graphs = tiny_sdxl(), Graphs()
    plain = generate(pipe)
    expected = generate(agentsd.apply_patch(tiny_sdxl()))
    assert_differs(expected, plain)
    pipe.unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    agentsd.apply_patch(pipe)
    assert_close(generate(pipe), expected)
    captured = graphs.count
    assert_close(generate(pipe), expected)
    assert graphs.count == captured
    agentsd.remove_patch(pipe)
    assert_close(generate(pipe), plain)


def test_gradients_through_a_compiled_model():
    """Training through a compiled and patched model (`aot_eager` traces the backward pass too)."""
    gradients = []
    for backend in (None, "aot_eager"):
        unet = agentsd.apply_patch(small_unet())
        if backend is not None:
            unet.compile_repeated_blocks(backend=backend, fullgraph=True)
        noise = torch.Generator().manual_seed(0)
        sample, text = torch.randn(2, 4, 16, 16, generator=noise), torch.randn(2, 7, 32, generator=noise)
        for timestep in TIMESTEPS[ONE_A_PHASE]:
            unet(sample, timestep, encoder_hidden_states=text).sample.square().mean().backward()
        gradients.append(unet.conv_in.weight.grad)
    assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(eager):
    """The compiler people use, on the blocks of a patched model."""
    unet = agentsd.apply_patch(small_unet())
    unet.compile_repeated_blocks(backend="inductor", fullgraph=True)
    timesteps = TIMESTEPS[ONE_A_PHASE]
    torch.testing.assert_close(walk(unet, timesteps), eager["attention"][ONE_A_PHASE], rtol=1e-3, atol=1e-3)
