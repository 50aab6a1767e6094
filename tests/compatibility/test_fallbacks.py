"""Layers that a patch covers and that run without it: one warning with the cause, and a report of what ran."""

import copy
import sys
import warnings
from types import ModuleType

import pytest
import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from models import tiny_sd, tiny_unet
from runs import inputs

import agentsd
from agentsd import AgentSDConfig
from agentsd.models.unet import find_layers

from .support import assert_differs, fingerprint, generate, predict, predict_both


EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)


def told(run):
    """What a call returns, and what agentsd warned of in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(warning.message) for warning in caught if "agentsd" in str(warning.message)]


def check_fallback(unet, expected, words, part="attn1"):
    """The model gives what it is expected to, warns once of it and its cause, and the report says so."""
    result, messages = told(lambda: predict_both(unet))
    assert torch.equal(result, expected)
    (message,) = messages
    assert "without agentsd, because" in message and words in message
    assert told(lambda: predict_both(unet))[1] == []
    report = agentsd.report(unet)
    assert all(words in row.fallbacks[part] for row in report.rows)
    assert f"{part} runs without agentsd: {report.rows[0].fallbacks[part]}" in str(report)


def check_it_runs(unet):
    """All layers run as planned, without a word."""
    result, messages = told(lambda: predict_both(unet))
    assert messages == []
    assert all(row.fallbacks == {} for row in agentsd.report(unet).rows)
    return result


def test_nothing_is_said_where_all_layers_run():
    for options in ({}, {"config": EVERYTHING}, {"max_downsample": 8, "sx": 2, "sy": 2}, {"ratio": 0}):
        unet = agentsd.apply_patch(tiny_unet(), **options)
        check_it_runs(unet)
        assert "without" not in str(agentsd.report(unet))


# --- other packages


def tome(unet):
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False)


@pytest.mark.parametrize("options", [{}, {"merge_attn": False, "merge_mlp": True}])
def test_tomesd_before_agentsd_is_refused(options):
    """Both merge tokens in the same blocks. Nothing is changed; feature reuse alone works beside it."""
    unet = tiny_unet()
    tome(unet)
    found, expected = fingerprint(unet), predict_both(unet)
    with pytest.raises(ValueError, match=r"tomesd merges tokens.*tomesd\.remove_patch"):
        agentsd.apply_patch(unet, **options)
    assert fingerprint(unet) == found
    assert torch.equal(predict_both(unet), expected)
    agentsd.apply_patch(unet, ratio=0, reuse=2)
    agentsd.remove_patch(unet)
    tomesd.remove_patch(unet)
    check_it_runs(agentsd.apply_patch(unet, **options))


def test_tomesd_after_agentsd():
    unet = agentsd.apply_patch(tiny_unet())
    patched, alone = predict_both(unet), tiny_unet()
    tome(unet)
    tome(alone)
    check_fallback(unet, predict_both(alone), "tomesd merges tokens in the block, too")
    tomesd.remove_patch(unet)
    assert torch.equal(check_it_runs(unet), patched)


class TokenMergeAttentionProcessor(AttnProcessor2_0):
    """ToDo is no package that can be installed: this is its processor's name."""


def test_todo_before_agentsd_is_refused():
    unet = tiny_unet()
    unet.set_attn_processor(TokenMergeAttentionProcessor())
    found = fingerprint(unet)
    with pytest.raises(ValueError, match=r"ToDo attends there.*`remove_patch`"):
        agentsd.apply_patch(unet)
    assert fingerprint(unet) == found


def test_todo_in_some_layers_leaves_the_others():
    unet = tiny_unet()
    find_layers(unet)[0].attn.set_processor(TokenMergeAttentionProcessor())
    _, messages = told(lambda: agentsd.apply_patch(unet))
    assert len(messages) == 1 and "ToDo attends there" in messages[0]
    rows = agentsd.report(unet).rows
    assert "ToDo" in rows[0].skipped
    assert all(row.skipped is None for row in rows[1:])


def test_todo_after_agentsd():
    unet = agentsd.apply_patch(tiny_unet())
    unet.set_attn_processor(TokenMergeAttentionProcessor())
    assert all("ToDo" in row.fallbacks["attn1"] for row in agentsd.report(unet).rows), "before any run"
    check_fallback(unet, predict_both(tiny_unet()), "ToDo attends there to fewer tokens")


@pytest.fixture
def hidiffusion(monkeypatch):
    """The package, which looks for one class where older versions of diffusers had it."""
    place = ModuleType("diffusers.pipelines.controlnet.multicontrolnet")
    place.MultiControlNetModel = MultiControlNetModel
    monkeypatch.setitem(sys.modules, place.__name__, place)
    import hidiffusion

    yield hidiffusion
    for name in [name for name in sys.modules if name.split(".")[0] == "hidiffusion"]:
        monkeypatch.delitem(sys.modules, name)


