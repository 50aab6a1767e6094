"""Caches, layer skip and attention guidance: they reach into the patched layers, or leave out calls of them."""

import pytest
import torch
from compat_models import with_unet
from DeepCache import DeepCacheSDHelper
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from diffusers.models.cache_utils import CacheMixin
from models import tiny_sd, tiny_sdxl, tiny_unet

import agentsd
from agentsd import AgentSDConfig

from .support import (
    AgentsdWarnings,
    assert_differs,
    assert_no_trace,
    check_cycle,
    fingerprint,
    generate,
    in_both_phases,
    predict,
    predict_both,
)


FIRST_STACK = "down_blocks.0.attentions.0.transformer_blocks"


class Walk:
    """A walk down the timesteps, two in each phase, that caches can ask where it is."""

    timesteps = (900, 880, 500, 480)

    def __init__(self, unet):
        self.unet = unet
        self.timestep = 0

    @torch.no_grad()
    def __call__(self):
        """The predictions of all timesteps, from empty caches."""
        registry = HookRegistry.check_if_exists_or_initialize(self.unet)
        registry._child_registries_cache = None  # as `enable_cache` of transformer models does from diffusers 0.41 on
        registry.reset_stateful_hooks(recurse=True)
        noise = torch.Generator().manual_seed(0)
        text = torch.randn(2, 7, 32, generator=noise)
        steps = []
        # What transformer models have as a method; a UNet's caches need it just as well.
        with CacheMixin.cache_context(self.unet, "walk"):
            for timestep in self.timesteps:
                self.timestep = timestep
                # Another latent each time, as in a real run: what a cache kept does not fit exactly.
                sample = torch.randn(2, 4, 16, 16, generator=noise)
                steps.append(self.unet(sample, timestep, encoder_hidden_states=text).sample)
        return torch.stack(steps)


def broadcast(unet, walk, **options):
    settings = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    settings |= {"cross_attention_timestep_skip_range": (-1, 1001), "current_timestep_callback": lambda: walk.timestep}
    apply_pyramid_attention_broadcast(unet, PyramidAttentionBroadcastConfig(**{**settings, **options}))


def faster(unet, walk):
    for stack in (unet.down_blocks[0].attentions[0], unet.up_blocks[2].attentions[0]):
        config = FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 890),
            current_timestep_callback=lambda: walk.timestep,
            attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True,
            tensor_format="BCHW",
        )
        # Its part for whole models takes keywords that no UNet has; its part for attention layers works anywhere.
        apply_faster_cache(stack, config)
        HookRegistry.check_if_exists_or_initialize(stack).remove_hook("faster_cache_denoiser", recurse=False)


def taylor(unet, walk):
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[".*attn1", ".*attn2"],
    )
    apply_taylorseer_cache(unet, config)


def first_block(unet, walk):
    for stack in (unet.down_blocks[0].attentions[0], unet.up_blocks[2].attentions[0]):
        apply_first_block_cache(stack, FirstBlockCacheConfig(threshold=10.0))


CACHES = {"pab": broadcast, "faster": faster, "taylorseer": taylor, "first_block": first_block}


