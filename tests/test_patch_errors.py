"""What cannot be patched is named, and a failed call changes nothing."""

import warnings

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, CustomDiffusionAttnProcessor2_0
from models import tiny_flux, tiny_sd3
from peft import LoraConfig, get_peft_model
from runs import hook_count, run

import agentsd
from agentsd import AgentAttnProcessor
from agentsd.models.unet import find_layers


class Other:
    pass


@pytest.mark.parametrize("thing", [None, 3, "unet", Other(), torch.zeros(1)])
@pytest.mark.parametrize("call", [agentsd.apply_patch, agentsd.remove_patch, agentsd.is_patched, agentsd.report])
def test_a_wrong_object_is_named(thing, call):
    with pytest.raises(TypeError, match="pipeline with a UNet, or a UNet, but got"):
        call(thing)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
def test_transformer_models_are_not_supported_yet(build):
    pipe = build()
    with pytest.raises(TypeError, match=f"{type(pipe).__name__} has a transformer instead of a UNet"):
        agentsd.apply_patch(pipe)
    with pytest.raises(ValueError, match="Stable Diffusion 3 and Flux are not supported yet"):
        agentsd.apply_patch(pipe.transformer)


def test_a_model_in_data_parallel_is_named(unet):
    with pytest.raises(ValueError, match=r"DataParallel wraps .* patch its `module`"):
        agentsd.apply_patch(torch.nn.DataParallel(unet))


def test_a_wrapped_model_is_named(unet):
    wrapped = get_peft_model(unet, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"PeftModel wraps .* patch its `base_model\.model`"):
        agentsd.apply_patch(wrapped)
    assert agentsd.is_patched(agentsd.apply_patch(wrapped.base_model.model))


@pytest.mark.parametrize("call", [agentsd.remove_patch, agentsd.is_patched])
def test_a_patch_inside_a_wrapper_is_not_overlooked(unet, call):
    """Wrapping is what `DistributedDataParallel` and accelerate do: nothing to remove would be found, in silence."""
    wrapped = torch.nn.Sequential(agentsd.apply_patch(unet))
    with pytest.raises(ValueError, match="Sequential wraps a patched model: pass its `0` instead"):
        call(wrapped)
    assert agentsd.is_patched(unet)


def test_a_model_without_matching_layers_is_an_error():
    unet = UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    with pytest.raises(ValueError, match="no self-attention that agentsd can patch"):
        agentsd.apply_patch(unet)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"ratio": 1.0}, ValueError),
        ({"ratio": None, "sx": 0}, ValueError),
        ({"ratios": 0.4}, TypeError),
        ({"config": {"ratio": 0.4}}, TypeError),
        ({"ratio": 0.3, "config": agentsd.AgentSDConfig()}, ValueError),
        ({"seed": 1, "config": agentsd.AgentSDConfig()}, ValueError),
        ({"filter_fn": "down"}, TypeError),
        ({"filter_fn": lambda name, module: False}, ValueError),
        ({"filter_fn": lambda name, module: name.nothing}, AttributeError),
    ],
)
@pytest.mark.parametrize("is_patched", [True, False])
def test_a_failed_call_changes_nothing(unet, options, error, is_patched):
    if is_patched:
        agentsd.apply_patch(unet, ratio=0.2, merge_mlp=True)
    before, hooks, processors = run(unet), hook_count(unet), dict(unet.attn_processors)
    with pytest.raises(error):
        agentsd.apply_patch(unet, **options)
    assert agentsd.is_patched(unet) == is_patched
    assert (hook_count(unet), unet.attn_processors) == (hooks, processors)
    assert torch.equal(run(unet), before)


def test_a_failure_while_hooking_in_changes_nothing(unet, monkeypatch):
    agentsd.apply_patch(unet, ratio=0.2)
    before, hooks = run(unet), hook_count(unet)
    last = [layer.block for layer in find_layers(unet) if hasattr(layer.attn, "agentsd_layer")][-1]

    def refuse(*args, **kwargs):
        if "with_kwargs" in kwargs and refuse.calls:
            refuse.calls -= 1
            raise RuntimeError("refused")
        return type(last).register_forward_pre_hook(last, *args, **kwargs)

    refuse.calls = 1
    monkeypatch.setattr(last, "register_forward_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        agentsd.apply_patch(unet, ratio=0.5)
    assert hook_count(unet) == hooks
    assert torch.equal(run(unet), before)


@pytest.mark.parametrize(
    "part, value",
    [("norm_q", torch.nn.LayerNorm(8)), ("group_norm", torch.nn.GroupNorm(1, 32)), ("residual_connection", True)],
)
def test_attention_that_does_more_is_skipped_and_reported(unet, part, value):
    """AgentAttnProcessor knows nothing of these, which other models' attention has."""
    layer = find_layers(unet)[0]
    setattr(layer.attn, part, value)
    rows = {row.name: row for row in agentsd.report(agentsd.apply_patch(unet)).rows}
    assert rows[layer.name].skipped
    assert sum(row.skipped is not None for row in rows.values()) == 1


def test_unsupported_processors_are_skipped_and_reported(unet):
    layer = find_layers(unet)[0]
    custom = CustomDiffusionAttnProcessor2_0(hidden_size=layer.attn.inner_dim, train_q_out=False)
    layer.attn.set_processor(custom)
    agentsd.apply_patch(unet)
    rows = {row.name: row for row in agentsd.report(unet, 128, 128).rows}
    assert "CustomDiffusionAttnProcessor2_0" in rows[layer.name].skipped
    assert layer.attn.processor is custom
    assert "skipped: its processor CustomDiffusionAttnProcessor2_0" in str(agentsd.report(unet))

    for other in find_layers(unet):
        other.attn.set_processor(custom)
    agentsd.remove_patch(unet)
    with pytest.raises(ValueError, match="CustomDiffusionAttnProcessor2_0"):
        agentsd.apply_patch(unet)


def test_a_replaced_processor_means_baseline_and_one_warning(unet):
    plain = run(unet)
    agentsd.apply_patch(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    with pytest.warns(UserWarning, match="replaced by AttnProcessor2_0"):
        assert torch.equal(run(unet), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(unet)
    agentsd.remove_patch(unet)
    assert all(type(p) is AttnProcessor2_0 for p in unet.attn_processors.values())


def test_a_processor_derived_from_ours_is_ours(unet):
    class Derived(AgentAttnProcessor):
        pass

    agentsd.apply_patch(unet)
    for layer, _ in unet.agentsd_patch.layers:
        layer.attn.set_processor(Derived())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(unet)


def test_the_original_processor_comes_back(unet):
    unet.set_attn_processor(AttnProcessor())
    originals = dict(unet.attn_processors)
    agentsd.remove_patch(agentsd.apply_patch(unet))
    assert unet.attn_processors == originals