def sd15():
    """The layers of Stable Diffusion 1.5, which hidiffusion knows by their names, and no image is large enough for."""
    pipe = tiny_sd(
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    pipe.register_to_config(_name_or_path="sd15")
    return pipe


def test_hidiffusion_before_agentsd(hidiffusion):
    """Its windows are in the layers that agentsd patches by default: named, and left alone where others are left."""
    pipe = sd15()
    hidiffusion.apply_hidiffusion(pipe, apply_raunet=False)
    with pytest.raises(ValueError, match=r"hidiffusion attends there in windows.*apply_window_attn=False"):
        agentsd.apply_patch(pipe)
    _, messages = told(lambda: agentsd.apply_patch(pipe, max_downsample=2, sx=2, sy=2))
    assert len(messages) == 1 and "hidiffusion attends there in windows" in messages[0]
    rows = agentsd.report(pipe).rows
    assert [row.level for row in rows if row.skipped is not None] == [0] * 5
    assert {row.level for row in rows if row.skipped is None} == {1}
    _, messages = told(lambda: generate(pipe))
    assert messages == []
    agentsd.remove_patch(pipe)
    hidiffusion.remove_hidiffusion(pipe)
    agentsd.apply_patch(pipe)
    assert told(lambda: generate(pipe))[1] == []


def test_hidiffusion_after_agentsd(hidiffusion):
    pipe = agentsd.apply_patch(sd15(), max_downsample=2, sx=2, sy=2)
    hidiffusion.apply_hidiffusion(pipe, apply_raunet=False)
    _, messages = told(lambda: generate(pipe))
    assert len(messages) == 1 and "hidiffusion attends there in windows" in messages[0]
    assert [row.level for row in agentsd.report(pipe).rows if row.fallbacks] == [0] * 5


def test_deepcache_after_feature_reuse_is_refused():
    """Both skip the same modules, each on its own schedule. Merging alone works beside it, in either order."""
    pipe = agentsd.apply_patch(tiny_sd(), reuse=2)
    expected = generate(pipe, num_inference_steps=8)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(ValueError, match="DeepCache package is enabled on this model"):
        generate(pipe, num_inference_steps=8)
    helper.disable()
    assert torch.equal(generate(pipe, num_inference_steps=8), expected)


def test_a_cache_of_diffusers_after_feature_reuse_is_refused():
    unet = agentsd.apply_patch(tiny_unet(), ratio=0, reuse=2)
    apply_taylorseer_cache(unet, TaylorSeerCacheConfig(cache_identifiers=["mid_block"]))
    with pytest.raises(ValueError, match="TaylorSeerCacheHook is on a module that feature reuse skips"):
        predict_both(unet)


# --- wrappers


def tiled(forward):
    """What HyperTile puts around self-attention: it attends in tiles."""

    def wrapper(x, *args, **kwargs):
        out = forward(x.unflatten(1, (2, -1)).flatten(0, 1), *args, **kwargs)
        return out.unflatten(0, (-1, 2)).flatten(1, 2)

    return wrapper


@pytest.mark.parametrize("order", ["tiles_first", "patch_first"])
def test_tiles_within_self_attention(order):
    unet, alone = tiny_unet(), tiny_unet()
    if order == "patch_first":
        agentsd.apply_patch(unet)
    for model in (unet, alone):
        for layer in find_layers(model):
            layer.attn.forward = tiled(layer.attn.forward)
    if order == "tiles_first":
        agentsd.apply_patch(unet)
    check_fallback(unet, predict_both(alone), "something changes the tokens between block and layer")


def test_chunked_feed_forward():
    """`merge_mlp` only: the rest of the patch runs."""
    unet = agentsd.apply_patch(tiny_unet())
    for layer in find_layers(unet):
        layer.block.set_chunk_feed_forward(16, 1)
    expected = check_it_runs(unet)
    agentsd.apply_patch(unet, merge_mlp=True)
    check_fallback(unet, expected, "gives it the tokens in chunks", part="ff")
    assert all(set(row.fallbacks) == {"ff"} for row in agentsd.report(unet).rows)
    for layer in find_layers(unet):
        layer.block.set_chunk_feed_forward(None)
    assert_differs(check_it_runs(unet), expected)


def test_chunked_feed_forward_in_compiled_blocks():
    """Compiled code notes the cause, too, and is compiled once for it."""
    torch.compiler.reset()
    graphs = []
    unet = agentsd.apply_patch(
        tiny_unet(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(32,)),
        merge_mlp=True,
        agent_until=0,
    )
    find_layers(unet)[0].block.set_chunk_feed_forward(16, 1)
    unet.compile_repeated_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    _, messages = told(lambda: predict_both(unet))
    count = len(graphs)
    _, more = told(lambda: predict_both(unet))
    assert len(messages) == 1 and "gives it the tokens in chunks" in messages[0]
    assert (more, len(graphs)) == ([], count)
    torch.compiler.reset()


def test_replaced_processors_are_reported():
    """While something else stands in the patch's place, and no longer."""
    pipe = agentsd.apply_patch(tiny_sd(), merge_mlp=True)
    patched = check_it_runs(pipe.unet)
    pipe.fuse_qkv_projections(vae=False)
    fused = tiny_sd()
    fused.fuse_qkv_projections(vae=False)
    check_fallback(pipe.unet, predict_both(fused.unet), "the processor was replaced by FusedAttnProcessor2_0")
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(check_it_runs(pipe.unet), patched)


def test_replaced_attention_is_reported():
    """A copy of the layer has a patch of its own, which nothing tells of the step."""
    unet = agentsd.apply_patch(tiny_unet())
    for layer in find_layers(unet):
        layer.block.attn1 = copy.deepcopy(layer.attn)
    check_fallback(unet, predict_both(tiny_unet()), "the attention module was replaced by another")


# --- what a call is given


def test_a_mask():
    unet = agentsd.apply_patch(tiny_unet())
    sample, text = inputs(unet)
    mask = torch.ones(2, 256)
    unet = agentsd.apply_patch(unet, filter_fn=lambda name, _: name.startswith("down_blocks.0"))
    layer = find_layers(unet)[0]
    layer.attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask[:, None]}), with_kwargs=True
    )
    _, messages = told(lambda: unet(sample, 900, text))
    assert len(messages) == 1 and "an attention mask was given" in messages[0]
    assert "mask" in agentsd.report(unet).rows[0].fallbacks["attn1"]