@pytest.mark.parametrize("order", ["cache_first", "patch_first"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(cache, order):
    """PAB and other caches (FasterCache, TaylorSeer, first-block cache), put in before patching and after."""
    layers = {"transformer_layers_per_block": 3} if cache == "first_block" else {}
    baseline, unet = tiny_unet(**layers), tiny_unet(**layers)
    expected, walk = Walk(baseline), Walk(unet)
    without = expected()
    CACHES[cache](baseline, expected)
    expected = expected()
    assert_differs(expected[-1:], without[-1:])

    if order == "patch_first":
        agentsd.apply_patch(unet)
        uncached = walk()
        CACHES[cache](unet, walk)
    else:
        CACHES[cache](unet, walk)
        uncached = None
        agentsd.apply_patch(unet)
    patched = walk()
    assert_differs(patched, expected)
    if uncached is not None:
        assert torch.equal(patched[0], uncached[0])
        assert_differs(patched[-1:], uncached[-1:])
    assert torch.equal(walk(), patched)
    agentsd.remove_patch(unet)
    assert torch.equal(walk(), expected)
    assert_no_trace(unet)


def test_cached_self_attention_is_that_of_the_older_step():
    """PAB: what a patched layer gives back from the cache is the finished output, in the order of the image."""
    unet = agentsd.apply_patch(tiny_unet(), filter_fn=lambda name, _: name.startswith(FIRST_STACK))
    walk, outputs = Walk(unet), []
    broadcast(unet, walk)
    attn = unet.get_submodule(f"{FIRST_STACK}.0.attn1")
    attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    walk()
    assert outputs[0].shape == (2, 256, 32)
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[3], outputs[2])
    assert not torch.equal(outputs[2], outputs[1])


def test_cached_cross_attention_is_not_merged():
    """PAB on cross-attention: `merge_crossattn` leaves such layers alone, for a cached output has an older order."""
    results = []
    for merge_crossattn in (False, True):
        unet = agentsd.apply_patch(tiny_unet(), merge_crossattn=merge_crossattn)
        walk = Walk(unet)
        uncached = walk()
        broadcast(unet, walk, cross_attention_block_skip_range=2)
        results.append((uncached, walk()))
    (plain, plain_cached), (merged, merged_cached) = results
    assert_differs(merged, plain)
    assert torch.equal(merged_cached, plain_cached)


@pytest.mark.parametrize("order", ["cache_first", "patch_first"])
def test_deepcache(order):
    """DeepCache, put in before patching and after."""

    def helper(pipe):
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        return helper

    def run(pipe):
        helper = enabled[pipe.unet]
        helper.cached_output, helper.start_timestep = {}, None
        return generate(pipe, num_inference_steps=4)

    baseline, pipe = tiny_sd(), tiny_sd()
    plain = generate(baseline, num_inference_steps=4)
    enabled = {baseline.unet: helper(baseline)}
    expected = run(baseline)
    assert_differs(expected, plain)
    for what in (order, {"cache_first": "patch_first", "patch_first": "cache_first"}[order]):
        if what == "cache_first":
            enabled[pipe.unet] = helper(pipe)
        else:
            agentsd.apply_patch(pipe)
    patched = run(pipe)
    assert_differs(patched, expected)
    assert torch.equal(run(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(run(pipe), expected)
    enabled[pipe.unet].disable()
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)
    assert_no_trace(pipe.unet)


@pytest.mark.parametrize("kind", [StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline])
@in_both_phases
def test_pag_beside_patched_layers(kind, config):
    """PAG in the middle block: three predictions in one batch, patched layers around it."""
    if kind is StableDiffusionPAGPipeline:
        pipe = with_unet(kind)
    else:
        pipe = kind(**tiny_sdxl().components, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
    pipe.set_pag_applied_layers(["mid"])
    assert_differs(generate(pipe, pag_scale=3.0), generate(pipe, pag_scale=0.0))
    with AgentsdWarnings() as caught:
        check_cycle(pipe, lambda: generate(pipe, pag_scale=3.0), config=config)
        assert caught.count == 0


@in_both_phases
def test_pag_on_patched_layers(config):
    """PAG on a patched layer: its processor takes over for the call, with one warning; then the patch is back."""
    baseline = with_unet(StableDiffusionPAGPipeline)
    pipe = with_unet(StableDiffusionPAGPipeline)
    first_only = lambda name, _: name.startswith(FIRST_STACK)  # noqa: E731
    for each in (baseline, pipe):
        each.set_pag_applied_layers(["down_blocks.0"])
    agentsd.apply_patch(pipe, config=config, filter_fn=first_only)
    patched = generate(pipe, pag_scale=0.0)
    with AgentsdWarnings() as caught:
        assert torch.equal(generate(pipe, pag_scale=3.0), generate(baseline, pag_scale=3.0))
        assert caught.count == 1
    assert torch.equal(generate(pipe, pag_scale=0.0), patched)
    agentsd.apply_patch(pipe, config=config)
    with pytest.warns(UserWarning, match="without agentsd"):
        others_patched = generate(pipe, pag_scale=3.0)
    assert_differs(others_patched, generate(baseline, pag_scale=3.0))
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe, pag_scale=3.0), generate(baseline, pag_scale=3.0))
    assert_no_trace(pipe.unet)


SKIPS = {
    "block": {},
    "attention": {"skip_ff": False},
    "feed_forward": {"skip_attention": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


@in_both_phases
@pytest.mark.parametrize("skip", SKIPS)
def test_layer_skip(skip, config):
    """Layer skip of a patched block, its attention, its feed-forward or its attention scores; before and after."""
    baseline, unet = tiny_unet(), tiny_unet()
    plain = predict_both(baseline)
    apply_layer_skip(baseline, LayerSkipConfig(indices=[0], fqn=FIRST_STACK, **SKIPS[skip]))
    skipped = predict_both(baseline)
    assert_differs(skipped, plain)
    check_cycle(baseline, lambda: predict_both(baseline), config=config)

    # With nothing but the skipped layer patched, the skip is all there is (the feed-forward is no part of the patch).
    agentsd.apply_patch(unet, config=config, filter_fn=lambda name, _: name.startswith(FIRST_STACK))
    patched = predict_both(unet)
    apply_layer_skip(unet, LayerSkipConfig(indices=[0], fqn=FIRST_STACK, **SKIPS[skip]))
    assert torch.equal(predict_both(unet), skipped) == (skip != "feed_forward")
    HookRegistry.check_if_exists_or_initialize(unet).remove_hook("layer_skip_hook", recurse=True)
    assert torch.equal(predict_both(unet), patched)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), plain)
    assert_no_trace(unet)


@in_both_phases
def test_smoothed_energy_guidance(config):
    """The blurred queries of smoothed energy guidance see the whole image, not merged tokens."""
    baseline, unet = tiny_unet(), tiny_unet()
    plain = predict_both(baseline)
    agentsd.apply_patch(unet, config=config, filter_fn=lambda name, _: name.startswith(FIRST_STACK))
    for model in (baseline, unet):
        blur = SmoothedEnergyGuidanceConfig(indices=[0], fqn=FIRST_STACK)
        _apply_smoothed_energy_guidance_hook(model, blur, blur_sigma=1.0)
    expected = predict_both(baseline)
    assert_differs(expected, plain)
    assert torch.equal(predict_both(unet), expected)


@in_both_phases
def test_freeu(config):
    """FreeU, switched on and off while patched."""
    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    patched, found = generate(pipe), fingerprint(pipe.unet)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_differs(generate(pipe), patched)
    pipe.disable_freeu()
    assert torch.equal(generate(pipe), patched)
    assert fingerprint(pipe.unet) == found


def test_merged_mlp_with_skipped_feed_forward():
    """Layer skip of the feed-forward where `merge_mlp` merges: it runs, and leaves no trace."""
    unet = tiny_unet()
    apply_layer_skip(unet, LayerSkipConfig(indices=[0], fqn=FIRST_STACK, skip_attention=False))
    config = AgentSDConfig(merge_mlp=True)
    check_cycle(unet, lambda: predict_both(unet), config=config)
    agentsd.apply_patch(unet, config=config)
    assert torch.isfinite(predict(unet, 500)).all()