def test_a_cached_layer():
    unet = agentsd.apply_patch(tiny_unet(), merge_crossattn=True)
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(unet, config)
    _, messages = told(lambda: predict(unet, 900))
    assert len(messages) == 1 and "a cache of diffusers keeps outputs there" in messages[0]
    assert all(set(row.fallbacks) == {"attn2"} for row in agentsd.report(unet).rows)


def test_samples_in_phases_that_keep_different_numbers_of_tokens():
    """The cells of one phase can merge more than those of the other."""
    unet = agentsd.apply_patch(tiny_unet(), ratio=0.9, merge_mlp=True)
    _, messages = told(lambda: predict(unet, torch.tensor([900, 100])))
    assert len(messages) == 1 and ".ff" in messages[0] and "different phases" in messages[0]


@pytest.mark.parametrize(("options", "size"), [({"sx": 8, "sy": 8}, 6), ({"ratio": 0.001}, 16)])
def test_too_few_tokens_to_merge_any(options, size):
    """The report's numbers of tokens say it; what is left alone on purpose (`min_tokens`) is not warned of."""
    unet = agentsd.apply_patch(tiny_unet(), **options)
    result, messages = told(lambda: predict(unet, 900, size=size))
    assert torch.equal(result, predict(tiny_unet(), 900, size=size))
    assert len(messages) == 1 and "too few tokens" in messages[0]
    row = agentsd.report(unet).rows[0]
    assert {phase.merged_tokens for phase in row.phases.values()} == {row.tokens}
    agentsd.apply_patch(unet, min_tokens=size**2 + 1, **options)
    assert told(lambda: predict(unet, 900, size=size))[1] == []


def test_calls_that_pass_over_hooks():
    """`forward` in place of the module: of a block, and of the model, which then knows no step."""
    unet = agentsd.apply_patch(tiny_unet())
    patched, plain = predict_both(unet), predict_both(tiny_unet())
    fresh = agentsd.apply_patch(tiny_unet())
    for model in (fresh, unet):
        sample, text = inputs(model)
        _, messages = told(lambda model=model, x=(sample, 900, text): model.forward(*x))
        assert len(messages) == 1 and "outside a call of its model" in messages[0]
    assert all("`model.forward`" in row.fallbacks["attn1"] for row in agentsd.report(fresh).rows)
    assert torch.equal(check_it_runs(fresh), patched)

    for layer in find_layers(fresh):
        layer.transformer.transformer_blocks = Forwards(layer.transformer.transformer_blocks)
    check_fallback(fresh, plain, "`block.forward` was called and not the block")


class Forwards(torch.nn.ModuleList):
    """Blocks whose forward is called directly."""

    def __iter__(self):
        return iter([block.forward for block in super().__iter__()])


# --- feature reuse


def test_the_report_says_how_often_everything_ran():
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=3)
    assert "last run" not in agentsd.report(pipe).reuse
    generate(pipe, num_inference_steps=9)
    assert agentsd.report(pipe).reuse.endswith("the whole UNet ran in 3 of the 9 calls of the last run")
    with pytest.warns(UserWarning, match="off in runs of fewer than 8 steps"):
        generate(pipe, num_inference_steps=4)
    assert agentsd.report(pipe).reuse.endswith("the whole UNet ran in 4 of the 4 calls of the last run")


def test_samples_at_different_steps_run_everything_and_it_is_said():
    unet = agentsd.apply_patch(tiny_unet(), ratio=0, reuse=2)
    with torch.no_grad(), pytest.warns(UserWarning, match="samples of a batch are at different timesteps"):
        _ = [predict(unet, torch.tensor([timestep, timestep - 50])) for timestep in (900, 800)]
    assert agentsd.report(unet).reuse.endswith("the whole UNet ran in 2 of the 2 calls of the last run")
